"""The README.md beside an exported GGUF file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmtrain.config.model import ModelConfig
from llmtrain.interop.model_card import model_sizes

if TYPE_CHECKING:
    from llmtrain.interop.gguf.export import GgufExport


def gguf_card(name: str, model: ModelConfig, facts: Mapping[str, str], export: "GgufExport") -> str:
    """Markdown that names no path of the machine that it was made on."""
    sizes = {"Architecture": f"{export.architecture} of llama.cpp", **model_sizes(model), **facts}
    rows = "\n".join(f"| {label} | {value} |" for label, value in sizes.items())
    notes = "".join(f"\n- {note}" for note in export.notes)
    notes = f"\n## Other than in training\n{notes}\n" if notes else ""
    before, after = export.perplexities
    return f"""---
tags: [llmtrain, gguf]
---

# {name}

A causal language model, trained with llmtrain, as a file for llama.cpp and programs on it.

| | |
|---|---|
{rows}

```sh
llama-cli -m {export.file} -p "def main("
```
{notes}
## Checked

- perplexity {before:.4f} with the trained weights, {after:.4f} with those in the file ({after / before - 1:+.3%}).
{_proof(export)}"""


def _proof(export: "GgufExport") -> str:
    proof = export.proof
    if proof is None:
        return "\n**Not proved in llama.cpp**, which was not installed where this file was written.\n"
    chats = f"- {proof.num_chats} conversations have equal ids with the chat template;\n" if proof.num_chats else ""
    near = f"differ by at most {proof.max_difference:.2e}"
    if proof.num_tipped:
        near += f", but at {proof.num_tipped}, where rounding has chosen another expert"
    return f"""
Before it had its name, llama.cpp ({proof.version}) loaded it:

- {proof.num_texts} texts of {proof.num_text_characters:,} characters have equal token ids;
{chats}- logarithms of all tokens' likelihoods at {proof.num_likelihoods} places {near};
- {proof.num_greedy_tokens} of {proof.num_greedy_compared} greedy tokens are equal.
"""

"""The README.md of an export, and notes about its readers."""

from collections.abc import Mapping, Sequence

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import num_active_parameters, num_parameters
from llmtrain.interop.proof import Proof

_CTRANSLATE2_ORIGINAL = 8192


def reader_notes(model: ModelConfig) -> list[str]:
    """A line for each reader that would compute something else without a word: it has no key for it, or ignores it.

    docs/clients.md says with which versions this was seen.
    """
    scaling = model.rope_scaling
    own_factor = scaling is not None and scaling.kind == "yarn" and scaling.attention_factor is not None
    checks = (
        (model.attention.kind == "sliding_window", "llama.cpp ignores sliding_window: right up to so many tokens"),
        (own_factor, "llama.cpp multiplies attention_factor with one of its own: not right there"),
        (
            scaling is not None and scaling.kind == "llama3" and scaling.original_max_seq_len != _CTRANSLATE2_ORIGINAL,
            f"CTranslate2 takes original_max_position_embeddings for {_CTRANSLATE2_ORIGINAL}: not right there",
        ),
        (
            model.family == "encoder_decoder" and model.moe is None and model.tie_embeddings and not model.scaled_head,
            "transformers 4 and CTranslate2 scale the logits of every tied head: right when greedy, not when sampling",
        ),
    )
    return [note for holds, note in checks if holds]


_KINDS = {
    "decoder": ("A causal language model", "text-generation"),
    "encoder": ("A masked language model", "fill-mask"),
    "encoder_decoder": ("An encoder and a decoder", "text2text-generation"),
}

_DECODER = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))"""

_ENCODER = """from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder)
inputs = tokenizer(f"def {{tokenizer.mask_token}}(", return_tensors="pt")
place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
print(tokenizer.decode(model(**inputs).logits[0, place].argmax()))"""

_ENCODER_DECODER = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
inputs = tokenizer("def <extra_id_0>(self):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""

_CHAT = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "Hello."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=50)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))"""

_USES = {"decoder": _DECODER, "encoder": _ENCODER, "encoder_decoder": _ENCODER_DECODER}

MOST_LABELS_SHOWN = 20

_LABELS = """from transformers import pipeline

print(pipeline("{task}", model="{name}")({call}))"""

_LABEL_KINDS = {
    "classifier": ("A classifier of texts", "text-classification", '"def main("'),
    "token_classifier": ("A classifier of words", "token-classification", '"def main("'),
    "span": ("A finder of answers", "question-answering", 'question="What?", context="def main("'),
}
"""By model.head."""

_SPECIAL = {
    "decoder": "A text that spells the end token or padding is taken for it; in training it was ordinary text, which\n"
    "`tokenizer(text, split_special_tokens=True)` gives.",
    "encoder": "A mask, and other special tokens, can be spelled in a text.",
    "encoder_decoder": "Sentinels (`<extra_id_0>`), and other special tokens, can be spelled in a text.",
}


def model_card(name: str, model: ModelConfig, facts: Mapping[str, str], notes: Sequence[str], proof: Proof) -> str:
    """Markdown that names no path of the machine that it was made on.

    `facts` are told as they are; `notes` say what of the model this format does not hold.
    """
    title, tag, use, proved = _kind(model, name, proof)
    rows = "\n".join(f"| {label} | {value} |" for label, value in {**model_sizes(model), **facts}.items())
    missing = "".join(f"\n- {note}" for note in notes)
    missing = (
        f"\n## Not in this format\n\nSettings of the training that have no place here:\n{missing}\n" if notes else ""
    )
    other = "".join(f"\n- {note}" for note in reader_notes(model))
    readers = f"\n## Other readers\n{other}\n" if other else ""
    texts = (
        f"{proof.num_text_characters:,} characters of text have equal token ids, alone and as `tokenizer(text)` gives"
    )
    texts += " them"
    if proof.num_chats:
        texts += f";\n- {proof.num_chats} conversations have equal token ids with `apply_chat_template`"
    return f"""---
library_name: transformers
pipeline_tag: {tag}
tags: [llmtrain]
---

# {name}

{title}, trained with llmtrain.

| | |
|---|---|
{rows}

## Use

```python
{use}
```

{_SPECIAL[model.family]}
{missing}{readers}
## Checked

{_checked(proof, proved)}
- {texts}.
"""


def _checked(proof: Proof, proved: str) -> str:
    """The lines about the comparison of models."""
    if proof.unread is not None:
        return f"Before this folder was given its name, llmtrain read it again; transformers did not: {proof.unread}.\n"
    compared = "as a whole"
    if proof.num_parts > 1:
        compared = f"in {proof.num_parts} parts: some of the layers at a time, between the embeddings and the head"
    lines = [
        "Before this folder was given its name, transformers loaded it, and it was compared with the trained model",
        f"{compared}:\n",
        f"- {proof.num_tokens:,} positions: logits in fp32 differ by at most {proof.max_difference:.2e};",
    ]
    return "\n".join(
        [*lines, *([f"- {proof.num_greedy_tokens} {proved} are equal;"] if proof.num_greedy_tokens else [])]
    )


def _kind(model: ModelConfig, name: str, proof: Proof) -> tuple[str, str, str, str]:
    """(title, tag, example of use, what of it was compared beside logits)."""
    if model.predicts_labels:
        title, task, call = _LABEL_KINDS[model.head]
        return title, task, _LABELS.format(task=task, name=name, call=call), "best labels"
    title, tag = _KINDS[model.family]
    proved = "best fillings of masks" if model.family == "encoder" else "greedy tokens"
    use = _CHAT if proof.num_chats else _USES[model.family]
    return title, tag, use.format(name=name), proved


def model_sizes(model: ModelConfig) -> dict[str, str]:
    """Rows of a card: how large a model is."""
    layers = str(model.num_layers)
    if model.family == "encoder_decoder":
        layers = f"{model.encoder_layers} of the encoder, {model.decoder_layers} of the decoder"
    found = {"Parameters": f"{num_parameters(model):,}"}
    if model.labels is not None:
        shown = ", ".join(f"`{label}`" for label in model.labels[:MOST_LABELS_SHOWN])
        found["Labels"] = f"{shown}, and more: {len(model.labels)}" if len(model.labels) > MOST_LABELS_SHOWN else shown
    if model.moe is not None:
        found["Active parameters"] = f"{num_active_parameters(model):,}"
        found["Experts"] = f"{model.moe.num_experts} in every layer that has some"
    return found | {
        "Layers": layers,
        "Width": f"{model.hidden_size:,}",
        "Heads": f"{model.num_heads}, for keys and values {model.kv_heads}",
        "Longest sequence": f"{model.max_seq_len:,} tokens",
        "Vocabulary": f"{model.vocabulary:,} tokens",
    }

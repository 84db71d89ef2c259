"""The proof that an exported folder is the model: transformers loads it and computes the same numbers.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llmtrain.errors import ExportError
from llmtrain.interop.tokenizer_json import TextTokenizer

Logits = Callable[[Tensor], Tensor]
"""[B, S] token ids to [B, S, V] logits in fp32."""

TOLERANCE = 1e-4
NUM_GREEDY = 32
_NUM_WINDOWS = 4
_WINDOW = 128
_NUM_FILES = 20
_FILE_CHARACTERS = 10_000

HARD_TEXTS = (
    "",
    " ",
    "   \t\t  \t ",
    " " * 101 + "x" + "\n" * 7,
    "\r\nline\r\n\r\n\tend\r",
    "😀 👨‍👩‍👧 é̀ ß 中文字 \u00a0\u2028\ufeff\ufffd",
    "a\0b",
    "\u2581\u2581 a\u2581b",
    "<s> x<s>y</s><pad><unk><mask><cls><sep> <|endoftext|>",
    "<0x41><0x0A>",
)


@dataclass(frozen=True)
class Proof:
    """What was compared and how far apart it was."""

    max_difference: float
    """Largest difference of two logits, in fp32."""
    num_tokens: int
    num_greedy_tokens: int
    num_text_characters: int


def prove(folder: Path, logits: Logits, tokenizer: TextTokenizer, texts: Sequence[str] = ()) -> Proof:
    """Load a folder with transformers and compare it with our model and tokenizer.

    `texts` are what is tokenized; real text of this machine where there are none. Raises ExportError that says what
    differs.
    """
    texts = texts or real_texts()
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    token_ids = _compare_tokenizers(exported, tokenizer, texts)
    model = _load_model(folder)
    length = min(_WINDOW, model.config.max_position_embeddings)
    windows = [token_ids[start : start + length] for start in range(0, len(token_ids) - length + 1, length)]
    if not windows:
        raise ExportError(f"The texts to compare on have {len(token_ids)} tokens: give at least {length}.")
    tokens_BS = torch.tensor(windows[:_NUM_WINDOWS])
    if int(tokens_BS.max()) >= model.config.vocab_size:
        raise ExportError(
            f"The tokenizer gives the id {int(tokens_BS.max())}, the model has {model.config.vocab_size} tokens: "
            "it was trained with another tokenizer. Name that one."
        )
    difference = _compare_logits(model, logits, tokens_BS)
    prompt = windows[0][: max(1, min(16, length - NUM_GREEDY))]
    num_greedy = min(NUM_GREEDY, model.config.max_position_embeddings - len(prompt))
    _compare_greedy(model, logits, prompt, num_greedy)
    return Proof(difference, tokens_BS.numel(), num_greedy, sum(map(len, texts)))


def real_texts() -> list[str]:
    """Text that every machine with Python has: sources of its standard library; and text that is hard to tokenize."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text("utf-8", "replace")[:_FILE_CHARACTERS] for path in islice(sources, _NUM_FILES)]
    return texts + list(HARD_TEXTS)


def _load_model(folder: Path) -> Any:
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    model, report = loaded
    if wrong := {kind: sorted(map(str, found)) for kind, found in report.items() if found}:
        raise ExportError(f"transformers does not find exactly the tensors that it expects: {wrong}")
    model.eval()
    # Greedy tokens are compared past the end of a text too.
    model.generation_config.eos_token_id = None
    return model


def _compare_tokenizers(exported: Any, tokenizer: TextTokenizer, texts: Sequence[str]) -> list[int]:
    """All ids of the texts, once both sides agree on them and on the text of them."""
    all_ids: list[int] = []
    for text in texts:
        expected = tokenizer.encode(text)
        actual = exported.encode(text, add_special_tokens=False, verbose=False)
        if actual != expected:
            pairs = enumerate(zip(expected, actual, strict=False))
            place = next((i for i, (one, other) in pairs if one != other), min(len(expected), len(actual)))
            before = tokenizer.decode(expected[max(0, place - 8) : place])
            raise ExportError(
                f"The exported tokenizer differs at token {place}, after {before[-60:]!r}: "
                f"trained with {expected[place : place + 6]}, exported {actual[place : place + 6]}. {_LIKELY_CAUSE}"
            )
        expected_text, actual_text = tokenizer.decode(expected), exported.decode(actual, skip_special_tokens=True)
        if actual_text != expected_text:
            raise ExportError(
                f"The exported tokenizer decodes to {actual_text[:80]!r} what is {expected_text[:80]!r} for ours."
            )
        all_ids += expected
    return all_ids


_LIKELY_CAUSE = (
    "A unigram model with scores that are not multiples of a power of two rounds differently in the two libraries: "
    "train the tokenizer again with `llmtrain data tokenizer`, or as bpe."
)


@torch.no_grad()
def _compare_logits(model: Any, logits: Logits, tokens_BS: Tensor) -> float:
    ours_BSV, theirs_BSV = logits(tokens_BS).cpu(), model(tokens_BS).logits
    if ours_BSV.shape != theirs_BSV.shape:
        raise ExportError(f"Logits have the shape {list(ours_BSV.shape)} here and {list(theirs_BSV.shape)} there.")
    apart_BSV = (ours_BSV - theirs_BSV).abs()
    difference = float(apart_BSV.max())
    if not difference <= TOLERANCE:  # a NaN fails too
        where = int(apart_BSV.nan_to_num(nan=torch.inf).amax((0, 2)).argmax())
        raise ExportError(
            f"The exported model computes other logits: they differ by up to {difference:.3g}, most at position "
            f"{where}; at most {TOLERANCE:g} is allowed. The export would be another model than the trained one."
        )
    return difference


@torch.no_grad()
def _compare_greedy(model: Any, logits: Logits, prompt: Sequence[int], count: int) -> None:
    prompt_BS = torch.tensor([list(prompt)])
    ours_BS = prompt_BS
    for _ in range(count):
        token = logits(ours_BS)[:, -1:].argmax(-1).cpu()
        ours_BS = torch.cat((ours_BS, token), dim=1)
    theirs_BS = model.generate(
        prompt_BS, attention_mask=torch.ones_like(prompt_BS), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    if not torch.equal(ours_BS, theirs_BS):
        raise ExportError(
            f"Greedy continuations differ: ours {ours_BS[0, len(prompt) :].tolist()}, "
            f"exported {theirs_BS[0, len(prompt) :].tolist()}."
        )

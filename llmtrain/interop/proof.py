"""The proof that an exported folder is the model: transformers loads it and computes the same numbers.

Shape suffixes: B batch, S sequence, T the encoder's sequence, V vocabulary.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ExportError
from llmtrain.interop.examples import Example, ExampleTokens, Logits, build_example
from llmtrain.interop.families.label_heads import AUTO_CLASSES as LABEL_CLASSES
from llmtrain.interop.text.proof import NUM_GREEDY, Prompt

AUTO_CLASSES: dict[str, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}
"""By `model.family`."""

TOLERANCE = 1e-4
"""For logits of usual size; where the largest is beyond 10, fp32 itself is as much coarser."""
ROUNDED_SHARE = 0.5
"""Where activations are rounded on the way, the last bit of one decides which number it becomes, so that two programs
differ. They do by less than this share of what the rounding changes, in the root of the mean square of logits."""

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
class Agreement:
    """The distance between a model and its export, and the size of the comparison."""

    max_difference: float
    """Largest difference of two logits, in fp32."""
    num_tokens: int
    num_greedy_tokens: int
    """Equal tokens of a greedy continuation; of an encoder, equal best fillings of masks; equal best labels."""


@dataclass(frozen=True)
class Proof:
    """The sums over all comparisons.

    `num_parts` is 1 where the model was compared as a whole, else the number of its parts, each with some of the
    layers.
    """

    max_difference: float
    num_tokens: int
    num_greedy_tokens: int
    num_text_characters: int
    num_parts: int = 1
    num_chats: int = 0
    """Conversations that transformers gives the ids of training."""
    unread: str | None = None
    """Why models were not compared: transformers could not be asked to read the folder."""

    @staticmethod
    def of(agreements: Sequence[Agreement], num_text_characters: int) -> "Proof":
        """The proof of all parts together."""
        return Proof(
            max(found.max_difference for found in agreements),
            sum(found.num_tokens for found in agreements),
            sum(found.num_greedy_tokens for found in agreements),
            num_text_characters,
            len(agreements),
        )


def real_texts() -> list[str]:
    """Text that every machine with Python has: sources of its standard library; and text that is hard to tokenize."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text("utf-8", "replace")[:_FILE_CHARACTERS] for path in islice(sources, _NUM_FILES)]
    return texts + list(HARD_TEXTS)


@dataclass(frozen=True)
class Question:
    """The input of a comparison: ids of real text, the special tokens of examples, and what is gone on from."""

    token_ids: Sequence[int]
    tokens: ExampleTokens
    prompt: Prompt


def compare_models(
    folder: Path, model: ModelConfig, ours: Logits, asked: Question, unrounded: Logits | None = None
) -> Agreement:
    """Load a folder with transformers and compare it with our model. Raises ExportError that says what differs.

    `unrounded` is our model without the rounding of activations, where it rounds some.
    """
    example = build_example(model, asked.token_ids, asked.tokens)
    theirs = load_theirs(folder, model)
    if unrounded is not None:
        return _compare_rounded(theirs, ours, unrounded, example)
    if model.predicts_labels:
        return _compare_labels(theirs, ours, example)
    difference = _compare_logits(theirs, ours, example)
    if model.family == "encoder":
        num_greedy = _compare_fillings(theirs, ours, example, asked.tokens.mask_id)
    else:
        num_greedy = _compare_greedy(theirs, model, ours, asked)
    return Agreement(difference, _num_valid(example), num_greedy)


def _num_valid(example: Example) -> int:
    return example.tokens_BS.numel() if example.valid_BS is None else int(example.valid_BS.sum())


def load_theirs(folder: Path, model: ModelConfig) -> Any:
    """transformers' model of a folder, in fp32. Raises ExportError where it misses tensors or knows more."""
    auto_class = LABEL_CLASSES[model.head] if model.predicts_labels else AUTO_CLASSES[model.family]
    with _quiet():
        loaded: Any = auto_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    theirs, report = loaded
    if wrong := {kind: sorted(map(str, found)) for kind, found in report.items() if found}:
        raise ExportError(f"transformers does not find exactly the tensors that it expects: {wrong}")
    # Experts that were quantized come in the type of their scales, whatever is asked for. Its own `float` refuses that.
    nn.Module.float(theirs).eval()
    if model.family != "encoder" and not model.predicts_labels:
        # The likeliest tokens are compared, past the end of a text too, whatever a folder says of penalties.
        theirs.generation_config = GenerationConfig()
    return theirs


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and warnings, and whatever the packages beside it write: what matters of a
    load is in its report."""
    shows_progress, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):  # compressed-tensors has bars of its own, and no switch for them
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def their_inputs(example: Example) -> dict[str, Tensor | None]:
    """An example as transformers' models take it."""
    if example.encoder_tokens_BT is None:
        types = {} if example.types_BS is None else {"token_type_ids": example.types_BS}
        return {"input_ids": example.tokens_BS, "attention_mask": _mask(example.valid_BS), **types}
    return {
        "input_ids": example.encoder_tokens_BT,
        "attention_mask": _mask(example.encoder_valid_BT),
        "decoder_input_ids": example.tokens_BS,
        "decoder_attention_mask": _mask(example.valid_BS),
    }


def _mask(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.long()


@torch.no_grad()
def _compare_labels(theirs: Any, ours: Logits, example: Example) -> Agreement:
    """Of a head for labels: of samples, or of all positions that are no padding. The best labels are equal, too."""
    assert example.valid_BS is not None
    ours_BL, theirs_BL = ours(example).cpu(), _logits_of(theirs, example)
    valid = example.valid_BS if theirs_BL.dim() == 3 else torch.ones(len(theirs_BL), dtype=torch.bool)
    difference = _difference(ours_BL, theirs_BL, valid)
    num_wrong = int((ours_BL.argmax(-1) != theirs_BL.argmax(-1))[valid].sum())
    if num_wrong:
        raise ExportError(f"The best labels of {num_wrong} of {int(valid.sum())} differ.")
    return Agreement(difference, int(example.valid_BS.sum()), int(valid.sum()))


@torch.no_grad()
def _compare_rounded(theirs: Any, ours: Logits, unrounded: Logits, example: Example) -> Agreement:
    """Our rounding of activations is theirs: with it we are much nearer to them than without."""
    theirs_BSV = _logits_of(theirs, example)
    by_sample = theirs_BSV.dim() == 2
    valid = slice(None) if example.valid_BS is None or by_sample else example.valid_BS
    with_it, without = (logits(example).cpu()[valid] - theirs_BSV[valid] for logits in (ours, unrounded))
    error, rounding = float(with_it.square().mean().sqrt()), float(without.square().mean().sqrt())
    if not error <= ROUNDED_SHARE * rounding:  # a NaN fails too
        raise ExportError(
            f"The exported model computes other logits: they differ by {error:.3g} in the mean, where the rounding of "
            f"activations makes {rounding:.3g}. The export would be another model than the trained one."
        )
    return Agreement(float(with_it.abs().max()), _num_valid(example), 0)


def _logits_of(theirs: Any, example: Example) -> Tensor:
    """Their logits; those of begins and ends of answers side by side."""
    with _quiet():  # compressed-tensors undoes its form in the first pass, with a bar
        output = theirs(**their_inputs(example))
    return torch.stack((output.start_logits, output.end_logits), -1) if "start_logits" in output else output.logits


@torch.no_grad()
def _compare_logits(theirs: Any, ours: Logits, example: Example) -> float:
    return _difference(ours(example).cpu(), _logits_of(theirs, example), example.valid_BS)


def _difference(ours_BSV: Tensor, theirs_BSV: Tensor, valid_BS: Tensor | None) -> float:
    if ours_BSV.shape != theirs_BSV.shape:
        raise ExportError(f"Logits have the shape {list(ours_BSV.shape)} here and {list(theirs_BSV.shape)} there.")
    apart_BS = (ours_BSV - theirs_BSV).abs().amax(-1)
    if valid_BS is not None:
        apart_BS = apart_BS.masked_fill(~valid_BS, 0.0)
    difference = float(apart_BS.max())
    allowed = TOLERANCE * max(1.0, float(theirs_BSV.abs().max()) / 10)
    if not difference <= allowed:  # a NaN fails too
        where = int(apart_BS.nan_to_num(nan=torch.inf).amax(0).argmax())
        raise ExportError(
            f"The exported model computes other logits: they differ by up to {difference:.3g}, most at position "
            f"{where}; at most {allowed:.3g} is allowed. The export would be another model than the trained one."
        )
    return difference


@torch.no_grad()
def _compare_fillings(theirs: Any, ours: Logits, example: Example, mask_id: int | None) -> int:
    """The number of masks whose best filling is the same."""
    assert example.valid_BS is not None
    masked_BS = example.valid_BS if mask_id is None else example.valid_BS & (example.tokens_BS == mask_id)
    best_BS, their_best_BS = ours(example).cpu().argmax(-1), theirs(**their_inputs(example)).logits.argmax(-1)
    if num_wrong := int(((best_BS != their_best_BS) & masked_BS).sum()):
        raise ExportError(f"The best fillings of {num_wrong} of {int(masked_BS.sum())} masks differ.")
    return int(masked_BS.sum())


@torch.no_grad()
def _compare_greedy(theirs: Any, model: ModelConfig, ours: Logits, asked: Question) -> int:
    """The number of tokens that are the same after a prompt, or after an encoder's input: ours after the ids that
    training gives it, theirs after what their tokenizer makes of the same string."""
    prompt, tokens = asked.prompt, asked.tokens
    prompt_BS = torch.tensor([list(prompt.ids)])
    with_encoder = model.family == "encoder_decoder"
    begin_BS = torch.tensor([[tokens.start_id]]) if with_encoder else prompt_BS
    count = min(NUM_GREEDY, model.max_seq_len - begin_BS.shape[1])
    ours_BS = begin_BS
    for _ in range(count):
        example = Example(ours_BS, encoder_tokens_BT=prompt_BS if with_encoder else None)
        ours_BS = torch.cat((ours_BS, ours(example)[:, -1:].argmax(-1).cpu()), dim=1)
    start = {"decoder_start_token_id": tokens.start_id} if with_encoder else {}
    theirs_BS = theirs.generate(
        **prompt.inputs,
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=tokens.pad_id,
        **start,
    )
    if not torch.equal(ours_BS, theirs_BS):
        raise ExportError(
            f"Greedy continuations differ: ours {ours_BS[0, begin_BS.shape[1] :].tolist()}, "
            f"exported {theirs_BS[0, begin_BS.shape[1] :].tolist()}."
        )
    return count

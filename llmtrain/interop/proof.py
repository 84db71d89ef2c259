"""The proof that an exported folder is the model: transformers loads it and computes the same numbers.

Shape suffixes: B batch, S sequence, T the encoder's sequence, V vocabulary.
"""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
from llmtrain.interop.name_table import Pairing, ReadTensor, Table, pairings
from llmtrain.interop.text.proof import NUM_GREEDY, Prompt

AUTO_CLASSES: dict[str, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}
"""By `model.family`."""

TOLERANCE = 1e-4
"""For logits of usual size; where the largest is beyond 10, fp32 itself is as much coarser."""

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


def compare_models(
    folder: Path, model: ModelConfig, ours: Logits, token_ids: Sequence[int], tokens: ExampleTokens, prompt: Prompt
) -> Agreement:
    """Load a folder with transformers and compare it with our model. Raises ExportError that says what differs."""
    example = build_example(model, token_ids, tokens)
    theirs = load_theirs(folder, model)
    if model.predicts_labels:
        return _compare_labels(theirs, ours, example)
    difference = _compare_logits(theirs, ours, example)
    if model.family == "encoder":
        num_greedy = _compare_fillings(theirs, ours, example, tokens.mask_id)
    else:
        num_greedy = _compare_greedy(theirs, model, ours, prompt, tokens)
    valid = example.valid_BS
    return Agreement(difference, example.tokens_BS.numel() if valid is None else int(valid.sum()), num_greedy)


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
    theirs.eval()
    if model.family != "encoder" and not model.predicts_labels:
        # The likeliest tokens are compared, past the end of a text too, whatever a folder says of penalties.
        theirs.generation_config = GenerationConfig()
    return theirs


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and warnings: what matters of a load is in its report."""
    shows_progress, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
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
    ours_BL, output = ours(example).cpu(), theirs(**their_inputs(example))
    theirs_BL = torch.stack((output.start_logits, output.end_logits), -1) if "start_logits" in output else output.logits
    valid = example.valid_BS if theirs_BL.dim() == 3 else torch.ones(len(theirs_BL), dtype=torch.bool)
    difference = _difference(ours_BL, theirs_BL, valid)
    num_wrong = int((ours_BL.argmax(-1) != theirs_BL.argmax(-1))[valid].sum())
    if num_wrong:
        raise ExportError(f"The best labels of {num_wrong} of {int(valid.sum())} differ.")
    return Agreement(difference, int(example.valid_BS.sum()), int(valid.sum()))


@torch.no_grad()
def _compare_logits(theirs: Any, ours: Logits, example: Example) -> float:
    return _difference(ours(example).cpu(), theirs(**their_inputs(example)).logits, example.valid_BS)


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
def _compare_greedy(theirs: Any, model: ModelConfig, ours: Logits, prompt: Prompt, tokens: ExampleTokens) -> int:
    """The number of tokens that are the same after a prompt, or after an encoder's input: ours after the ids that
    training gives it, theirs after what their tokenizer makes of the same string."""
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


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of each stack as a model of their own; `first` is the number of the first in the whole.

    A proof for every group is one for the whole: each layer, the embeddings and the head have then computed the same.
    """

    model: ModelConfig
    first: dict[str, int]

    def names(self, table: Table, whole: ModelConfig) -> Iterator[tuple[Pairing, Pairing]]:
        """Each tensor of the part, and the same one in the whole model."""
        sizes = {"encoder": self.model.encoder_layers, "decoder": self.model.decoder_layers}
        chosen = (
            pairing
            for pairing in pairings(table, whole)
            if not pairing.stack or 0 <= pairing.layer - self.first[pairing.stack] < sizes[pairing.stack]
        )
        yield from zip(pairings(table, self.model), chosen, strict=True)

    def reader(self, table: Table, whole: ModelConfig, read: ReadTensor) -> ReadTensor:
        """Reads tensors of the whole model by the part's names."""
        names = {
            name: original
            for part, full in self.names(table, whole)
            for name, original in zip(part.ours, full.ours, strict=True)
        }
        return lambda name, expert=None: read(names[name], expert)

    def their_tensors(
        self, table: Table, whole: ModelConfig, stored: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The part's tensors under transformers' names, from those that are stored of the whole model."""
        for part, full in self.names(table, whole):
            originals = (full.theirs, *full.written_copies)
            for name, original in zip((part.theirs, *part.written_copies), originals, strict=True):
                yield name, stored(original)


def layer_parts(model: ModelConfig) -> list[LayerGroup]:
    """As few layers at a time as keep the order of layers with and without experts."""
    period = model.moe.every_n_layers if model.moe else 1
    stacks = {"encoder": model.encoder_layers, "decoder": model.decoder_layers}
    counts = {stack: -(-layers // period) for stack, layers in stacks.items()}
    main = "encoder" if model.family == "encoder" else "decoder"
    parts = []
    for number in range(max(counts.values())):
        # The shorter stack stays with its last layers.
        first = {stack: period * max(0, min(number, count - 1)) for stack, count in counts.items()}
        sizes = {stack: min(period, layers - first[stack]) for stack, layers in stacks.items()}
        changed = {"num_layers": sizes[main]}
        if model.family == "encoder_decoder":
            changed["num_encoder_layers"] = sizes["encoder"]
        parts.append(LayerGroup(model.with_keys(changed), first))
    return parts

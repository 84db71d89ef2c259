"""Text from a model, one token at a time, with a cache of keys and values; and of an encoder, fillings of masks.

Shape suffixes: B batch, S sequence, T the encoder's sequence, V vocabulary.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.infer.chat import chat_prompt
from llmtrain.infer.model import TrainedModel
from llmtrain.infer.tokenizer import model_tokenizer
from llmtrain.interop.text.special_tokens import NamedTokens, named_tokens
from llmtrain.models.stack import Pass, build_caches
from llmtrain.models.transformer import Transformer, counted_positions
from llmtrain.values.batch import ModelInputs
from llmtrain.values.tokenizer import Tokenizer

LEAST_TEMPERATURE = 1e-6
"""Logits that are divided by less leave the range of their type."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else drawn from what top_k and top_p leave.

    `top_k` 0 and `top_p` 1 leave everything. Raises ConfigError for values outside their ranges.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = f"0 (greedy), or {LEAST_TEMPERATURE:g} or more"
        ranges = (
            ("temperature", self.temperature, self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE, allowed),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
        )
        faults = [f"--{name} {value}: must be {allowed}." for name, value, legal, allowed in ranges if not legal]
        if faults:
            raise ConfigError("\n".join(faults))


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token. top_p keeps the fewest likeliest tokens with that much probability (Holtzman et al. 2020)."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = (logits_V.float() / sampling.temperature).softmax(-1).sort(descending=True)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        before[0] = -1  # the likeliest token stays, however small top_p is
        probabilities[before >= sampling.top_p * probabilities.sum()] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def iter_tokens(
    model: Transformer, prompt: Sequence[int], sampling: Sampling, max_tokens: int, start_id: int | None = None
) -> Iterator[int]:
    """Up to `max_tokens` new tokens after the prompt; ends earlier where the model's longest sequence is reached.

    Of an encoder-decoder the prompt is the encoder's input, and the decoder begins with `start_id`. The caller stops at
    an end-of-text token by no longer asking. Raises ConfigError for a prompt that is empty or leaves no room.
    """
    device = next(model.parameters()).device
    if model.config.family == "encoder":
        raise ConfigError("An encoder cannot continue a text: it fills masks. Put the mask's name into the prompt.")
    if model.config.family == "encoder_decoder":
        assert start_id is not None, "a decoder behind an encoder begins with something"
        _require_length(prompt, model.config.max_seq_len + 1, "at most", model.config.max_seq_len)
        encoder_BT, prompt = torch.tensor([list(prompt)], device=device), [start_id]
        memory_TBH = model.encode(ModelInputs(encoder_BT, encoder_BT, encoder_tokens_BT=encoder_BT), Pass())[0]
    else:
        memory_TBH = None
        _require_length(prompt, model.config.max_seq_len, "fewer than", model.config.max_seq_len)
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    length = min(model.config.max_seq_len, len(prompt) + max_tokens)
    caches = build_caches(model.config, length)
    tokens_BS = torch.tensor([list(prompt)], device=device)
    for start in range(len(prompt), length):
        positions_BS = torch.arange(start - tokens_BS.shape[1], start, device=device)[None]
        hidden_SBH, _ = model(ModelInputs(tokens_BS, positions_BS), caches=caches, memory_TBH=memory_TBH)
        # The host waits for each token: it may be the last one, and it is the next input.
        token = choose(model.logits(hidden_SBH[-1:])[0, -1], sampling, generator)
        yield token
        tokens_BS = torch.tensor([[token]], device=device)


def _require_length(prompt: Sequence[int], end: int, bound: str, number: int) -> None:
    if not 0 < len(prompt) < end:
        raise ConfigError(
            f"The prompt has {len(prompt)} tokens: give it at least 1 and {bound} {number} (model.max_seq_len)."
        )


@dataclass(frozen=True)
class Filling:
    """An encoder's tokens for one mask with their probabilities, the likeliest first."""

    position: int
    tokens: list[tuple[int, float]]


@torch.no_grad()
def fill_masks(model: Transformer, tokens: Sequence[int], mask_id: int, count: int) -> list[Filling]:
    """The `count` best fillings of each mask. Raises ConfigError for tokens without a mask, or too many of them."""
    _require_length(tokens, model.config.max_seq_len + 1, "at most", model.config.max_seq_len)
    if mask_id not in tokens:
        raise ConfigError("The prompt has no mask to fill.")
    tokens_BS = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    hidden_SBH, _ = model(ModelInputs(tokens_BS, counted_positions(tokens_BS)))
    # The host waits for the device at the first mask below.
    best_SK = model.logits(hidden_SBH)[0].softmax(-1).topk(min(count, model.config.vocabulary))
    return [
        Filling(at, list(zip(best_SK.indices[at].tolist(), best_SK.values[at].tolist(), strict=True)))
        for at, token in enumerate(tokens)
        if token == mask_id
    ]


def encode_with_names(text: str, tokenizer: Tokenizer, names: Mapping[str, int]) -> list[int]:
    """The ids of a text, in which these names stand for tokens that ordinary text never gives."""
    if not names:
        return tokenizer.encode(text)
    cut = re.split("|".join(f"({re.escape(name)})" for name in sorted(names, key=len, reverse=True)), text)
    ids: list[int] = []
    for part in filter(None, cut):
        ids += [names[part]] if part in names else tokenizer.encode(part)
    return ids


def decode_with_names(ids: Sequence[int], tokenizer: Tokenizer, names: Mapping[str, int]) -> str:
    """The text of ids, named tokens spelled out."""
    spelled = {token: name for name, token in names.items()}
    text, run = "", list[int]()
    for token in ids:
        if token in spelled:
            text += (tokenizer.decode(run) if run else "") + spelled[token]
            run = []
        else:
            run.append(token)
    return text + (tokenizer.decode(run) if run else "")


NUM_FILLINGS = 5


@dataclass(frozen=True)
class Asked:
    """A prompt: a text to continue or to fill, or with `chat` what a user says, behind the messages of a JSON file."""

    text: str
    chat: bool = False
    earlier: Path | None = None


def answer_of(
    trained: TrainedModel, asked: Asked, sampling: Sampling, max_tokens: int, tokenizer: Path | None = None
) -> Iterator[str]:
    """The pieces of the text: a continuation, an answer, or of an encoder the fillings of each mask.

    `tokenizer` takes the place of the one beside the model. Raises ConfigError where there is none, or no mask.
    """
    model = trained.model
    if model.config.predicts_labels:
        raise ConfigError(
            f"model.head = {model.config.head}: the model says what a text is, and does not write any. Export it, and "
            "ask the pipeline that the export's README.md shows."
        )
    text = model_tokenizer(tokenizer, trained.tokenizer_path, model.config, trained.tokens)
    named = named_tokens(text, trained.data)
    if asked.chat and model.config.family != "decoder":
        raise ConfigError(f"--chat: goes with a decoder, and the model is an {model.config.family}.")
    if asked.chat:
        prompt_ids = chat_prompt(text, asked.text, asked.earlier)
        yield from _continuation(model, text, named, prompt_ids, (sampling, max_tokens))
    elif model.config.family == "encoder":
        yield from _fillings(model, text, named, asked.text, sampling.top_k or NUM_FILLINGS)
    else:
        before, behind = named.frame(model.config.family)
        prompt_ids = [*before, *encode_with_names(asked.text, text, named.sentinels), *behind]
        yield from _continuation(model, text, named, prompt_ids, (sampling, max_tokens))


def _continuation(
    model: Transformer, text: Tokenizer, named: NamedTokens, prompt_ids: Sequence[int], how: tuple[Sampling, int]
) -> Iterator[str]:
    names = named.sentinels
    # The places of a soft prompt: the model replaces their embeddings.
    prompt_ids = [*[0] * model.prompt_tokens, *prompt_ids]
    ids: list[int] = []
    shown = ""
    tokens = iter_tokens(model, prompt_ids, *how, named.start_id)
    for token in takewhile(lambda token: token not in named.ends, tokens):
        ids.append(token)
        whole = decode_with_names(ids, text, names)
        # A character may span several tokens: until it is complete its bytes decode to replacement marks.
        if not whole.endswith("\ufffd"):
            yield whole[len(shown) :]
            shown = whole
    yield f"{decode_with_names(ids, text, names)[len(shown) :]}\n"


def _fillings(model: Transformer, text: Tokenizer, named: NamedTokens, prompt: str, count: int) -> Iterator[str]:
    """The best fillings of each mask: probability, then the filling as JSON, so that spaces are seen."""
    if named.mask is None:
        raise ConfigError(f"{text.path}: has no mask token, so there is nothing that an encoder could fill.")
    name, mask_id = named.mask
    if name not in prompt:
        raise ConfigError(f"--prompt: an encoder fills masks. Put {name} where a token is to be found.")
    before, behind = named.around
    before = named.bos_ids or before
    ids = [*[0] * model.prompt_tokens, *before, *encode_with_names(prompt, text, {name: mask_id}), *behind]
    for number, filling in enumerate(fill_masks(model, ids, mask_id, count)):
        yield f"{name} {number + 1}\n"
        for token, probability in filling.tokens:
            yield f"  {probability:.4f}  {json.dumps(text.decode([token]), ensure_ascii=False)}\n"

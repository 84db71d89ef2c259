"""A trained model's answer to a prompt, as text that grows."""

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from llmtrain.errors import ConfigError
from llmtrain.infer.generate import Sampling, fill_masks, iter_tokens
from llmtrain.infer.model import TrainedModel
from llmtrain.infer.prompts import decode_with_names, encode_with_names
from llmtrain.infer.tokenizer import model_tokenizer
from llmtrain.interop.text.special_tokens import NamedTokens, named_tokens
from llmtrain.models.transformer import Transformer
from llmtrain.values.tokenizer import Tokenizer

NUM_FILLINGS = 5


def answer_of(
    trained: TrainedModel, prompt: str, sampling: Sampling, max_tokens: int, tokenizer: Path | None = None
) -> Iterator[str]:
    """The pieces of the text: a continuation, or of an encoder the fillings of each mask.

    `tokenizer` takes the place of the one beside the model. Raises ConfigError where there is none, or no mask.
    """
    model = trained.model
    text = model_tokenizer(tokenizer, trained.tokenizer_path, model.config, trained.tokens)
    named = named_tokens(text, trained.data)
    if model.config.family == "encoder":
        yield from _fillings(model, text, named, prompt, sampling.top_k or NUM_FILLINGS)
    else:
        yield from _continuation(model, text, named, prompt, (sampling, max_tokens))


def _continuation(
    model: Transformer, text: Tokenizer, named: NamedTokens, prompt: str, how: tuple[Sampling, int]
) -> Iterator[str]:
    names = named.sentinels
    before, behind = named.frame(model.config.family)
    prompt_ids = [*before, *encode_with_names(prompt, text, names), *behind]
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
    ids = [*before, *encode_with_names(prompt, text, {name: mask_id}), *behind]
    for number, filling in enumerate(fill_masks(model, ids, mask_id, count)):
        yield f"{name} {number + 1}\n"
        for token, probability in filling.tokens:
            yield f"  {probability:.4f}  {json.dumps(text.decode([token]), ensure_ascii=False)}\n"

"""Examples to compare models on: real tokens, with padding and masks where a model's kind has them.

Shape suffixes: B batch, S sequence, T the encoder's sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ExportError

NUM_SAMPLES = 4
WINDOW = 128
_MASKED_EVERY = 7


@dataclass(frozen=True)
class Example:
    """Tokens of the stack with the head, and of an encoder-decoder's encoder; `valid` is False on padding."""

    tokens_BS: Tensor
    valid_BS: Tensor | None = None
    encoder_tokens_BT: Tensor | None = None
    encoder_valid_BT: Tensor | None = None
    types_BS: Tensor | None = None
    """Where a model has token types and reads pairs of texts: the text that a token is of."""


Logits = Callable[[Example], Tensor]
"""[B, S, V] in fp32."""


@dataclass(frozen=True)
class ExampleTokens:
    """Special tokens of examples: padding, the first one of an encoder-decoder's decoder, the mask if there is one."""

    pad_id: int
    start_id: int
    mask_id: int | None = None


def build_example(model: ModelConfig, token_ids: Sequence[int], tokens: ExampleTokens) -> Example:
    """Windows of real tokens. Raises ExportError where there are too few, or ids that the model does not have."""
    length = min(WINDOW, model.max_seq_len)
    if len(token_ids) < length:
        raise ExportError(f"The texts to compare on have {len(token_ids)} tokens: give at least {length}.")
    if max(token_ids) >= model.vocabulary:
        raise ExportError(
            f"The tokenizer gives the id {max(token_ids)}, the model has {model.vocabulary} tokens: "
            "it was trained with another tokenizer. Name that one."
        )
    starts = range(0, len(token_ids) - length + 1, length)
    windows_BS = torch.tensor([list(token_ids[start : start + length]) for start in starts[: 2 * NUM_SAMPLES]])
    first_BS, second_BS = windows_BS[:NUM_SAMPLES], windows_BS[-NUM_SAMPLES:]
    if model.predicts_labels:
        types_BS = torch.zeros_like(first_BS)
        types_BS[:, length // 8 :] = 1
        return Example(*_padded(first_BS, tokens.pad_id), types_BS=types_BS if model.token_types > 1 else None)
    match model.family:
        case "decoder":
            return Example(first_BS)
        case "encoder":
            masked_BS = first_BS.clone()
            if tokens.mask_id is not None:
                masked_BS[:, ::_MASKED_EVERY] = tokens.mask_id
            return Example(*_padded(masked_BS, tokens.pad_id))
        case "encoder_decoder":
            inputs = _padded(first_BS, tokens.pad_id)
            begin_B1 = torch.full((len(second_BS), 1), tokens.start_id)
            targets_BS = torch.cat((begin_B1, second_BS[:, : max(1, length // 2 - 1)]), dim=1)
            return Example(*_padded(targets_BS, tokens.pad_id), *inputs)


def _padded(tokens_BS: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Every sample but the first loses more of its end: (tokens, valid)."""
    lengths_B = torch.tensor([max(1, tokens_BS.shape[1] * share // 4) for share in (4, 3, 2, 1)])[: len(tokens_BS)]
    valid_BS = torch.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    return tokens_BS.masked_fill(~valid_BS, pad_id), valid_BS

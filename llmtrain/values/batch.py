"""One micro-batch as tensors.

Shape suffixes: B micro-batch, S sequence, T the encoder's sequence in an encoder-decoder; of `SoftTargets` T are all
tokens of a micro-batch on this rank, K likeliest tokens.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""A position with this label is not a target: it adds neither to the loss nor to the count of valid tokens."""


PADDING = -1
"""The segment of positions that only fill a sample up: others do not see them."""

TENSORS = (
    "tokens_BS",
    "labels_BS",
    "positions_BS",
    "segments_BS",
    "prefix_B",
    "encoder_tokens_BT",
    "encoder_segments_BT",
    "token_types_BS",
    "texts_B",
)


@dataclass(frozen=True)
class SoftTargets:
    """Of each token's prediction, at the temperature, the K likeliest tokens; all others are one more class.

    `log_probs_TK` and `log_rest_T` are natural logarithms of what adds up to 1; `ids_TK` are ids of the whole
    vocabulary, each once. `weight` is the share of the divergence from them in the loss.
    """

    log_probs_TK: Tensor
    ids_TK: Tensor
    log_rest_T: Tensor
    temperature: float
    weight: float

    def chunk(self, tokens: slice) -> "SoftTargets":
        """Those of some of the tokens."""
        parts = (self.log_probs_TK[tokens], self.ids_TK[tokens], self.log_rest_T[tokens])
        return replace(self, log_probs_TK=parts[0], ids_TK=parts[1], log_rest_T=parts[2])


@dataclass(frozen=True)
class ModelInputs:
    """The input of a model: token ids, and who sees whom.

    `positions_BS` counts from 0 in every sample, or in every document where the configuration says so. `segments_BS`
    numbers the documents of a sample, PADDING for what is none; it is None where attention runs across documents and
    nothing is padding. `prefix_B` is the length of each sample's prefix, which is seen from both sides. Of an
    encoder-decoder, these are the decoder's; the encoder has `encoder_tokens_BT`, and where some are padding,
    `encoder_segments_BT`. `token_types_BS` tells the two texts of a pair apart, 0 and 1; None: all are 0.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    segments_BS: Tensor | None = None
    prefix_B: Tensor | None = None
    encoder_tokens_BT: Tensor | None = None
    encoder_segments_BT: Tensor | None = None
    token_types_BS: Tensor | None = None


@dataclass(frozen=True)
class Batch(ModelInputs):
    """A micro-batch: inputs, and the token that each position should predict.

    `labels_BS` is already shifted: position s predicts labels[:, s].
    """

    labels_BS: Tensor = field(kw_only=True)
    first_sample: int = field(default=0, kw_only=True)
    """Global number of the first sample; the others follow it, but for those that the run skips."""
    texts_B: Tensor | None = field(default=None, kw_only=True)
    """Where an evaluation tells texts apart, the number of each row's among those of the step, over all ranks."""
    num_texts: int = field(default=0, kw_only=True)
    soft: SoftTargets | None = field(default=None, kw_only=True)
    """What a teacher predicts for the positions of this rank; where there is one, on the ranks that have its head."""

    @property
    def num_valid_tokens(self) -> int:
        """Number of targets. Call on the CPU batch, before `to`: on a device it waits for the device."""
        return int((self.labels_BS != IGNORED_LABEL).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the copy does not wait where memory is pinned."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)

"""The weights that a finetuning begins with: those of its base, and drawn ones for what the base does not have."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.data.bijection import keyed_permutation
from llmtrain.models.init import InitialWeights
from llmtrain.values.fragment import Box, FragmentSource
from llmtrain.values.keyed_hash import wide_key

WORD, PROMPT = "embeddings.word.weight", "embeddings.prompt.weight"


class BaseWeights:
    """A source of fragments: each element is the base's, or a function of seed, name and index, in every layout.

    `prompt_ids` are the pieces of finetune.prompt.text. Where the vocabulary is larger than the base's, of `base_vocab`
    tokens, the rows of new tokens are drawn.
    """

    def __init__(
        self, base: FragmentSource, config: RunConfig, prompt_ids: Sequence[int] = (), base_vocab: int | None = None
    ) -> None:
        self._base = base
        grows = base_vocab is not None and config.model.vocabulary > base_vocab
        self._known_rows = base_vocab if grows else None
        declared = declare_parameters(config.model, config.finetune)
        self._growing = {name for name, parameter in declared.items() if parameter.vocabulary and grows}
        self._config = config
        self._drawn = InitialWeights(config.model, config.seed, config.finetune)
        self._prompt_ids = prompt_ids

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        found = None if name in self._growing else self._base.global_shape(name, kind)
        return self._drawn.global_shape(name, kind) if found is None else found

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        if self._base.global_shape(name, kind) is not None:
            return self._grown(name, kind, box) if name in self._growing else self._base.read(name, kind, box)
        if name == PROMPT:
            return self._prompt(kind, box)
        return self._drawn.read(name, kind, box)

    def _grown(self, name: str, kind: str, box: Box) -> Tensor:
        """Rows of the base, and behind them drawn ones."""
        assert self._known_rows is not None
        known = min(max(0, self._known_rows - box.offsets[0]), box.shape[0])
        parts = []
        if known:
            parts.append(self._base.read(name, kind, Box(box.offsets, (known, *box.shape[1:]))))
        if known < box.shape[0]:
            rest = Box((box.offsets[0] + known, *box.offsets[1:]), (box.shape[0] - known, *box.shape[1:]))
            parts.append(self._drawn.read(name, kind, rest))
        return torch.cat(parts)

    def _prompt(self, kind: str, box: Box) -> Tensor:
        """Rows of the word embedding."""
        pieces = self._pieces()
        first, columns = box.offsets[1], box.shape[1]
        rows = range(box.offsets[0], box.offsets[0] + box.shape[0])
        parts = [self._base.read(WORD, kind, Box((int(pieces[row]), first), (1, columns))) for row in rows]
        return torch.cat(parts)

    def _pieces(self) -> np.ndarray:
        """[tokens]: the piece that each position of the prompt begins as."""
        assert self._config.finetune is not None, "only a prompt asks for its pieces"
        tokens = self._config.finetune.prompt.tokens
        ids = np.array(self._prompt_ids, np.int64)
        if not len(ids):
            ids = keyed_permutation(self._config.model.vocabulary, wide_key("prompt", self._config.seed))
        return np.resize(ids, tokens)

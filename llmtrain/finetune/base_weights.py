"""The weights that a finetuning begins with: those of its base, and drawn ones for what the base does not have."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.data.bijection import keyed_permutation
from llmtrain.models.init import InitialWeights
from llmtrain.values.fragment import Box, FragmentSource
from llmtrain.values.keyed_hash import wide_key

WORD, PROMPT = "embeddings.word.weight", "embeddings.prompt.weight"


class BaseWeights:
    """A source of fragments: each element is the base's, or a function of seed, name and index, in every layout.

    `prompt_ids` are the pieces of finetune.prompt.text.
    """

    def __init__(self, base: FragmentSource, config: RunConfig, prompt_ids: Sequence[int] = ()) -> None:
        self._base = base
        self._config = config
        self._drawn = InitialWeights(config.model, config.seed, config.finetune)
        self._prompt_ids = prompt_ids

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        found = self._base.global_shape(name, kind)
        return self._drawn.global_shape(name, kind) if found is None else found

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        if self._base.global_shape(name, kind) is not None:
            return self._base.read(name, kind, box)
        if name == PROMPT:
            return self._prompt(kind, box)
        return self._drawn.read(name, kind, box)

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

"""Defects of loading, for tests that must notice them.

Apart from the tests: a rank imports the module of the function that it is given, and need not draw pairs for it.
"""

import torch

SPOILED = "decoder.layers.1.mlp.up.weight"


def swap_two_fragments() -> None:
    """Where one half of a tensor is wanted, the file and the key of the other are opened."""
    from llmtrain.checkpoint.reader import CheckpointReader
    from llmtrain.values.fragment import Box

    read = CheckpointReader._read_stored

    def swapped(self: CheckpointReader, file: str, key: str, box: Box, target: torch.Tensor) -> None:
        first, second = ((entry.file, entry.key) for entry in self._manifest.tensors[SPOILED]["exp_avg"].fragments)
        other = {first: second, second: first}.get((file, key), (file, key))
        read(self, *other, box, target)

    CheckpointReader._read_stored = swapped


def forget_an_offset() -> None:
    """Every part of a stored fragment is taken from its beginning."""
    from llmtrain.values.fragment import Box

    Box.relative_to = lambda self, outer: Box((0,) * len(self.offsets), self.shape)


def forget_moments() -> None:
    """The weights arrive, the moments stay those before the first step."""
    from llmtrain.engines.step import SteppingEngine

    SteppingEngine.load = lambda self, source: self.load_weights(source)  # type: ignore[method-assign]  # on purpose


def forget_update_count() -> None:
    from llmtrain.engines.megatron_engine.engine import MegatronEngine

    MegatronEngine.load_state = lambda self, state: None


def skip_rounding() -> None:
    """The masters arrive, the weights of bf16 stay those before the first step."""
    from llmtrain.engines.megatron_engine import engine

    engine.round_weights = lambda optimizer: None

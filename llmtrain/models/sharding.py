"""How each module of a layer is split over tensor ranks: tables, read by parallel/tensor.py.

A row is (end of the module's global name, kind). A module that no row names is whole on every rank.
"""

from typing import Literal

Kind = Literal["column", "row", "vocabulary", "block"]
"""column: output rows are split. row: input columns are split and outputs summed. vocabulary: rows of a vocabulary are
split. block: holds column and row linears; its input enters, and its output leaves, the tensor-parallel region."""

DECODER: tuple[tuple[str, Kind], ...] = (
    ("embeddings.word", "vocabulary"),
    ("attention", "block"),
    ("attention.q", "column"),
    ("attention.k", "column"),
    ("attention.v", "column"),
    ("attention.out", "row"),
    ("mlp", "block"),
    ("mlp.gate", "column"),
    ("mlp.up", "column"),
    ("mlp.down", "row"),
    ("head", "vocabulary"),
)

SPLIT_DIM: dict[Kind, int] = {"column": 0, "row": 1, "vocabulary": 0}
"""Which dimension of the weight is split; a column's bias is split with it, a row's is whole."""


def kind_of(module: str, table: tuple[tuple[str, Kind], ...]) -> Kind | None:
    """The kind of a module by its global name."""
    return next((kind for end, kind in table if module == end or module.endswith("." + end)), None)


def split_dim(parameter: str, table: tuple[tuple[str, Kind], ...]) -> int | None:
    """The dimension along which a parameter is split over tensor ranks; None where each rank holds all of it."""
    module, _, leaf = parameter.rpartition(".")
    dim = SPLIT_DIM.get(kind_of(module, table))  # type: ignore[arg-type]  # None has no dimension
    return None if leaf == "bias" and dim != 0 else dim

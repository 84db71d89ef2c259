"""How each module of a layer is split over tensor and expert ranks: tables, read by parallel/tensor.py and the engines.

A row is (end of the module's global name, kind). A module that no row names is whole on every rank.
"""

from typing import Literal

Kind = Literal["column", "row", "vocabulary", "block"]
"""column: output rows are split. row: input columns are split and outputs summed. vocabulary: rows of a vocabulary are
split. block: holds column and row linears; its input enters, and its output leaves, the tensor-parallel region."""

MODULES: tuple[tuple[str, Kind], ...] = (
    ("embeddings.word", "vocabulary"),
    ("attention", "block"),
    ("attention.q", "column"),
    ("attention.k", "column"),
    ("attention.v", "column"),
    ("attention.out", "row"),
    ("cross_attention", "block"),
    ("cross_attention.q", "column"),
    ("cross_attention.k", "column"),
    ("cross_attention.v", "column"),
    ("cross_attention.out", "row"),
    ("mlp", "block"),
    ("mlp.gate", "column"),
    ("mlp.up", "column"),
    ("mlp.down", "row"),
    ("moe.shared", "block"),
    ("moe.shared.gate", "column"),
    ("moe.shared.up", "column"),
    ("moe.shared.down", "row"),
    ("head", "vocabulary"),
)

SPLIT_DIM: dict[Kind, int] = {"column": 0, "row": 1, "vocabulary": 0}
"""Which dimension of the weight is split; a column's bias is split with it, a row's is whole."""

TENSORS: tuple[tuple[str, int], ...] = (
    ("attention.sinks", 0),
    ("position_bias.weight", 1),
    ("experts.gate", 1),
    ("experts.up", 1),
    ("experts.down", 2),
    ("mlm.bias", 0),
)
"""Parameters that belong to no linear or embedding, and the dimension along which tensor ranks split them."""

EXPERTS = (".experts.gate", ".experts.up", ".experts.down")
"""Ends of the names of stacked experts: expert ranks split their first dimension."""

PARTIAL = (".q_norm.weight", ".k_norm.weight")
"""Whole on every tensor rank, and used on this rank's heads only: gradients are to be summed over the ranks."""

ON_SEVERAL_STAGES = ("encoder.position_bias.weight", "decoder.position_bias.weight")
"""Besides a tied embedding: on every pipeline stage with layers of their stack; gradients are summed over the stages,
and one of the copies counts and is saved."""


def kind_of(module: str) -> Kind | None:
    """The kind of a module by its global name."""
    return next((kind for end, kind in MODULES if module == end or module.endswith("." + end)), None)


def split_dim(parameter: str) -> int | None:
    """The dimension along which a parameter is split over tensor ranks; None where each rank holds all of it."""
    found = next((dim for end, dim in TENSORS if parameter == end or parameter.endswith("." + end)), None)
    if found is not None:
        return found
    module, _, leaf = parameter.rpartition(".")
    kind = kind_of(module)
    dim = None if kind is None else SPLIT_DIM.get(kind)
    return None if leaf == "bias" and dim != 0 else dim


def is_expert(parameter: str) -> bool:
    """Whether a parameter stacks experts."""
    return parameter.endswith(EXPERTS)

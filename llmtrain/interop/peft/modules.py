"""Low-rank updates of our linears, and those of the modules that Hugging Face's models have instead.

A module there may be several linears here (GPT-2's c_attn, Mixtral's gate_up_proj): its A stacks theirs, and its B has
theirs on the diagonal, so that B A is what each of them adds to its own outputs. Experts that are one parameter there
lie in PEFT's A by expert, then rank, and in its B by rank, then expert.

Shape suffixes: R rank, H in, F out, E experts.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes
from llmtrain.interop.hf import Family
from llmtrain.interop.name_table import Pairing, Shape, Table, pairings

PREFIX = "base_model.model."
"""Begins the name of every tensor of an adapter."""


def live_table(family: Family, model: ModelConfig) -> Table:
    """The table with the names of the modules that a model has in memory, which PEFT goes by: experts that files have
    one by one are stacked there."""
    tables = family.tables_for(model)
    stacked = (table for table in tables if any(row.shape is Shape.STACKED for row in table))
    return next(stacked, tables[0])


@dataclass(frozen=True)
class LoraModule:
    """A module, or a parameter of stacked experts, that may have an update, and our linears in the order of its
    outputs; `expert` where it is the linear of one expert. Sizes are those of one of our linears."""

    name: str
    linears: tuple[str, ...]
    size_in: int
    size_out: int
    num_experts: int = 0
    """Stacked ones; 0: it is a module."""
    expert: int | None = None

    @property
    def outputs(self) -> int:
        return self.size_out * len(self.linears)


def lora_modules(table: Table, model: ModelConfig, linears: Collection[str]) -> tuple[LoraModule, ...]:
    """The modules that some of our linears are part of, in the order of the table."""
    shapes = parameter_shapes(model)
    found = []
    for pairing in pairings(table, model):
        names = tuple(name.removesuffix(".weight") for name in pairing.ours)
        if any(name in linears for name in names):
            shape = shapes[pairing.ours[0]]
            stacked = shape[0] if pairing.shape is Shape.STACKED else 0
            name = pairing.theirs.removesuffix(".weight")
            found.append(LoraModule(name, names, shape[-1], shape[-2], stacked, pairing.expert))
    return tuple(found)


def tensor_stems(modules: Sequence[LoraModule]) -> dict[str, LoraModule]:
    """The names of tensors in files, up to lora_A and lora_B, each with its module.

    PEFT wraps what has the parameters of experts once for each of them, the first innermost.
    """
    wrapped: dict[str, list[LoraModule]] = {}
    for module in modules:
        owner = module.name.rpartition(".")[0] if module.num_experts else module.name
        wrapped.setdefault(owner, []).append(module)
    return {
        f"{PREFIX}{owner}{'.base_layer' * (len(inside) - 1 - place)}": module
        for owner, inside in wrapped.items()
        for place, module in enumerate(inside)
    }


def joined(pairs: Sequence[tuple[Tensor, Tensor] | None], module: LoraModule) -> tuple[Tensor, Tensor]:
    """A [n R, H] and B [outputs, n R] of a module, from those of its linears; None for one that has no update.

    Of stacked experts [E, R, H] and [E, F, R] become [E n R, H] and [outputs, n R E].
    """
    present = [pair for pair in pairs if pair is not None]
    rank = present[0][0].shape[-2]
    a = torch.cat([a for a, _ in present], dim=-2)
    b = a.new_zeros(*a.shape[:-2], module.outputs, a.shape[-2])
    column = 0
    for number, pair in enumerate(pairs):
        if pair is not None:
            b[..., number * module.size_out : (number + 1) * module.size_out, column : column + rank] = pair[1]
            column += rank
    if module.num_experts:
        return a.reshape(-1, module.size_in), b.permute(1, 2, 0).reshape(module.outputs, -1).contiguous()
    return a.contiguous(), b


def parted(a: Tensor, b: Tensor, module: LoraModule, blocks: bool) -> list[tuple[Tensor, Tensor]]:
    """A and B of each of a module's linears: the reverse of `joined`.

    With `blocks` B may have them on its diagonal; where it has not, each linear has all of A.
    """
    if module.num_experts:
        a = a.reshape(module.num_experts, -1, module.size_in)
        b = b.reshape(module.outputs, -1, module.num_experts).permute(2, 0, 1)
    rows = b.split(module.size_out, dim=-2)
    count = len(module.linears)
    if blocks and count > 1 and a.shape[-2] % count == 0:
        columns = [part.split(a.shape[-2] // count, dim=-1) for part in rows]
        others = (columns[i][j] for i in range(count) for j in range(count) if i != j)
        if not any(bool(part.any()) for part in others):
            own = [columns[number][number] for number in range(count)]
            return list(zip(a.split(a.shape[-2] // count, dim=-2), own, strict=True))
    return [(a, part) for part in rows]


def short_names(wanted: Collection[str], names: Collection[str], inside_words: bool = False) -> list[str]:
    """The shortest endings, whole words of dotted names, that fit all of the wanted names and no other, sorted.

    An ending fits whole words; with `inside_words` also the end of one, as PEFT has it for modules_to_save.
    """
    found = set()
    for name in wanted:
        parts = name.split(".")
        for start in reversed(range(len(parts))):
            ending = ".".join(parts[start:])
            behind = ending if inside_words else f".{ending}"
            if all(other in wanted for other in names if other == ending or other.endswith(behind)) or start == 0:
                found.add(ending)
                break
    return sorted(found)


def module_of(pairing: Pairing) -> str:
    """The module that a tensor on the other side belongs to; a parameter of its own is one."""
    return pairing.theirs.removesuffix(".weight").removesuffix(".bias")

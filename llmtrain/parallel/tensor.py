"""Tensor and sequence parallelism: plain modules replaced by megatron-core's, and the regions between them.

A block (attention, MLP) enters the region once, whatever the number of its column-parallel linears: one gather or none
forward, one reduction backward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llmtrain.config.parameters import Parameter


def no_init(weight: Tensor) -> None:
    """Weights are drawn by models/init.py, not here."""


def regathers(x: Tensor) -> bool:
    """True where a block keeps its part of the sequence and gathers the others again in the backward pass: on a GPU,
    where that hides behind products. Through gloo a gather costs more than what it saves."""
    return x.is_cuda


class GatheredAgain:
    """What the column linears of one block keep of their common input: this rank's part, and how to gather the rest.

    The first of them to go backward gathers, the last one lets go.
    """

    def __init__(self, part_sBH: Tensor, whole_SBH: Tensor, group: ProcessGroup) -> None:
        self.part_sBH, self.group = part_sBH.detach(), group
        self.memory = whole_SBH.untyped_storage().data_ptr()
        self.users = self.waiting = 0
        self.whole_SBH: Tensor | None = None

    def pack(self, kept: Tensor) -> Any:
        if kept.untyped_storage().data_ptr() != self.memory:
            return kept
        self.users = self.waiting = self.users + 1
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.whole_SBH is None:
            # Every rank goes backward through the same blocks in the same order: all of them are here.
            self.whole_SBH = gather_from_sequence_parallel_region(self.part_sBH, group=self.group)
        assert self.whole_SBH is not None
        whole_SBH = self.whole_SBH.as_strided(*kept)
        self.waiting -= 1
        if self.waiting == 0:
            self.whole_SBH, self.waiting = None, self.users
        return whole_SBH


@dataclass(frozen=True)
class TensorRegion:
    """The tensor ranks that share each layer. `sequence` splits the activations outside of blocks over them too.

    `keeps_whole`: blocks keep the gathered sequence even where they would gather it again. Whole layers that are
    computed again keep nothing now: what is noted for a second gather would outlive their first pass.
    """

    group: ProcessGroup
    sequence: bool
    keeps_whole: bool = False

    @property
    def size(self) -> int:
        return self.group.size()

    def enter(self, x_SBH: Tensor) -> Tensor:
        """Into a region: the whole sequence on every rank; gradients of the ranks are summed on the way back."""
        if self.sequence:
            whole_SBH = gather_from_sequence_parallel_region(x_SBH, tensor_parallel_output_grad=True, group=self.group)
            if not self.keeps_whole and regathers(x_SBH):
                whole_SBH.gathered_again = GatheredAgain(x_SBH, whole_SBH, self.group)
            return whole_SBH
        return copy_to_tensor_model_parallel_region(x_SBH, group=self.group)

    def leave(self, x_SBH: Tensor) -> Tensor:
        """Out of a region: the sum of the ranks' parts, under sequence parallel this rank's part of the sequence."""
        if self.sequence:
            return reduce_scatter_to_sequence_parallel_region(x_SBH, group=self.group)
        return reduce_from_tensor_model_parallel_region(x_SBH, group=self.group)

    def config(self) -> ModelParallelConfig:
        """The configuration of megatron-core's modules. Weights are made by whoever builds the model, on any device."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=self.sequence,
            use_cpu_initialization=True,
            perform_initialization=False,  # so its marks are not set either: see mark_parameter
            gradient_accumulation_fusion=False,
        )


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with the rows of W split. The block has entered the region: no communication here."""

    def __init__(self, linear: nn.Linear, region: TensorRegion) -> None:
        config = region.config()
        config.sequence_parallel = False  # the block has gathered the sequence, once for all of its column linears
        super().__init__(
            linear.in_features, linear.out_features, config=config, init_method=no_init, bias=linear.bias is not None,
            gather_output=False, disable_grad_reduce=True, tp_group=region.group,
        )  # fmt: skip

    def forward(self, x_SBH: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as nn.Linear's
        again: GatheredAgain | None = getattr(x_SBH, "gathered_again", None)
        if again is None:
            return super().forward(x_SBH)[0]
        with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
            return super().forward(x_SBH)[0]


class RowLinear(RowParallelLinear):
    """y = x W^T + b with the columns of W split; the ranks' products are summed, under sequence parallel scattered."""

    def __init__(self, linear: nn.Linear, region: TensorRegion) -> None:
        super().__init__(
            linear.in_features, linear.out_features, config=region.config(), init_method=no_init,
            bias=linear.bias is not None, input_is_parallel=True, skip_bias_add=False, tp_group=region.group,
        )  # fmt: skip

    def forward(self, x_SBH: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as nn.Linear's
        return super().forward(x_SBH)[0]


class VocabularyEmbedding(VocabParallelEmbedding):
    """A lookup in a table whose rows are split; [B, S, H], under sequence parallel this rank's part of S."""

    def __init__(self, embedding: nn.Embedding, region: TensorRegion) -> None:
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, init_method=no_init, config=region.config(),
            reduce_scatter_embeddings=region.sequence, tp_group=region.group,
        )  # fmt: skip
        self.sequence = region.sequence

    def forward(self, tokens_BS: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as nn.Embedding's
        out = super().forward(tokens_BS)
        return out.transpose(0, 1) if self.sequence else out


def split_modules(model: nn.Module, declared: Mapping[str, Parameter], region: TensorRegion) -> None:
    """Replace the linears and embeddings of a meta model whose weights are declared as split; let blocks enter the
    region. A block (attention, MLP) is what holds a linear whose columns are split, and its outputs leave the region.

    The head's linear stays: the cross-entropy uses its weight, whose rows are split here.
    """
    for name, module in list(model.named_modules()):
        weight = declared.get(f"{name}.weight")
        if weight is None or weight.split is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Embedding):
            replacement: nn.Module = VocabularyEmbedding(module, region)
        elif weight.vocabulary:
            rows = module.out_features // region.size
            module.weight = nn.Parameter(torch.empty(rows, module.in_features, device=module.weight.device))
            continue
        elif weight.split == 0:
            replacement = ColumnLinear(module, region)
        else:
            replacement = RowLinear(module, region)
            block = model.get_submodule(parent)
            # A block has one linear whose columns are split: here is where it gets its one entrance.
            block.register_forward_pre_hook(lambda _, args: (region.enter(args[0]), *args[1:]))
        setattr(model.get_submodule(parent), leaf, replacement)


def mark_parameter(parameter: nn.Parameter, split_dim: int | None, sequence: bool, expert: bool = False) -> None:
    """Set the attributes by which megatron-core knows who holds what. Call when the model has memory.

    `split_dim`: along which it is split over tensor ranks (None: whole). `sequence`: sequence parallelism is on.
    `expert`: other ranks of the data and context axes may hold other experts.
    """
    # `tensor_model_parallel`: every tensor rank counts its part in norms; of others, the first alone.
    # `sequence_parallel`: used on a part of the sequence, so each rank has a part of the gradient, to be summed.
    # `allreduce`: False keeps experts out of the sums over all data ranks.
    marks = {"tensor_model_parallel": split_dim is not None, "partition_dim": -1 if split_dim is None else split_dim}
    marks |= {"partition_stride": 1, "sequence_parallel": sequence and split_dim is None, "allreduce": not expert}
    for name, value in marks.items():
        setattr(parameter, name, value)

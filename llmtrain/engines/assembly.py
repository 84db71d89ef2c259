"""A whole model on the meta device to what one rank holds of it."""

from collections.abc import Mapping

import torch
from torch import nn

from llmtrain.config.parameters import Parameter
from llmtrain.models.attention.multi_head import Attention
from llmtrain.models.experts.mixture import MoE
from llmtrain.models.positions import RelativeBias
from llmtrain.models.stack import Stack
from llmtrain.models.transformer import Transformer
from llmtrain.parallel.context import spread_over_context
from llmtrain.parallel.expert import ExpertExchange
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.layout import Chunk
from llmtrain.parallel.tensor import TensorRegion


def split_stacks(
    whole: Transformer, declared: Mapping[str, Parameter], groups: Groups, region: TensorRegion | None
) -> None:
    """Split over the ranks what is neither a linear nor an embedding. Call with the meta device as the default."""
    for module in whole.modules():
        if isinstance(module, Attention):
            place_heads(module, groups)
        elif isinstance(module, RelativeBias):
            module.first_head = groups.place.tensor * (whole.config.num_heads // groups.layout.tensor)
        elif isinstance(module, MoE):
            place_experts(module, groups, region)
    for name, parameter in list(whole.named_parameters()):
        dim = declared[name].split if groups.layout.tensor > 1 else None
        owner, _, leaf = name.rpartition(".")
        module = whole.get_submodule(owner)
        if dim is not None and not isinstance(module, (nn.Linear, nn.Embedding)):
            setattr(module, leaf, nn.Parameter(shrunk(parameter, dim, groups.layout.tensor)))


def place_heads(attention: Attention, groups: Groups) -> None:
    """Tell an attention which heads it computes, and let it trade the sequence for heads among the context ranks."""
    tensor_heads = attention.num_heads // groups.layout.tensor
    context_heads = tensor_heads // groups.layout.context
    attention.tensor_first_head = groups.place.tensor * tensor_heads
    attention.first_head = attention.tensor_first_head + groups.place.context * context_heads
    if groups.layout.context > 1:
        attention.attend = spread_over_context(attention.attend, groups.context)


def place_experts(moe: MoE, groups: Groups, region: TensorRegion | None) -> None:
    """Leave a rank its experts, and let tokens travel to those of others."""
    moe.router.parts = groups.sequence_parts()
    if region is not None:
        moe.enter, moe.leave = region.enter, region.leave
    if groups.layout.expert > 1:
        moe.exchange = ExpertExchange(groups.expert)
        for name, parameter in list(moe.experts.named_parameters()):
            setattr(moe.experts, name, nn.Parameter(shrunk(parameter, 0, groups.layout.expert)))


def shrunk(parameter: nn.Parameter, dim: int, parts: int) -> torch.Tensor:
    """An equal part of a tensor, without content."""
    shape = list(parameter.shape)
    shape[dim] //= parts
    return torch.empty(shape, device=parameter.device)


def cut(model: Transformer, chunk: Chunk) -> None:
    """Leave of a whole model what a chunk needs: its layers, and at either end the embeddings and the head.

    Layers are numbered in the order in which data flows: an encoder-decoder's decoder goes on behind its encoder.
    """
    model.starts, model.ends = chunk.first, chunk.last
    first, total = 0, model.config.total_layers
    for stack in model.stacks:
        numbers = range(first, first + len(stack.layers))
        # The norm at the end of the stack that the head stands on goes with the head, wherever the last layer is.
        ends_here = chunk.last if numbers.stop == total else numbers[-1] in chunk.layers
        setattr(model, stack.side, cut_stack(stack, chunk, numbers.start, ends_here))
        first = numbers.stop
    if not chunk.first and not (chunk.last and model.config.tie_embeddings):
        model.embeddings = None
    elif not chunk.first and model.embeddings is not None:  # the head is its word embedding
        model.embeddings.position = model.embeddings.token_type = model.embeddings.norm = None
    if not chunk.last:
        model.mlm = model.head = None


def cut_stack(stack: Stack, chunk: Chunk, first: int, ends_here: bool) -> Stack | None:
    """A stack without the layers of other chunks; None where nothing is left.

    Its first layer has the number `first` among those of all stacks; `ends_here` says that its end is this chunk's.
    """
    for number in list(stack.layers):
        if first + int(number) not in chunk.layers:
            del stack.layers[number]
    if not ends_here:
        stack.final_norm = None
    if not stack.layers:
        stack.position_bias = None
    return stack if stack.layers or stack.final_norm is not None else None

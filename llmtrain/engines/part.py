"""The part of a model that one rank holds: some of the layers, and some of each layer."""

from collections.abc import Mapping

import torch
from torch import nn

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.parameters import Parameter, declare_parameters
from llmtrain.engines.masters import Placement, split_box
from llmtrain.finetune.additions import TensorPart, add_trained_parts
from llmtrain.models.attention.multi_head import Attention
from llmtrain.models.experts.mixture import MoE
from llmtrain.models.positions import RelativeBias
from llmtrain.models.rounded_products import Rounding, round_products
from llmtrain.models.stack import Stack
from llmtrain.models.transformer import Transformer
from llmtrain.parallel.expert import ExpertExchange
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.layout import Chunk
from llmtrain.parallel.tensor import TensorRegion, split_modules
from llmtrain.values.fragment import Box
from llmtrain.values.quantization import NumberPacking


class ModelPart:
    """A whole model on the meta device, reduced to one chunk of its layers and to this rank's part of each."""

    def __init__(
        self,
        model: Transformer,
        finetune: FinetuneConfig | None,
        groups: Groups,
        chunk: Chunk,
        region: TensorRegion | None,
        rounding: Rounding | None = None,
    ) -> None:
        """`region` are the tensor ranks, where there are several. The model knows its part of the sequence already."""
        self.model, self.groups = model, groups
        self.declared = declare_parameters(model.config, finetune)
        with torch.device("meta"):
            # Before megatron-core's modules come in: what is left then is known by the classes of torch.
            split_stacks(model, self.declared, groups, region)
            if region is not None:
                split_modules(model, self.declared, region)
                model.enter = region.enter
        self.packings: dict[str, NumberPacking] = {}
        if rounding is not None:
            self.packings = round_products(model, rounding, region.group if region else None)
        cut(model, chunk)  # after the splitting, which reads sizes and names of the whole model
        part = TensorPart(
            groups.place.tensor, region.leave if region else None, lambda parameter: self.box_of(parameter).shape
        )
        add_trained_parts(model, finetune, self.declared, part)

    def named_placements(self) -> list[tuple[nn.Parameter, Placement]]:
        """Each parameter with its place in the global tensors."""
        layout, place = self.groups.layout, self.groups.place
        _, expert_replica = layout.expert_place(place)
        found = []
        for name, parameter in self.model.named_parameters():
            declared = self.declared[name]
            owned = (declared.split is not None and layout.tensor > 1) or place.tensor == 0
            replica = expert_replica if declared.expert else self.groups.data_context.rank()
            packing = self.packings.get(name)
            found.append((parameter, Placement(name, declared.shape, self.box_of(declared), owned, replica, packing)))
        return found

    def box_of(self, declared: Parameter) -> Box:
        """The part of a parameter that this rank holds."""
        layout, place, cuts = self.groups.layout, self.groups.place, {}
        if declared.split is not None and layout.tensor > 1:
            cuts[declared.split] = (place.tensor, layout.tensor)
        if declared.expert:
            cuts[0] = (layout.expert_place(place)[0], layout.expert)
        return split_box(declared.shape, cuts)


def split_stacks(
    whole: Transformer, declared: Mapping[str, Parameter], groups: Groups, region: TensorRegion | None
) -> None:
    """Split all weights over the ranks but linears and embeddings. Call with the meta device as the default."""
    for module in whole.modules():
        if isinstance(module, Attention):
            module.first_head = module.tensor_first_head = groups.place.tensor * (
                module.num_heads // groups.layout.tensor
            )
        elif isinstance(module, RelativeBias):
            module.first_head = groups.place.tensor * (whole.config.num_heads // groups.layout.tensor)
        elif isinstance(module, MoE):
            place_experts(module, groups, region)
            module.router.parts = whole.parts
    for name, parameter in list(whole.named_parameters()):
        dim = declared[name].split if groups.layout.tensor > 1 else None
        owner, _, leaf = name.rpartition(".")
        module = whole.get_submodule(owner)
        if dim is not None and not isinstance(module, (nn.Linear, nn.Embedding)):
            setattr(module, leaf, nn.Parameter(shrunk(parameter, dim, groups.layout.tensor)))


def place_experts(moe: MoE, groups: Groups, region: TensorRegion | None) -> None:
    """Leave a rank its experts, and let tokens travel to those of others."""
    if region is not None:
        moe.enter, moe.leave = region.enter, region.leave
    if groups.layout.expert > 1:
        moe.dispatcher = ExpertExchange(groups.expert)
        for name, parameter in list(moe.experts.named_parameters()):
            setattr(moe.experts, name, nn.Parameter(shrunk(parameter, 0, groups.layout.expert)))


def shrunk(parameter: nn.Parameter, dim: int, parts: int) -> torch.Tensor:
    """An equal part of a tensor, without content."""
    shape = list(parameter.shape)
    shape[dim] //= parts
    return torch.empty(shape, device=parameter.device)


def cut(model: Transformer, chunk: Chunk) -> None:
    """Take from a whole model all that a chunk does not need: other layers, and the embeddings or the head.

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
    if not chunk.first and not (chunk.last and model.config.ties_head):
        model.embeddings = None
    elif not chunk.first and model.embeddings is not None:  # the head is its word embedding
        model.embeddings.position = model.embeddings.token_type = model.embeddings.norm = None
    if not chunk.last:
        model.mlm = model.head = model.pooler = model.classifier = model.span = None


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

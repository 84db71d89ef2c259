"""What finetuning adds to a model, be it whole or one rank's part: low-rank updates, bottlenecks, a soft prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.parameters import Parameter
from llmtrain.models.bottleneck import Bottleneck
from llmtrain.models.experts.mixture import Experts
from llmtrain.models.low_rank import Update, with_update
from llmtrain.models.transformer import Transformer, build_lookup
from llmtrain.parallel.stateless_random import Span, site_key

LORA_A, LORA_B = "lora_a", "lora_b"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorPart:
    """The tensor ranks that split layers: this one's number, and how their parts are summed where they leave a block.

    `shape_of` is the shape of this rank's box of a parameter.
    """

    place: int = 0
    leave: Callable[[Tensor], Tensor] | None = None
    shape_of: Callable[[Parameter], Shape] = lambda parameter: parameter.shape


WHOLE = TensorPart()


def add_trained_parts(
    model: Transformer,
    finetune: FinetuneConfig | None,
    declared: Mapping[str, Parameter],
    part: TensorPart = WHOLE,
) -> None:
    """Add what `finetune` declares to a model on the meta device, whose linears are split and cut already."""
    match finetune.method if finetune else "full":
        case "lora":
            assert finetune is not None
            _add_updates(model, finetune, declared, part)
        case "adapter":
            assert finetune is not None
            _add_bottlenecks(model, finetune, declared)
        case "prompt":
            if model.embeddings is not None and model.starts:
                with torch.device("meta"):
                    model.embeddings.prompt = build_lookup(*declared["embeddings.prompt.weight"].shape)
        case _:
            pass


def _add_updates(
    model: Transformer, finetune: FinetuneConfig, declared: Mapping[str, Parameter], part: TensorPart
) -> None:
    modules = dict(model.named_modules())
    for name, a in declared.items():
        owner, _, leaf = name.rpartition(".")
        if not leaf.endswith(LORA_A) or owner not in modules:  # of another stage
            continue
        b = declared[f"{name.removesuffix(LORA_A)}{LORA_B}"]
        a_shape, b_shape = part.shape_of(a), part.shape_of(b)
        module = modules[owner]
        if isinstance(module, Experts):
            for key, shape in ((leaf, a_shape), (f"{leaf.removesuffix(LORA_A)}{LORA_B}", b_shape)):
                setattr(module, key, nn.Parameter(torch.empty(shape, device="meta")))
            module.update_scale = finetune.lora.scale
            continue
        first = part.place * a_shape[1] if a.split == 1 else 0
        update = Update(
            finetune.lora.scale,
            finetune.lora.dropout,
            site_key(owner, "lora"),
            Span(first, a.shape[1]),
            model.parts,
            part.leave if a.split == 1 else None,
        )
        with_update(module, update, a_shape, b_shape)


def _add_bottlenecks(model: Transformer, finetune: FinetuneConfig, declared: Mapping[str, Parameter]) -> None:
    for stack in model.stacks:
        for number, layer in stack.layers.items():
            for block in ("attention", "mlp"):
                if f"{stack.side}.layers.{number}.{block}_adapter.up.weight" in declared:
                    with torch.device("meta"):
                        setattr(layer, f"{block}_adapter", Bottleneck(finetune.adapter, model.config.hidden_size))

"""megatron-core's optimizers around ours: how they are built, and where they keep each parameter's fp32 master."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.optim.table import OptimizerRow
from llmtrain.values.precision import DTYPES

LR_SCALE = "lr_scale"
"""The attribute of a parameter, and the key of an optimizer's group, for its learning rate's factor."""


def build_optimizers(
    config: RunConfig, row: OptimizerRow, chunks: Sequence[DistributedDataParallel]
) -> list[MegatronOptimizer]:
    """One for the dense weights and one for experts; what steps inside of each is the run's optimizer."""
    optim, dtype = config.optim, DTYPES[config.train.precision]
    chained = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            # fp16 would bring a loss scale of its own; what matters here is that masters are kept.
            bf16=dtype != torch.float32,
            params_dtype=dtype,
            use_distributed_optimizer=config.engine.zero_stage == 1,
            clip_grad=0.0,
        ),
        [*chunks],
        {**get_standard_config_overrides(OptimizerConfig()), **_rate_overrides(config)},
        use_gloo_process_groups=False,
    )
    assert isinstance(chained, ChainedOptimizer)
    # A rank without any weight of a kind, such as a pipeline stage without experts, has a stub for it.
    optimizers = [each for each in chained.chained_optimizers if not getattr(each, "is_stub_optimizer", False)]
    for optimizer in optimizers:
        # megatron-core knows how to reduce for and gather after Adam only; what is stepped is ours to choose.
        adam = optimizer.optimizer
        groups = [
            {key: value for key, value in group.items() if key not in adam.defaults}
            | {"weight_decay": optim.weight_decay * group["wd_mult"]}  # left to a scheduler of its own
            for group in adam.param_groups
        ]
        # Masters under ZeRO are views of weights, which no optimizer of torch is made for: they come in afterwards.
        optimizer.optimizer = row.build([{**group, "params": [torch.zeros(0)]} for group in groups], optim)
        for built, group in zip(optimizer.optimizer.param_groups, groups, strict=True):
            built["params"] = group["params"]
    return optimizers


def _rate_overrides(config: RunConfig) -> dict[ParamKey, Any]:
    """Groups for learning rates of their own: each parameter has its scale as an attribute."""

    def key(scale: float) -> ParamKey:
        fits = ParamPredicate(f"{LR_SCALE} {scale}", lambda parameter: getattr(parameter, LR_SCALE, 1.0) == scale)
        return ParamKey(predicate=fits)

    return {key(scale): {LR_SCALE: scale} for scale in {entry.scale for entry in config.optim.lr_scale} - {1.0}}


def iter_pairs(optimizer: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, Tensor, tuple[int, int]]]:
    """(parameter, its fp32 master on this rank, the elements that the master holds)."""
    if isinstance(optimizer, DistributedOptimizer):
        # The optimizer's own map from parameter to master is wrong for groups of mixed precision; these lists are not.
        for models, mains in (
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        ):
            for parameters, masters in zip(models, mains, strict=True):
                for parameter, main in zip(parameters, masters, strict=True):
                    # Private, as the copying below is: only its own checkpoints have a public way to the masters.
                    span = optimizer._get_model_param_range_map(parameter)["param"]
                    yield parameter, main, (span.start, span.end)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for parameters, masters in (
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ):
            for model_group, main_group in zip(parameters, masters, strict=True):
                for parameter, main in zip(model_group, main_group, strict=True):
                    yield parameter, main, (0, parameter.numel())
    else:
        for parameter in optimizer.get_parameters():
            yield parameter, parameter, (0, parameter.numel())


def round_weights(optimizer: MegatronOptimizer) -> None:
    """Copy the masters to the weights that the model computes with, on this rank."""
    if isinstance(optimizer, (DistributedOptimizer, Float16OptimizerWithFloat16Params)):
        optimizer._copy_main_params_to_model_params()

"""Where megatron-core's optimizers keep the fp32 master of each parameter, whatever their class."""

from collections.abc import Iterator

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor, nn


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

"""The engine on megatron-core: its process groups, data parallelism, optimizers and pipeline schedules."""

from llmtrain.engines.megatron_engine.engine import MegatronEngine

__all__ = ["MegatronEngine"]

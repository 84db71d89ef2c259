"""Small configurations and batches that many tests share."""

from typing import Any

import torch

from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.schema import OptimConfig, RunConfig, TrainConfig
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import Transformer
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import Batch


def tiny_model(**changes: Any) -> ModelConfig:
    """A two-layer Llama with grouped-query attention and an odd vocabulary."""
    sizes: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 307, "max_seq_len": 64,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


def tiny_run(
    model: ModelConfig | None = None, train: dict[str, Any] | None = None, optim: dict[str, Any] | None = None
) -> RunConfig:
    """A run of `tiny_model`; its data folder does not exist."""
    return RunConfig(
        name="tiny",
        model=model or tiny_model(),
        data=DataConfig(train=(SourceConfig(path="none"),), seq_len=32),
        train=TrainConfig(**{"steps": 10, "global_batch_size": 4, "micro_batch_size": 2, **(train or {})}),
        optim=OptimConfig(**(optim or {})),
    )


def random_batch(num_samples: int = 2, seq_len: int = 32, vocab_size: int = 307, seed: int = 0) -> Batch:
    """Random tokens, each predicting the next."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (num_samples, seq_len + 1), generator=generator)
    positions = torch.arange(seq_len).expand(num_samples, seq_len)
    return Batch(tokens[:, :-1], positions, labels_BS=tokens[:, 1:].clone())


def hidden_states(model: Transformer, batch: Batch, draws: Draws | None = None) -> torch.Tensor:
    """What a model leaves before its head."""
    return model(batch, Pass(draws))[0]

"""What stands before the output matrix of a masked language model.

Shape suffixes: B micro-batch, S sequence, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.models.mlp import build_pointwise
from llmtrain.models.norms import build_norm


class MlmHead(nn.Module):
    """A dense layer, the activation and a norm; and the bias that is added to the logits (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pointwise = build_pointwise(config)
        self.bias = nn.Parameter(torch.empty(config.padded_vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = build_norm(config)

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.norm(self.pointwise(self.dense(x_SBH)))

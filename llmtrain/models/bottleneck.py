"""Bottleneck adapters: small MLPs between the blocks of a frozen model (Houlsby et al. 2019, section 2.1).

Shape suffixes: S sequence, B micro-batch, H hidden.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.finetune import AdapterConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Bottleneck(nn.Module):
    """up(f(down(x))). It stands outside of the blocks that tensor ranks split: each rank has all of it.

    `reads_sum`: x is the residual stream with the block's output, normed where norms follow blocks; else it is the
    output alone.
    """

    def __init__(self, config: AdapterConfig, hidden_size: int) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[config.activation]
        self.reads_sum = config.placement == "output"
        self.down = nn.Linear(hidden_size, config.size)
        self.up = nn.Linear(config.size, hidden_size)

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.up(self.activate(self.down(x_SBH)))

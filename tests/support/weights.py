"""A model with its initial weights, as the torch engine has it in fp32."""

import torch

from llmtrain.config.parameters import declare_parameters
from llmtrain.models.init import initial_tensor
from llmtrain.models.transformer import Transformer


@torch.no_grad()
def materialize(model: Transformer, seed: int, device: torch.device) -> None:
    """Give a meta model memory on a device and its initial weights in fp32."""
    model.to_empty(device=device)
    declared = declare_parameters(model.config)
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_tensor(declared[name], model.config, seed))

"""The engine on DeepSpeed: ZeRO stages 0 to 3 with offload, around the same stages and tensor groups as megatron's."""

import os

import torch

if not torch.cuda.is_available():
    # DeepSpeed picks its accelerator when it is imported, by what is installed and not by what is there.
    os.environ["DS_ACCELERATOR"] = "cpu"

from llmtrain.engines.deepspeed_engine.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]

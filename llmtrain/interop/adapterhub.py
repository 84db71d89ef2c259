"""Bottleneck adapters in AdapterHub's form (the library `adapters`): names, settings, files.

Its seq_bn is our placement output (Pfeiffer et al. 2021), its double_seq_bn our placement both (Houlsby et al. 2019).
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmtrain.config.finetune import AdapterConfig
from llmtrain.config.parameters import declare_parameters
from llmtrain.errors import ConfigError
from llmtrain.interop.peft.writing import PeftSettings, TrainedAdapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
NAME = "llmtrain"
"""An adapter's name is part of its tensors' names; who loads it may give it another (`load_as`)."""

_DECODER = {"attention": "attention_adapters", "mlp": "output_adapters"}
MODULES: dict[str, dict[tuple[str, str], str]] = {
    "llama": {("decoder", block): f"model.layers.{{n}}.{module}" for block, module in _DECODER.items()},
    "mistral": {("decoder", block): f"model.layers.{{n}}.{module}" for block, module in _DECODER.items()},
    "gpt2": {("decoder", block): f"transformer.h.{{n}}.{module}" for block, module in _DECODER.items()},
    "bert": {
        ("encoder", "attention"): "bert.encoder.layer.{n}.attention.output",
        ("encoder", "mlp"): "bert.encoder.layer.{n}.output",
    },
    "t5": {
        ("encoder", "attention"): "encoder.block.{n}.layer.0",
        ("encoder", "mlp"): "encoder.block.{n}.layer.1",
        ("decoder", "attention"): "decoder.block.{n}.layer.0",
        ("decoder", "mlp"): "decoder.block.{n}.layer.2",
    },
}
"""The modules that have adapters, by transformers' model_type, our stack and our block. The library has no others of
our families."""

_PARTS = {"down": "adapter_down.0", "up": "adapter_up"}

_USUAL: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "original_ln_after": True,
    "output_adapter": True, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001,
    "phm_layer": False, "phm_rank": 1, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
"""What the library writes of its bottlenecks beside what is ours to say."""


def write_adapterhub(folder: Path, adapter: TrainedAdapter, settings: PeftSettings) -> None:
    """Write the files into a folder that is there. Raises ConfigError for what the library has no form for."""
    config, tensors = adapterhub_files(adapter, settings.base)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    stored = {name: tensors[name].to(settings.dtype).contiguous() for name in sorted(tensors)}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)
    facts = {"Architecture": adapter.family.title, "Width": str(adapter.finetune.adapter.size), **settings.facts}
    (folder / "README.md").write_text(_card(facts), "utf-8")


def adapterhub_files(adapter: TrainedAdapter, base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of adapter_config.json, and the tensors in fp32 by their names in the file."""
    model, finetune, kind = adapter.model, adapter.finetune, adapter.family.config_class.model_type
    if finetune.method != "adapter":
        raise ConfigError(
            f"finetune.method = {finetune.method}: AdapterHub's form is for bottleneck adapters. Try --to peft."
        )
    if kind not in MODULES:
        raise ConfigError(f"{adapter.family.title}: the library `adapters` has {', '.join(MODULES)} of these families.")
    tensors = dict[str, Tensor]()
    for name, parameter in declare_parameters(model, finetune).items():
        if "_adapter." in name:
            # Of decoder.layers.3.mlp_adapter.down.weight, say.
            stack, _, layer, block, part, leaf = name.split(".")
            module = MODULES[kind][stack, block.removesuffix("_adapter")].replace("{n}", layer)
            tensors[f"{module}.adapters.{NAME}.{_PARTS[part]}.{leaf}"] = adapter.read(name, parameter.shape)
    (architecture,) = adapter.family.config_of(model).architectures
    config = {
        "config": _settings(finetune.adapter, model.hidden_size),
        "hidden_size": model.hidden_size,
        "model_class": architecture,
        "model_name": base or "",
        "model_type": kind,
        "name": NAME,
        "version": "adapters.1.3.0",
    }
    return config, tensors


def _settings(adapter: AdapterConfig, hidden_size: int) -> dict[str, Any]:
    both = adapter.placement == "both"
    # The library divides the width by it and rounds down: half a step more is the same on either side of rounding.
    whole = hidden_size % adapter.size == 0
    factor = hidden_size / adapter.size if whole else hidden_size / (adapter.size + 0.5)
    return {
        **_USUAL,
        "mh_adapter": both,
        "non_linearity": adapter.activation,
        "original_ln_before": not both,
        "reduction_factor": factor,
    }


def _card(facts: dict[str, str]) -> str:
    rows = "\n".join(f"| {label} | {value} |" for label, value in facts.items())
    return f"""---
library_name: adapters
tags: [adapter-transformers, llmtrain]
---

# Adapter

Bottleneck adapters, trained with llmtrain.

| | |
|---|---|
{rows}

## Use

```python
import adapters

adapters.init(model)  # transformers' model of the weights that the adapter was trained on
model.set_active_adapters(model.load_adapter("this folder", use_safetensors=True))
```

It goes with those weights, and with no others.
"""

"""What PEFT makes of adapters, in a process of its own: `python -P peft_judge.py < job.json`.

A job is a list of tasks. Each has `base` (a Hugging Face folder), `inputs` (safetensors) and `out` (a safetensors file
to write: logits with the adapter, without it merged, and merged). With `adapter` that folder is loaded; with `config`
an adapter of these settings is made, its tensors drawn at random, and saved in the folder `make`.
"""

import json
import sys
import warnings
from importlib import import_module
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

peft: Any = import_module("peft")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps([tried(task) for task in json.load(sys.stdin)]))


def tried(task: dict[str, Any]) -> str:
    """What goes wrong with a task; empty where nothing does."""
    try:
        answer(task)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def answer(task: dict[str, Any]) -> None:
    (kind,) = transformers.AutoConfig.from_pretrained(task["base"]).architectures
    base = getattr(transformers, kind).from_pretrained(task["base"], dtype=torch.float32).eval()
    if "config" in task:
        settings = dict(task["config"])
        model = peft.get_peft_model(base, getattr(peft, settings.pop("class"))(**settings)).eval()
        generator = torch.Generator().manual_seed(task["seed"])
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            elif "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(task["make"])
    else:
        model = peft.PeftModel.from_pretrained(base, task["adapter"]).eval()
    inputs = load_file(task["inputs"])
    found = {"adapted": logits(model(**inputs))}
    if model.peft_config["default"].peft_type == "LORA":
        found["merged"] = logits(model.merge_and_unload()(**inputs))
    save_file({name: each.contiguous() for name, each in found.items()}, task["out"])


def logits(output: Any) -> torch.Tensor:
    """Of begins and ends side by side, where a model predicts spans."""
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits


main()

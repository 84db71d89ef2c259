"""What the library `adapters` makes of our folders, in a process of its own: adapterhub_judge.py < job.json.

A job is a list of tasks, each with `base` (a Hugging Face folder), `adapter`, `inputs` and `out` (safetensors).
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

adapters: Any = import_module("adapters")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for task in json.load(sys.stdin):
        (kind,) = json.loads(Path(task["base"], "config.json").read_text("utf-8"))["architectures"]
        model = getattr(transformers, kind).from_pretrained(task["base"], torch_dtype=torch.float32)
        adapters.init(model)
        model.set_active_adapters(model.load_adapter(task["adapter"], with_head=False, use_safetensors=True))
        model.eval()
        save_file({"adapted": model(**load_file(task["inputs"])).logits.contiguous()}, task["out"])


main()

"""Every rank of the torch engine writes down of which samples it has made each step.

Python imports this file at its start where the folder is on PYTHONPATH; SAMPLE_LOG names the folder to write to. What
the samples are is taken from the micro-batches that the engine was given, which know the number of their first sample.
tests/support/sample_history.py reads it.
"""

import json
import os
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

LOG = os.environ.get("SAMPLE_LOG", "")
ENGINE = "llmtrain.engines.torch_engine"


class Recording(Loader):
    """Loads a module as ever, then replaces the engine's step by one that is written down once it is made."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        original = module.TorchEngine.train_step

        def train_step(engine: Any, step: int, micro_batches: Any, lr: float) -> Any:
            result = original(engine, step, micro_batches, lr)
            samples = [batch.first_sample + place for batch in micro_batches for place in range(len(batch.tokens_BS))]
            line = json.dumps({"step": step, "samples": samples, "time": time.time()})
            with (Path(LOG) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            return result

        module.TorchEngine.train_step = train_step


class Finder(MetaPathFinder):
    """Finds the module of the engine."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != ENGINE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        spec.loader = Recording(spec.loader)
        return spec


if LOG:
    sys.meta_path.insert(0, Finder())

"""Checkpoints of the good run, with all that they say about where they come from, and the run started after them."""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main
from llmtrain.config.reading.load import load_config
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.preflight.data_identity import data_record
from llmtrain.preflight.resolve import resolve
from llmtrain.runs.folder import RunFolder
from llmtrain.train.start import Start, find_start
from tests.unit.checkpoint.saved import save


def save_of_run(step: int, *overrides: str, name: str = "small", **contents: Any) -> Path:
    """A checkpoint of `run.yaml` with overrides, in its run folder; tensors aside it is as training leaves it."""
    resolved = resolve(load_config(Path("run.yaml"), [f"name={name}", *overrides]).config)
    about, text = {"data": data_record(resolved.config, resolved.train)}, to_yaml(resolved.config)
    return save(resolved.run_dir / "checkpoints", step, config_text=text, about=about, **contents)


def save_import(out: Path, config_text: str) -> Path:
    """Imported weights: an architecture and no training state."""
    return save(out / "checkpoints", 0, config_text=config_text, state={}, about={"imported": "Llama"})


def check(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    """Exit code and stderr of the real command, which stops before it starts anything."""
    with pytest.raises(SystemExit) as ended:
        main(["train", "run.yaml", *overrides, "--dry-run"])
    return int(ended.value.code or 0), capsys.readouterr().err


def start(*overrides: str) -> Start:
    """What a rank decides, with the run folder locked."""
    resolved = resolve(load_config(Path("run.yaml"), overrides).config)
    with RunFolder(Path("runs/small")) as held:
        return find_start(resolved, held)

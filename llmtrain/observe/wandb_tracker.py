"""Rows as a Weights & Biases run, offline or online.

Nothing but the configuration, the rows and the library's version leaves through here: the command line, the
environment, installed packages, source code and console output stay where they are.
Starting takes under a second offline and several seconds online: run this in a BackgroundTracker.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from llmtrain.observe.scalars import scalars
from llmtrain.observe.tracker import Row

STEP = "train/step"
"""Every chart's horizontal axis: W&B's own step restarts at 0 with each attempt."""


@dataclass(frozen=True)
class WandbRun:
    """What identifies an attempt: all attempts of a run share a group, its name."""

    name: str
    project: str
    mode: Literal["offline", "online"]
    resume_step: int = 0


class WandbTracker:
    """Logs to one W&B run, kept in `run_dir`/wandb. `config` is shown beside the charts: it must hold no secret.

    Raises RuntimeError where online mode has no credentials (it never asks for them), and whatever W&B raises.
    """

    def __init__(self, run: WandbRun, run_dir: Path, config: Mapping[str, Any]) -> None:
        if run.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("not logged in: run `wandb login`, or set observe.wandb=offline and `wandb sync` later")
        # W&B itself would go on in the system's temporary folder where this one cannot be written.
        (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            mode=run.mode,
            root_dir=str(run_dir),
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=run.project,
            group=run.name,
            name=f"{run.name} from step {run.resume_step}" if run.resume_step else run.name,
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, row: Row) -> None:
        self._run.log({STEP: row["step"], **scalars(row)})

    def flush(self) -> None:
        """Nothing to wait for: W&B's own process holds every row that was logged."""

    def close(self, status: str) -> None:
        """A run that was told to stop is finished as well, not crashed."""
        self._run.finish(exit_code=1 if status == "failed" else 0)
        # `finish` does not wait for the last block of an offline file; the end of W&B's own process does.
        wandb.teardown()

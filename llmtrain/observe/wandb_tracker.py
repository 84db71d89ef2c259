"""Rows as a Weights & Biases run, offline or online.

Nothing but the configuration, the rows and, on request, the last checkpoint leaves through here: the command line, the
environment, installed packages, source code and console output stay where they are.
Starting takes under a second offline and several seconds online: run this in a BackgroundTracker.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from llmtrain.observe.charts import scalars
from llmtrain.values.progress import Row

STEP = "train/step"
"""Every chart's horizontal axis: W&B's own step restarts at 0 with each attempt."""

ONLINE_SECONDS = 15.0
"""How long the server may take to answer. A run that ends sooner waits for the rest, and for what follows offline."""


@dataclass(frozen=True)
class WandbRun:
    """The identity of an attempt. All attempts of a run share a group, its name. `run_id` is the run folder's own."""

    name: str
    project: str
    mode: Literal["offline", "online"]
    attempt: int = 1
    resume_step: int = 0
    run_id: str = ""

    @property
    def title(self) -> str:
        """The name of the attempt."""
        if self.attempt == 1 and not self.resume_step:
            return self.name
        return f"{self.name} attempt {self.attempt} from step {self.resume_step}"

    @property
    def id(self) -> str:
        """Unique among the attempts of this run and of other runs with its name."""
        return "-".join(part for part in (self.name, self.run_id, f"{self.attempt:03d}") if part)


class WandbTracker:
    """Logs to one W&B run, kept in `run_dir`/wandb. `config` is shown beside the charts: it must hold no secret.

    Where the server cannot be reached, or nobody is logged in, it says so through `warn` and stays offline: `wandb
    sync` sends everything later. `final_checkpoint` names the folder that is logged when the run is done; absent: none.
    Raises whatever W&B raises.
    """

    def __init__(
        self,
        run: WandbRun,
        run_dir: Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None] = lambda text: None,
        final_checkpoint: Callable[[], Path | None] | None = None,
    ) -> None:
        self._identity = run
        self._final_checkpoint = final_checkpoint
        # W&B itself would go on in the system's temporary folder where this one cannot be written.
        (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        with _ends_cleanly():
            online = _start_online(run, run_dir, config, warn) if run.mode == "online" else None
            self._run = online or _start(run, run_dir, config, "offline")
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)

    def summarize(self, row: Row) -> None:
        """Let the summary begin with a row of an attempt before, as lists of runs show it; no chart has it here."""
        with _ends_cleanly():
            self._run.summary.update(scalars(row))

    def log(self, row: Row) -> None:
        with _ends_cleanly():
            self._run.log({STEP: row["step"], **scalars(row)})

    def flush(self) -> None:
        """Nothing to wait for: W&B's own process holds every row that was logged."""

    def close(self, status: str) -> None:
        """A run that was told to stop is finished as well, not crashed."""
        with _ends_cleanly():
            try:
                if status == "done" and self._final_checkpoint:
                    self._log_checkpoint(self._final_checkpoint())
            finally:
                self._run.finish(exit_code=1 if status == "failed" else 0)
                # `finish` does not wait for the last block of an offline file; the end of W&B's own process does.
                wandb.teardown()

    def _log_checkpoint(self, path: Path | None) -> None:
        if path is None:
            return
        artifact = wandb.Artifact(f"{self._identity.name}-checkpoint", type="model", metadata={"folder": path.name})
        for file in sorted(path.iterdir()):
            # What is in a checkpoint never changes: it needs no copy.
            artifact.add_file(str(file), file.name, skip_cache=True, policy="immutable")
        self._run.log_artifact(artifact, aliases=["final", path.name])


@contextmanager
def _ends_cleanly() -> Iterator[None]:
    """End what is left of W&B where it fails: its own process may be gone, and it complains when this one ends."""
    try:
        yield
    except Exception:
        with suppress(Exception, SystemExit):
            wandb.teardown()
        raise


def _start_online(run: WandbRun, run_dir: Path, config: Mapping[str, Any], warn: Callable[[str], None]) -> Any:
    """None where the server cannot be reached or nobody is logged in: it never asks."""
    wandb.setup(wandb.Settings(silent=True))
    try:
        if not wandb.login(prompt=False, verify=False):
            raise RuntimeError("not logged in: run `wandb login`")
        return _start(run, run_dir, config, "online")
    except Exception as error:  # of the network, the server, the account
        reason = str(error).partition("\n")[0] or type(error).__name__
        warn(f"Weights & Biases stays offline ({reason}); send it later: wandb sync {run_dir}/wandb/offline-*")
        wandb.teardown()  # the id stays taken until W&B's own process has ended
        for nothing_in_it in (run_dir / "wandb").glob(f"run-*-{run.id}"):
            shutil.rmtree(nothing_in_it, ignore_errors=True)
        return None


def _start(run: WandbRun, run_dir: Path, config: Mapping[str, Any], mode: Literal["offline", "online"]) -> Any:
    settings = wandb.Settings(
        mode=mode,
        root_dir=str(run_dir),
        init_timeout=ONLINE_SECONDS,
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        # W&B's private names: nothing public keeps machine, statistics and packages at home.
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    return wandb.init(
        project=run.project, group=run.name, name=run.title, id=run.id, config=dict(config), settings=settings
    )

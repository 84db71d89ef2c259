"""Going back to the last good checkpoint, past the data since: decided by rank 0, recorded before it takes effect.

What is skipped are windows of global samples. They stand in the run's audit log, and every start reads them from
there: a run that is killed, falls back to an older checkpoint or goes on in another layout passes over the same data.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.agreement import RankStore
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.origin import require_state
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.config.schema import HealthConfig
from llmtrain.data.loader import Window
from llmtrain.engines.base import Engine
from llmtrain.errors import CheckpointError, NoProgressError
from llmtrain.runs.audit import AUDIT_FILE, ROLLBACK, iter_events
from llmtrain.train.health import Record, Trouble
from llmtrain.train.state import TrainState, restore


def newest_kept(manager: CheckpointManager, skipped: Sequence[Window]) -> CheckpointReader | None:
    """The newest valid checkpoint that no rollback has left behind.

    Those that one has left are set aside: the run was ended after it had decided to go back, and before it did.
    """
    while checkpoint := manager.newest_valid():
        require_state(checkpoint.path, checkpoint.state, checkpoint.about)
        position = checkpoint.state.get("train", {}).get("samples", 0)
        # A checkpoint was made with data that is now skipped where its position lies within a window.
        if not any(first < position <= end for first, end in skipped):
            break
        manager.set_aside_later_than(checkpoint.step - 1)
    return checkpoint


@dataclass(frozen=True)
class GoneBack:
    """The state of the checkpoint that was restored, and the window of data to pass over from there on."""

    state: TrainState
    skipped: Window


@dataclass
class Rollbacks:
    """Leads a run back. Rank 0 has `run_dir`, judges and decides; the others hear from it what is done."""

    config: HealthConfig
    manager: CheckpointManager
    run_dir: Path | None
    ranks: RankStore | None
    record: Record
    say: Callable[[str], object]
    _num_decisions: int = field(default=0, init=False)

    def wanted(self, trouble: Trouble | None, anybody: Callable[[bool], bool]) -> bool:
        """True where rank 0 has seen trouble; the ranks meet here only where health.rollback is on."""
        return self.config.rollback and anybody(trouble is not None and self._decides)

    @property
    def _decides(self) -> bool:
        return self.ranks is None or self.ranks.rank == 0

    def go_back(self, trouble: Trouble | None, state: TrainState, engine: Engine) -> GoneBack | None:
        """Restore the last good checkpoint.

        None without a checkpoint to go back to. Raises NoProgressError where the run has gone back
        health.max_rollbacks times already.
        """
        # What is being written is to be judged with the rest; a save and a restore must not touch one engine at once.
        self.manager.wait()
        self._num_decisions += 1  # on all ranks alike: keys of the store are used once
        key = f"rollback {self._num_decisions}"
        if self._decides:
            assert trouble is not None, "rank 0 has called for it"
            said = self._decide(trouble, state)
            if self.ranks:
                self.ranks.put(key, json.dumps(said))
        else:
            assert self.ranks is not None
            said = json.loads(self.ranks.get(key))
        if "given_up" in said:
            raise NoProgressError(said["given_up"])
        if "checkpoint" not in said:
            return None
        # All ranks restore, as weights may lie on several; rank 0 has hashed the files.
        restored = restore(self.manager.open(Path(said["checkpoint"])), engine)
        return GoneBack(restored, (restored.samples, state.samples))

    def _decide(self, trouble: Trouble, state: TrainState) -> dict[str, Any]:
        """The decision for all ranks, recorded and said."""
        assert self.run_dir is not None
        place = f"step {state.step:,}: {trouble.reason}"
        done = sum(1 for _ in iter_events(self.run_dir, ROLLBACK))
        if done >= self.config.max_rollbacks:
            return {
                "given_up": f"{place}. The run has gone back {done} times already, and health.max_rollbacks = "
                f"{self.config.max_rollbacks}. See {self.run_dir / AUDIT_FILE}: look at the data that it names, lower "
                "optim.lr, or raise health.max_rollbacks."
            }
        checkpoint = self._last_good(trouble.first_bad_step)
        if checkpoint is None:
            self._record("no_rollback", step=state.step, reason=trouble.reason)
            self.say(f"{place}. There is no good checkpoint to go back to: training goes on")
            return {}
        first, end = checkpoint.state["train"]["samples"], state.samples
        facts = {"to_step": checkpoint.step, "reason": trouble.reason, "first_sample": first, "end_sample": end}
        if not self._record(ROLLBACK, step=state.step, **facts):
            return {}
        self.say(
            f"{place}. Going back to step {checkpoint.step:,}, past samples {first:,} to {end - 1:,} "
            f"(rollback {done + 1} of at most {self.config.max_rollbacks})"
        )
        try:
            self.manager.set_aside_later_than(checkpoint.step)
        except OSError as error:  # the next save and the next start do it
            self.say(f"warning: {error.filename}: a later checkpoint cannot be set aside: {error.strerror}")
        return {"checkpoint": str(checkpoint.path)}

    def _last_good(self, first_bad_step: int) -> CheckpointReader | None:
        """The newest valid checkpoint before the first bad step, if possible one whose weights have made a good step.

        One from right before it may hold the very weights that made it bad.
        """
        for before_step in (first_bad_step - 1, first_bad_step):
            try:
                checkpoint = self.manager.newest_valid(before_step)
            except CheckpointError as error:
                self.say(f"warning: {error}")
                continue
            if checkpoint and "train" in checkpoint.state:
                return checkpoint
        return None

    def _record(self, event: str, **facts: Any) -> bool:
        """True once an event is in the audit log: what is not there would not be repeated after a resume."""
        try:
            self.record(event, **facts)
        except OSError as error:
            self.say(f"warning: {event} cannot be recorded, and is not done: {error}. Training goes on.")
            return False
        return True

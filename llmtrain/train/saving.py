"""When a run is saved, and what of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.origin import origin_of
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.stored_state import require_state, updates_of
from llmtrain.engines.base import Engine
from llmtrain.train.state import TrainState


@dataclass(frozen=True)
class Saving:
    """Saves every `every_steps` steps (0: never). The loop saves after the last one too.

    `before_publish` makes the metrics durable before a checkpoint of the same step becomes visible.
    """

    manager: CheckpointManager
    every_steps: int
    before_publish: Callable[[], object]

    def due(self, step: int) -> bool:
        """Whether a step is saved. Asked at every step: a save that has failed behind training is told of here."""
        self.manager.poll()
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(self, state: TrainState, engine: Engine, valid_loss: float | None) -> None:
        """Write a checkpoint of what `restore` needs."""
        contents = {"train": state.to_json(), "engine": engine.state()}
        self.manager.save(state.step, engine.fragments(), contents, self.before_publish, valid_loss)

    def finish(self) -> None:
        """Return once the last save is complete. Raises SaveError where it has failed: the run must not end so."""
        self.manager.finish()


def saved_state(checkpoint: CheckpointReader | None) -> TrainState:
    """Where a run stands that continues a checkpoint: at its beginning with none, or with imported weights."""
    if checkpoint is None or "train" not in checkpoint.state:
        return TrainState()
    origin = origin_of(checkpoint.path, checkpoint.state, checkpoint.config_text, checkpoint.about)
    stored = checkpoint.state["train"]
    state = TrainState.from_json(stored, origin.config)
    engine = checkpoint.state.get("engine")
    if "skipped_in_row" not in stored and engine and updates_of(engine) == 0:
        return replace(state, skipped_in_row=state.step)  # an older checkpoint, that no step has ever changed
    return state


def restore(checkpoint: CheckpointReader, engine: Engine) -> TrainState:
    """Continue a checkpoint: weights, moments, counts. Imported weights have no history: training begins with them."""
    if "train" not in checkpoint.state:
        engine.load_weights(checkpoint)
    else:
        require_state(checkpoint.path, checkpoint.state, checkpoint.about, engine_too=True)
        engine.load(checkpoint)
        engine.load_state(checkpoint.state["engine"])
    return saved_state(checkpoint)

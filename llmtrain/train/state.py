"""The state of a run, the one small value that a resume needs beside tensors: when it is saved, and how restored."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.origin import origin_of, require_state, updates_of
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.config.budget import Seen, seen_by
from llmtrain.config.patience import Patience, patience_of
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.engines.base import Engine
from llmtrain.finetune.base_weights import BaseWeights
from llmtrain.preflight.beginning import begins_at_base
from llmtrain.preflight.resolve import ResolvedRun


@dataclass(frozen=True)
class LossHistory:
    """The losses of the last good steps, oldest first, and the strikes in a row up to now: a loss is judged by them.

    A plain value that is saved with the state of the run, so that after a resume every judgement is the same.
    """

    losses: tuple[float, ...] = ()
    strikes: int = 0


@dataclass(frozen=True)
class TrainState:
    """Counts since the run began. `step` counts batches consumed, skipped updates included.

    `samples` is the position in the stream of samples, those passed over included. `tokens` counts targets;
    `data_tokens` counts what was read to get them, and `first_step_tokens` what the first step read. `history` is what
    the next loss is judged by; it is empty where nothing depends on it. `skipped_in_row` counts the last steps that
    changed nothing, as their gradients were not finite. `patience` counts evaluations without a better loss.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    history: LossHistory = field(default_factory=LossHistory)
    data_tokens: int = 0
    first_step_tokens: int = 0
    skipped_in_row: int = 0
    patience: Patience = field(default_factory=Patience)

    @property
    def seen(self) -> Seen:
        """The position that the budget and the schedule go by."""
        return Seen(self.step, self.data_tokens, self.first_step_tokens)

    def advanced(
        self, samples: int, tokens: int, data_tokens: int, history: LossHistory | None = None, skipped: bool = False
    ) -> "TrainState":
        """The state after one more step that moved on by so many samples, and read `data_tokens` for its targets."""
        return TrainState(
            self.step + 1,
            self.samples + samples,
            self.tokens + tokens,
            history or self.history,
            self.data_tokens + data_tokens,
            self.first_step_tokens or data_tokens,
            self.skipped_in_row + 1 if skipped else 0,
            self.patience,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any], config: Mapping[str, Any]) -> "TrainState":
        """The state of a checkpoint that was saved with `config`; older ones have no history, and count neither skipped
        steps nor evaluations."""
        history = data.get("history", {})
        losses, strikes = tuple(history.get("losses", ())), history.get("strikes", 0)
        seen, history = seen_by(data, config), LossHistory(losses, strikes)
        counts = (data["step"], data["samples"], data["tokens"])
        skipped = data.get("skipped_in_row", 0)
        patience = patience_of(data)
        return TrainState(*counts, history, seen.data_tokens, seen.first_step_tokens, skipped, patience)


@dataclass(frozen=True)
class Saving:
    """Saves every `every_steps` steps (0: never). The loop saves after the last one too.

    `before_publish` makes the metrics durable before a checkpoint of the same step becomes visible.
    """

    manager: CheckpointManager
    every_steps: int
    before_publish: Callable[[], object]

    def due(self, step: int) -> bool:
        """True for a step to save. Asked at every step: a save that has failed behind training is told of here."""
        self.manager.poll()
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(self, state: TrainState, engine: Engine, metric: float | None) -> None:
        """Write a checkpoint of what `restore` needs. `metric`: see CheckpointManager."""
        contents = {"train": state.to_json(), "engine": engine.state()}
        self.manager.save(state.step, engine.fragments(), contents, self.before_publish, metric)

    def finish(self) -> None:
        """Return once the last save is complete. Raises SaveError where it has failed: the run must not end so."""
        self.manager.finish()


def saved_state(checkpoint: CheckpointReader | None) -> TrainState:
    """The state of a run that continues a checkpoint; its beginning without one, and with imported weights."""
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
    """Continue a checkpoint of a run: weights, moments, counts."""
    require_state(checkpoint.path, checkpoint.state, checkpoint.about, engine_too=True)
    engine.load(checkpoint)  # tensors first, then the counts that belong to them
    engine.load_state(checkpoint.state["engine"])
    return saved_state(checkpoint)


def begin(checkpoint: CheckpointReader | None, engine: Engine, resolved: ResolvedRun) -> TrainState:
    """Give an engine what a run begins with or continues; without a checkpoint it has drawn its weights already."""
    if checkpoint is None:
        return TrainState()
    if "train" in checkpoint.state and not begins_at_base(resolved.config):
        return restore(checkpoint, engine)
    finetune, ids = resolved.config.finetune, list[int]()
    if finetune is not None and finetune.method == "prompt" and finetune.prompt.text is not None:
        ids = load_tokenizer(resolved.tokenizer).encode(finetune.prompt.text)
    base_vocab = None
    if begins_at_base(resolved.config):
        origin = origin_of(checkpoint.path, checkpoint.state, checkpoint.config_text, checkpoint.about)
        base_vocab = origin.section("model").get("vocab_size")
    engine.load_weights(BaseWeights(checkpoint, resolved.config, ids, base_vocab))
    return TrainState()

"""How long a run is, and where its schedule stands: counted in steps, or in tokens of data. Pure arithmetic.

A budget in tokens counts what was read, whatever the batch size was: the run ends with the first whole step that
reaches it. Its schedule goes by tokens too. It counts them in steps of the size that the run's first step had, so
that `optim.warmup_steps` and `optim.decay_steps` keep meaning the same tokens when the batch size changes. A budget in
epochs of the data is one in tokens, once the data was looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.config.batch_sizes import BatchSizes
from llmtrain.config.data import DataConfig
from llmtrain.config.schema import RunConfig, TrainConfig


@dataclass(frozen=True)
class Seen:
    """The past of a run: steps, tokens of data, and how many of these its first step read (0: none yet)."""

    step: int = 0
    data_tokens: int = 0
    first_step_tokens: int = 0


@dataclass(frozen=True)
class Budget:
    """`steps`, or else `tokens`. `tokens_per_step` is what a step reads now; with a `ramp`, its first step."""

    steps: int | None
    tokens: int | None
    tokens_per_step: int
    ramp: BatchSizes | None = None
    """The tokens of every step, where they are not all the same."""

    @staticmethod
    def of(config: RunConfig) -> "Budget":
        """The budget of a configuration that keeps the rules."""
        sizes = config.train.batch_sizes.scaled(config.data.seq_len)
        return Budget(config.train.steps, config.train.tokens, sizes.of_step(1), sizes)

    def tokens_of(self, step: int) -> int:
        """The tokens of data that a step reads."""
        return self.ramp.of_step(step) if self.ramp else self.tokens_per_step

    def last_step(self, seen: Seen) -> int:
        """The run's last step, if all further ones are of today's sizes; a finished run's lies not behind `seen`."""
        if self.tokens is None:
            assert self.steps is not None, "a rule"
            return self.steps
        sizes = self.ramp or BatchSizes((self.tokens_per_step,))
        return sizes.last_step(self.tokens - seen.data_tokens, seen.step)

    def schedule(self, seen: Seen) -> tuple[float, int]:
        """(place of the step that follows in the schedule, from 1; the schedule's length), both in steps."""
        if self.tokens is None:
            return seen.step + 1, self.last_step(seen)
        now = self.tokens_of(seen.step + 1)
        unit = seen.first_step_tokens or now
        return (seen.data_tokens + now) / unit, -(-self.tokens // unit)


def seen_by(train_state: Mapping[str, Any], config: Mapping[str, Any]) -> Seen:
    """The past that a checkpoint's training state tells of; `config` is the configuration that it was saved with.

    Older states do not count tokens of data: then their position in the stream does, and the batch size is taken for
    the first step's.
    """
    if "data_tokens" in train_state:
        return Seen(*(int(train_state[key]) for key in ("step", "data_tokens", "first_step_tokens")))
    found = []
    for name, section, key in (("data", DataConfig, "seq_len"), ("train", TrainConfig, "global_batch_size")):
        values, default = config.get(name), section.model_fields[key].default
        found.append(values.get(key, default) if isinstance(values, Mapping) else default)
    seq_len, batch_size = found
    return Seen(int(train_state["step"]), int(train_state["samples"]) * seq_len, batch_size * seq_len)

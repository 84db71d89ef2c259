"""How losses are judged, what is said and recorded of a skipped step."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from llmtrain.config.schema import HealthConfig
from llmtrain.data.stream import SampleOrigin
from llmtrain.train.health import FEWEST_LOSSES, Health, Trouble, judge
from llmtrain.train.state import LossHistory, TrainState
from llmtrain.values.progress import StepResult

ON = HealthConfig(rollback=True, window_steps=50)
BAD = StepResult(math.nan, math.nan, 10, skipped=True)
ORIGINS = [SampleOrigin(16 + n, "data", f"shard-{n // 6}.tar", 100 + n) for n in range(8)]


def good(loss: float) -> StepResult:
    return StepResult(loss, 1.0, 10)


def overflow(loss: float, scale: float) -> StepResult:
    return StepResult(loss, math.inf, 10, skipped=True, metrics={"loss_scale": scale})


def judged(results: list[StepResult], config: HealthConfig = ON) -> list[Trouble | None]:
    history, found = LossHistory(), []
    for step, result in enumerate(results, start=1):
        history, trouble = judge(history, step, result, config, least_scale=1.0)
        found.append(trouble)
    return found


def spikes(losses: list[float], config: HealthConfig = ON) -> list[int]:
    troubles = judged([good(loss) for loss in losses], config)
    return [trouble.first_bad_step for trouble in troubles if trouble]


def realistic(seed: int, steps: int = 300) -> list[float]:
    """A falling curve with noise of two widths: every twentieth batch is three times as far off as the others."""
    draw = np.random.default_rng(seed)
    curve = 2.5 + 4 * np.arange(1, steps + 1) ** -0.4
    width = np.where(draw.random(steps) < 0.05, 0.03, 0.01)
    return (curve * (1 + width * draw.standard_normal(steps))).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_a_clean_curve_has_no_spike_and_a_spoiled_one_has(seed: int) -> None:
    losses = realistic(seed)
    assert spikes(losses) == []
    losses[200] *= 1.5
    assert spikes(losses) == [201]


def test_a_flat_curve_leaves_room() -> None:
    assert spikes([2.0] * 60 + [2.19]) == []
    assert spikes([2.0] * 60 + [2.21]) == [61]


def test_nothing_is_a_spike_while_few_losses_are_known() -> None:
    assert spikes([2.0] * (FEWEST_LOSSES - 1) + [9.0]) == []
    assert spikes([2.0] * FEWEST_LOSSES + [9.0]) == [FEWEST_LOSSES + 1]
    short = ON.with_keys({"window_steps": 5})
    assert spikes([2.0] * 5 + [9.0], short) == [6]


def test_spikes_can_be_off() -> None:
    assert spikes([2.0] * 60 + [900.0], ON.with_keys({"spike_deviations": 0.0})) == []


def test_a_level_that_stays_is_the_new_one() -> None:
    assert 61 in spikes([2.0] * 60 + [3.0] * 60)
    assert max(spikes([2.0] * 60 + [3.0] * 60)) <= 61 + 25


def test_strikes_in_a_row_count_and_others_do_not() -> None:
    assert judged([good(2.0), BAD, BAD, good(2.0), BAD, BAD]) == [None] * 6
    troubles = judged([good(2.0), BAD, BAD, BAD])
    assert troubles[:3] == [None] * 3
    assert troubles[3] is not None and troubles[3].first_bad_step == 2


def test_a_loss_scale_that_finds_its_level_is_no_strike() -> None:
    assert judged([overflow(2.0, 2.0**power) for power in range(16, 0, -1)]) == [None] * 16
    assert judged([overflow(2.0, 1.0)] * 3)[2] is not None
    assert judged([overflow(math.nan, 65536.0)] * 3)[2] is not None


def test_the_history_goes_with_the_state_and_older_states_have_none() -> None:
    state = TrainState().advanced(8, 100, 512, LossHistory((0.1 + 0.2, 2.0), 2))
    assert TrainState.from_json(json.loads(json.dumps(state.to_json())), {}) == state
    older = TrainState.from_json({"step": 7, "samples": 112, "tokens": 1792}, {})
    assert (older.step, older.samples, older.tokens, older.history) == (7, 112, 1792, LossHistory())


class Listener:
    def __init__(self, full: bool = False) -> None:
        self.said: list[str] = []
        self.verdicts: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._full = full

    def record(self, event: str, **facts: Any) -> None:
        if self._full:
            raise OSError("no space left on device")
        self.events.append({"event": event, **facts})

    def health(self, **config: Any) -> Health:
        return Health(HealthConfig(**config), 1.0, self.record, self.said.append, self.verdicts.append)


@pytest.mark.parametrize(
    ("config", "first", "second", "verdict"),
    [
        ({}, BAD, BAD, "persistent"),
        ({}, BAD, good(2.0), "transient"),
        ({"rerun": False}, BAD, None, "not_rerun"),
        ({}, overflow(2.0, 1024.0), None, "loss_scale"),
        ({}, overflow(math.nan, 1024.0), None, "not_rerun"),
    ],
)
def test_a_skipped_step_is_run_again_where_that_may_help(
    config: dict[str, Any], first: StepResult, second: StepResult | None, verdict: str
) -> None:
    listener, attempts = Listener(), []

    def attempt() -> StepResult:
        assert second is not None
        attempts.append(second)
        return second

    result = listener.health(**config).retry_skipped(3, first, attempt, ORIGINS)
    assert result == (second or first)
    assert len(attempts) == (second is not None)
    (event,) = listener.events
    assert (event["event"], event["step"], event["verdict"]) == ("skipped_step", 3, verdict)
    assert (event["first_sample"], event["last_sample"]) == (16, 23)
    assert event["shards"] == [
        {"source": "data", "shard": "shard-0.tar", "samples": [16, 17, 18, 19, 20, 21], "windows": [*range(100, 106)]},
        {"source": "data", "shard": "shard-1.tar", "samples": [22, 23], "windows": [106, 107]},
    ]
    (text,) = listener.said
    assert "samples 16 to 23 of data/shard-0.tar (16-21); data/shard-1.tar (22-23)" in text
    assert listener.verdicts == ([f"{verdict}: {text}"] if verdict in ("persistent", "transient") else [])


def test_a_full_disk_does_not_stop_a_run_that_skips() -> None:
    listener = Listener(full=True)
    assert listener.health().retry_skipped(3, BAD, lambda: good(2.0), ORIGINS) == good(2.0)
    assert "not in the audit log" in listener.said[-1]


def test_many_samples_are_named_in_short() -> None:
    listener = Listener()
    origins = [SampleOrigin(n, "data", f"shard-{n % 97}.tar", n) for n in range(4096)]
    listener.health(rerun=False).retry_skipped(3, BAD, lambda: BAD, origins)
    assert len(listener.said[0]) < 600 and "audit.jsonl has all" in listener.said[0]
    assert sum(len(shard["samples"]) for shard in listener.events[0]["shards"]) == 4096


def test_without_rollback_no_history_is_kept() -> None:
    health = Listener().health()
    assert health.judge(LossHistory(), 1, good(2.0)) == (LossHistory(), None)
    assert asdict(TrainState())["history"] == {"losses": (), "strikes": 0}

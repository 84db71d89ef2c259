"""Losses and gradients that are not as they should be, in whole runs on several ranks of every engine."""

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.runs.audit import STARTED, iter_events
from llmtrain.runs.metrics_file import read_rows
from tests.support.bad_numbers import BATCH, Fault, Seen, bad_run, consumed, finite, run_rank, same
from tests.support.datasets import UNREAD_TOKENIZER, write_dataset
from tests.support.ranks import RankError, run_ranks

Layout = tuple[str, int, dict[str, Any]]

ALONE: Layout = ("torch", 1, {})
whole_grid = pytest.mark.whole_grid
LAYOUTS = [
    pytest.param(("torch", 2, {}), id="torch-dp2"),
    pytest.param(("torch", 4, {}), id="torch-dp4", marks=whole_grid),
    pytest.param(("megatron", 2, {"tensor": 2}), id="megatron-tp2", marks=whole_grid),
    pytest.param(("megatron-1", 4, {"tensor": 2, "pipeline": 2}), id="megatron-zero1-tp2-pp2"),
    pytest.param(("megatron-1", 4, {"context": 2}), id="megatron-zero1-cp2-dp2", marks=whole_grid),
    pytest.param(("deepspeed", 2, {}), id="deepspeed-zero0", marks=whole_grid),
    pytest.param(("deepspeed-1", 2, {}), id="deepspeed-zero1", marks=whole_grid),
    pytest.param(("deepspeed-2", 2, {}), id="deepspeed-zero2", marks=whole_grid),
    pytest.param(("deepspeed-3", 2, {}), id="deepspeed-zero3"),
    pytest.param(("deepspeed-3", 4, {"tensor": 2}), id="deepspeed-zero3-tp2", marks=whole_grid),
]

SPIKE = {"rollback": True, "window_steps": 40}
LOUD = Fault(loud=24)
"""Step 24 makes the weights bad, and they are saved; step 25 shows it. Step 20 is the last good checkpoint."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Real text, a byte a token, in two shards."""
    source = Path(sysconfig.get_path("stdlib")) / "json"
    files = sorted(source.glob("*.py"))
    documents = [np.frombuffer(file.read_bytes(), np.uint8).astype(np.int64) + 4 for file in files]
    write_dataset(tmp_path / "data", [documents[::2], documents[1::2]], tokenizer=UNREAD_TOKENIZER)
    return tmp_path


def trained(folder: Path, layout: Layout, fault: Fault, steps: int = 32, **health: Any) -> list[Seen]:
    config = bad_run(folder, layout, steps, **health)
    return run_ranks(run_rank, layout[1], config, fault, timeout_seconds=180)


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    return list(iter_events(folder / "runs" / "bad", *names))


def numbers(first: int, end: int) -> list[int]:
    return list(range(first, end))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_steps_are_run_twice_skipped_alike_on_all_ranks_and_named(folder: Path, layout: Layout) -> None:
    """Sample 7 is poisoned, and step 4 meets a passing fault: nothing of either is left in weights and moments."""
    fault = Fault(poisoned=(7,), flicker=4)
    ranks = trained(folder, layout, fault, steps=5)
    for seen in ranks:
        assert [(step, result.skipped) for step, _, result in seen.calls] == [
            (1, False), (2, True), (2, True), (3, False), (4, True), (4, False), (5, False),
        ]  # fmt: skip
        assert seen.touched == []
        assert finite(seen.final)
    assert consumed(ranks) == {step: numbers((step - 1) * BATCH, step * BATCH) for step in range(1, 6)}
    skipped, passing = events(folder, "skipped_step")
    assert (skipped["step"], skipped["verdict"], passing["step"], passing["verdict"]) == (
        2,
        "persistent",
        4,
        "transient",
    )
    assert (skipped["first_sample"], skipped["last_sample"]) == (BATCH, 2 * BATCH - 1)
    named = sorted(number for shard in skipped["shards"] for number in shard["samples"])
    assert named == numbers(BATCH, 2 * BATCH)
    assert all((folder / "data" / shard["shard"]).is_file() for shard in skipped["shards"])
    assert {shard["source"] for shard in skipped["shards"]} == {str(folder / "data")}
    assert [row["skipped"] for row in read_rows(folder / "runs" / "bad" / "metrics.jsonl")] == [0, 1, 0, 0, 0]

    (folder / "runs").rename(folder / "spoiled")
    undisturbed = trained(folder, layout, Fault(poisoned=(7,)), steps=5)
    assert all(same(a.final, b.final) for a, b in zip(ranks, undisturbed, strict=True))


def test_an_attempt_that_is_no_repetition_is_seen(folder: Path) -> None:
    mutated = "the second attempt draws anew"
    a = trained(folder, ALONE, Fault(flicker=3, mutation=mutated), steps=5)
    (folder / "runs").rename(folder / "spoiled")
    b = trained(folder, ALONE, Fault(mutation=mutated), steps=5)
    assert not same(a[0].final, b[0].final)


@pytest.mark.parametrize("layout", [pytest.param(ALONE, id="alone"), *LAYOUTS])
def test_a_spike_leads_back_past_the_data_since(folder: Path, layout: Layout) -> None:
    ranks = trained(folder, layout, LOUD, **SPIKE)
    (event,) = events(folder, "rollback")
    assert (event["step"], event["to_step"]) == (25, 20)
    assert (event["first_sample"], event["end_sample"]) == (20 * BATCH, 25 * BATCH)
    assert "spike" in event["reason"]
    expected = {step: numbers((step - 1) * BATCH, step * BATCH) for step in range(1, 21)}
    expected |= {step: numbers((step + 4) * BATCH, (step + 5) * BATCH) for step in range(21, 33)}
    assert consumed(ranks) == expected
    assert all(finite(seen.final) for seen in ranks)
    rows = read_rows(folder / "runs" / "bad" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 33))
    assert max(row["loss"] for row in rows) < 6.5  # a guess is log(307) = 5.7
    checkpoints = sorted(path.name for path in (folder / "runs" / "bad" / "checkpoints").iterdir())
    assert "superseded-step-00000024" in checkpoints
    assert checkpoints[:3] == ["step-00000024", "step-00000028", "step-00000032"]


def killed_and_resumed(folder: Path, layout: Layout, fault: Fault, resumed: Layout, mutation: str = "") -> list[Seen]:
    """The run once more, in another folder: killed after its rollback, and continued."""
    (folder / "runs").rename(folder / "whole")
    with pytest.raises(RankError, match="was killed"):
        trained(folder, layout, fault, **SPIKE)
    assert len(events(folder, "rollback")) == 1
    return trained(folder, resumed, Fault(loud=fault.loud, mutation=mutation), **SPIKE)


@pytest.mark.parametrize(
    ("layout", "moment"),
    [
        pytest.param(ALONE, "recorded", id="alone-recorded"),
        pytest.param(ALONE, 2, id="alone-2-steps-later"),
        pytest.param(("megatron-1", 2, {"tensor": 2}), "recorded", id="megatron-recorded", marks=whole_grid),
        pytest.param(("deepspeed-2", 2, {}), 6, id="deepspeed-6-steps-later", marks=whole_grid),
    ],
)
def test_killed_after_a_rollback_and_resumed_ends_with_the_same_bits(
    folder: Path, layout: Layout, moment: str | int
) -> None:
    whole = trained(folder, layout, LOUD, **SPIKE)
    resumed = killed_and_resumed(folder, layout, Fault(loud=24, killed=moment), layout)
    for a, b in zip(whole, resumed, strict=True):
        assert same(a.final, b.final)
        taken = b.samples
        assert taken == {step: samples for step, samples in a.samples.items() if step in taken}
        assert min(taken) in (21, 25)


@pytest.mark.parametrize(
    ("mutation", "moment"), [("windows are forgotten", 2), ("checkpoints with skipped data count", "recorded")]
)
def test_a_resume_that_does_not_repeat_the_decision_is_seen(folder: Path, mutation: str, moment: str | int) -> None:
    whole = trained(folder, ALONE, LOUD, **SPIKE)
    resumed = killed_and_resumed(folder, ALONE, Fault(loud=24, killed=moment), ALONE, mutation)
    assert not same(whole[0].final, resumed[0].final)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(("torch", 2, {}), id="torch-dp2"),
        pytest.param(("megatron", 2, {"tensor": 2}), id="megatron-tp2", marks=whole_grid),
    ],
)
def test_another_layout_passes_over_the_same_samples(folder: Path, other: Layout) -> None:
    whole = consumed(trained(folder, ALONE, LOUD, **SPIKE))
    resumed = consumed(killed_and_resumed(folder, ALONE, Fault(loud=24, killed="recorded"), other))
    assert resumed == {step: samples for step, samples in whole.items() if step > 20}


def test_strikes_lead_back_before_the_first(folder: Path) -> None:
    """Samples of steps 10 to 12 are poisoned: the run goes back before it saves step 12."""
    poisoned = tuple(step * BATCH - 1 for step in (10, 11, 12))
    ranks = trained(folder, ("torch", 2, {}), Fault(poisoned=poisoned), steps=14, rollback=True, max_strikes=3)
    (event,) = events(folder, "rollback")
    assert (event["step"], event["to_step"]) == (12, 8)
    assert [skipped["step"] for skipped in events(folder, "skipped_step")] == [10, 11, 12]
    expected = {step: numbers((step - 1) * BATCH, step * BATCH) for step in range(1, 9)}
    expected |= {step: numbers((step + 3) * BATCH, (step + 4) * BATCH) for step in range(9, 15)}
    assert consumed(ranks) == expected


def test_without_rollback_strikes_and_spikes_change_nothing(folder: Path) -> None:
    poisoned = tuple(step * BATCH - 1 for step in (10, 11, 12))
    (seen,) = trained(folder, ALONE, Fault(poisoned=poisoned, loud=24), max_strikes=3)
    assert [step for step, _, _ in seen.calls] == [*range(1, 10), 10, 10, 11, 11, 12, 12, *range(13, 33)]
    assert events(folder, "rollback", "no_rollback") == []


def test_where_no_checkpoint_is_good_training_goes_on(folder: Path) -> None:
    ranks = trained(folder, ("torch", 2, {}), Fault(poisoned=(3, 7)), steps=4, rollback=True, max_strikes=2)
    (event,) = events(folder, "no_rollback")
    assert event["step"] == 2
    assert events(folder, "rollback") == []
    assert list(consumed(ranks)) == [1, 2, 3, 4]


def test_too_many_rollbacks_end_the_run_on_all_ranks(folder: Path) -> None:
    poison = Fault(poisoned=tuple(numbers(6 * BATCH, 100 * BATCH)))
    health = {"rollback": True, "max_strikes": 2, "max_rollbacks": 2}
    ranks = trained(folder, ("torch", 2, {}), poison, steps=40, **health)
    for seen in ranks:
        assert seen.error is not None
        assert seen.error[0] == "NoProgressError"
        assert "health.max_rollbacks = 2" in seen.error[1]
    assert [event["to_step"] for event in events(folder, "rollback")] == [4, 4]
    ends = [event["end_sample"] for event in events(folder, "rollback")]
    assert ends == [8 * BATCH, 10 * BATCH]
    again = trained(folder, ("torch", 2, {}), poison, steps=40, **health)
    assert again[0].error is not None and len(events(folder, "rollback")) == 2


@whole_grid
def test_a_clean_run_has_no_spike(folder: Path) -> None:
    trained(folder, ALONE, Fault(), steps=300, rollback=True)
    assert [event["event"] for event in events(folder)] == [STARTED]
    losses = [row["loss"] for row in read_rows(folder / "runs" / "bad" / "metrics.jsonl")]
    assert len(losses) == 300 and losses[-1] < losses[0]

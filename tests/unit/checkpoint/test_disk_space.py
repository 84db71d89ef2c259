"""The room that a run's checkpoints need, before one is written."""

from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import free_bytes, most_at_once, plan_room
from llmtrain.config.schema import CheckpointConfig
from llmtrain.words import bytes_text


@pytest.mark.parametrize(
    ("settings", "total_steps", "expected"),
    [
        ({"every_steps": 0}, 100, 1),
        ({"every_steps": 10, "keep": 3}, 20, 2),
        ({"every_steps": 10, "keep": 3}, 1000, 4),
        ({"every_steps": 10, "keep": 3, "keep_best": True}, 1000, 5),
        ({"every_steps": 10, "keep": 3, "keep_every_steps": 100}, 1000, 14),
        ({"every_steps": 30, "keep": 1, "keep_every_steps": 20}, 120, 4),
        ({"every_steps": 50, "keep": 1}, 49, 1),
    ],
)
def test_most_at_once(settings: dict[str, object], total_steps: int, expected: int) -> None:
    assert most_at_once(CheckpointConfig.model_validate(settings), total_steps) == expected


@pytest.mark.parametrize(
    ("present", "needed", "planned"),
    [([], 2, 4), ([10], 1, 3), ([10, 20, 30], 1, 1), ([10, 20, 30, 40, 50], 1, 1), ([1000], 0, 0)],
)
def test_what_lies_there_is_not_needed_again(tmp_path: Path, present: list[int], needed: int, planned: int) -> None:
    for step in present:
        (tmp_path / f"step-{step:08d}").mkdir()
    room = plan_room(tmp_path, 1200, CheckpointConfig(every_steps=10, keep=3), total_steps=1000)
    assert (room.checkpoint_bytes, room.needed_bytes, room.planned_bytes) == (1200, 1200 * needed, 1200 * planned)


def test_free_bytes_are_those_of_the_nearest_folder(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "there")
    assert free is not None
    assert free > 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB (1,000 bytes)"),
        (1_234_567_890, "1.23 GB (1,234,567,890 bytes)"),
    ],
)
def test_sizes_are_readable_and_exact(size: int, text: str) -> None:
    assert bytes_text(size) == text

"""When checkpoints are written, kept, found and set aside."""

import threading
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.folders import MANIFEST, checkpoint_steps, steps_to_remove
from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.checkpoint.manifest import CheckpointUnusableError
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.values.fragment import Box, Fragment
from tests.unit.checkpoint.saved import bits, save, state_fragments


def manager(folder: Path, warnings: list[str] | None = None, **settings: object) -> CheckpointManager:
    config = CheckpointConfig.model_validate({"keep": 100, **settings})
    return CheckpointManager(folder, config, "name: t\n", {"engine": "torch"}, Reports((warnings or []).append))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "metrics", "removed"),
    [
        ({"keep": 2}, {10: None, 20: None, 30: None, 40: None}, [10, 20]),
        ({"keep": 5}, {10: None, 20: None}, []),
        ({"keep": 1, "keep_every_steps": 20}, {10: None, 20: None, 30: None, 40: None, 50: None}, [10, 30]),
        ({"keep": 1, "keep_best": True}, {10: 3.0, 20: 1.0, 30: 2.0, 40: None}, [10, 30]),
        ({"keep": 1, "keep_best": True}, {10: 2.0, 20: 2.0, 30: 2.0}, [20]),
        ({"keep": 1, "keep_best": True}, {10: None, 20: None}, [10]),
        ({"keep": 1, "keep_best": False}, {10: 1.0, 20: 2.0}, [10]),
        ({"keep": 1, "keep_best": True, "keep_every_steps": 30}, {10: 1.0, 20: 2.0, 30: 4.0, 40: 3.0}, [20]),
        ({"keep": 3}, {}, []),
    ],
)
def test_retention(settings: dict[str, object], metrics: dict[int, float | None], removed: list[int]) -> None:
    assert steps_to_remove(metrics, CheckpointConfig.model_validate(settings)) == removed


@pytest.mark.parametrize("async_save", [True, False])
def test_saves_are_kept_by_the_rules_and_the_best_survives_a_resume(tmp_path: Path, async_save: bool) -> None:
    options = {"keep": 1, "keep_best": True, "async_save": async_save}
    first = manager(tmp_path, **options)
    for step, metric in [(1, 3.0), (2, 1.0), (3, float("nan"))]:
        first.save(step, state_fragments(step), {"step": step}, nothing, metric)
    first.finish()
    assert first.latest_steps() == [3, 2]
    second = manager(tmp_path, **options)
    second.save(4, state_fragments(4), {"step": 4}, nothing, 2.0)
    second.finish()
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert open_checkpoint(tmp_path / "step-00000002").about == {"engine": "torch", "metric": 1.0}


def test_an_asynchronous_save_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    """Training goes on at once: what it changes, even in place, is not in the checkpoint."""
    live = torch.arange(6.0).reshape(2, 3).t()
    saver, release = manager(tmp_path, async_save=True), threading.Event()
    saver.save(1, [Fragment.whole("w", "master", live)], {}, lambda: release.wait(10))
    expected = bits(live)
    live += 1
    assert checkpoint_steps(tmp_path) == []
    release.set()
    # The second save uses the same host memory: it must wait for the first.
    saver.save(2, [Fragment.whole("w", "master", live)], {}, nothing)
    assert saver.latest_steps()[-1:] == [1]
    saver.finish()
    box = Box.whole((3, 2))
    assert bits(open_checkpoint(tmp_path / "step-00000001").read("w", "master", box)) == expected
    assert bits(open_checkpoint(tmp_path / "step-00000002").read("w", "master", box)) == bits(live)


@pytest.mark.parametrize("async_save", [True, False])
def test_before_publish_runs_when_all_is_written_and_nothing_visible(tmp_path: Path, async_save: bool) -> None:
    seen: list[list[str]] = []
    saver = manager(tmp_path, async_save=async_save)

    def look() -> None:
        seen.append(names(tmp_path) + names(tmp_path / "writing-step-00000001"))

    saver.save(1, state_fragments(), {}, look)
    saver.finish()
    assert len(seen) == 1
    assert seen[0][0] == "writing-step-00000001"
    assert "manifest.json.sha256" in seen[0]
    assert names(tmp_path) == ["step-00000001"]


def test_the_newest_valid_one_is_found_and_damaged_ones_are_set_aside(tmp_path: Path) -> None:
    warnings: list[str] = [""]
    for step in (5, 10, 15):
        save(tmp_path, step)
    (tmp_path / "step-00000015" / MANIFEST).unlink()
    with (tmp_path / "step-00000010" / "rank-00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xaa")
    finder = manager(tmp_path, warnings)
    reader = finder.newest_valid()
    assert reader is not None
    assert reader.step == 5
    assert names(tmp_path) == ["damaged-step-00000010", "damaged-step-00000015", "step-00000005"]
    assert "manifest.json: is missing" in warnings[1]
    assert "sha256" in warnings[2]
    finder.save(10, state_fragments(), {}, nothing)
    finder.finish()
    newest = finder.newest_valid()
    assert newest is not None
    assert newest.step == 10


def test_old_ones_that_a_dead_run_has_left_are_removed_once_the_newest_is_known_to_be_whole(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    spoiled = tmp_path / "step-00000015" / "state.json"
    content = spoiled.read_bytes()
    spoiled.write_bytes(b"")
    assert manager(tmp_path, keep=1).newest_valid() is not None
    assert names(tmp_path) == ["damaged-step-00000015", "step-00000005", "step-00000010"]
    (tmp_path / "damaged-step-00000015").rename(spoiled.parent)
    spoiled.write_bytes(content)
    assert manager(tmp_path, keep=1).newest_valid() is not None
    assert names(tmp_path) == ["step-00000015"]


def test_no_checkpoint_is_none_but_no_valid_one_is_an_error(tmp_path: Path) -> None:
    """A run whose checkpoints are all damaged must not silently start again from nothing, now or at the next start."""
    folder = tmp_path / "checkpoints"
    assert manager(folder).newest_valid() is None
    save(folder, 5)
    (folder / "step-00000005" / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of the 1 checkpoints is valid"):
            manager(folder).newest_valid()
    assert names(folder) == ["step-00000005"]


def test_a_newer_format_is_not_set_aside(tmp_path: Path) -> None:
    from tests.unit.checkpoint.test_reader import forge

    save(tmp_path, 5)
    forge(save(tmp_path, 10), schema_version=99)
    with pytest.raises(CheckpointUnusableError, match="newer"):
        manager(tmp_path).newest_valid()
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def test_an_explicit_path_never_falls_back(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000010"):
        open_checkpoint(tmp_path / "step-00000010")


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    saver = manager(tmp_path)
    for value in (1, 2):
        saver.save(5, state_fragments(value), {"value": value}, nothing)
        saver.finish()
    assert names(tmp_path) == ["step-00000005"]
    assert open_checkpoint(tmp_path / "step-00000005").state == {"value": 2}


def test_a_run_that_went_back_leaves_the_later_checkpoints(tmp_path: Path) -> None:
    warnings: list[str] = [""]
    saver = manager(tmp_path, warnings, keep=1)
    for step in (5, 10, 15):
        save(tmp_path, step)
    saver.save(7, state_fragments(), {}, nothing)
    saver.finish()
    assert saver.latest_steps() == [7]
    assert names(tmp_path) == ["step-00000007", "superseded-step-00000010", "superseded-step-00000015"]
    assert len(warnings) == 3


def test_what_a_killed_save_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10).rename(tmp_path / "replaced-step-00000010")
    for name in ("writing-step-00000015", "removing-step-00000001", "removing-replaced-step-00000002", "my-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    manager(tmp_path)
    assert names(tmp_path) == ["my-notes", "step-00000005", "step-00000010"]
    open_checkpoint(tmp_path / "step-00000010")

"""Death at any moment of a save: what was saved before stays, nothing half appears, nothing is left behind."""

import itertools
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmtrain.checkpoint import manager as manager_module
from llmtrain.checkpoint import tensor_file, writer
from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.values.fragment import Fragment
from tests.support.mortality import die_at, in_child, on_file_operations, only_within
from tests.unit.checkpoint.saved import save, state_fragments
from tests.unit.checkpoint.voices import Board, Voice

POINTS = 20


@dataclass(frozen=True)
class Scene:
    """A life of checkpoints that a kill may end, and the names that lie there in the end.

    `play` does what a run does that continues from the step `first`, that step included. `mortal` are functions of the
    manager: the process may die in them only, or anywhere where there are none.
    """

    prepare: Callable[[Path], None]
    play: Callable[[CheckpointManager, list[Fragment], int], None]
    names: list[str]
    keep: int = 100
    mortal: tuple[str, ...] = ()


def prepare_two(folder: Path) -> None:
    for step in (5, 10):
        save(folder, step)


def write_and_replace(manager: CheckpointManager, fragments: list[Fragment], first: int) -> None:
    for step in (20, 30, 30):
        if step >= first:
            manager.save(step, fragments, {"step": step}, lambda: None)
    manager.finish()


def prepare_left_and_damaged(folder: Path) -> None:
    for step in (5, 10, 20, 30):
        save(folder, step)
    (folder / "step-00000030" / "state.json").write_text("{}")


def go_back_and_remove(manager: CheckpointManager, fragments: list[Fragment], first: int) -> None:
    """The newest is damaged, the run goes back to step 10 and leaves 20, and keeps one checkpoint."""
    for step in (12, 13):
        if step >= first or first == 20:
            manager.save(step, fragments, {"step": step}, lambda: None)
    manager.finish()


SCENES = {
    "write": Scene(prepare_two, write_and_replace, [f"step-{step:08d}" for step in (5, 10, 20, 30)]),
    "remove": Scene(
        prepare_left_and_damaged,
        go_back_and_remove,
        ["damaged-step-00000030", "step-00000013", "superseded-step-00000020"],
        keep=1,
        mortal=("_set_aside", "_remove_old"),
    ),
}


def play(scene: Scene, folder: Path, world_size: int, async_save: bool, first: int = 0) -> None:
    """The scene with all its ranks, as threads of this process, from the step `first` on."""
    board = Board()
    settings = CheckpointConfig(keep=scene.keep, async_save=async_save, on_save_error="stop")
    whole = state_fragments()
    parts = [whole] if world_size == 1 else [whole[:2], whole[2:]]

    def one(rank: int) -> None:
        voice = Voice(board, rank, world_size) if world_size > 1 else None
        manager = CheckpointManager(folder, settings, "", {}, Reports(lambda _: None), voice)
        if rank == 0:  # it decides what to continue from
            manager.newest_valid()
        scene.play(manager, parts[rank], first)

    with ThreadPoolExecutor(world_size) as threads:
        for future in [threads.submit(one, rank) for rank in range(world_size)]:
            future.result()


def disturbed(scene: Scene, folder: Path, tell: Callable[..., object], world_size: int, async_save: bool) -> int:
    def child() -> None:
        on_file_operations(only_within(CheckpointManager, scene.mortal, tell) if scene.mortal else tell)
        play(scene, folder, world_size, async_save)

    scene.prepare(folder)
    return in_child(child)


def number_of_operations(scene: Scene, folder: Path, world_size: int, async_save: bool) -> int:
    """File operations of the scene; all kinds of its work are among them."""
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write = os.write
    assert disturbed(scene, folder, lambda name, _: write(log, name.encode() + b" "), world_size, async_save) == 0
    os.close(log)
    seen = folder.with_suffix(".log").read_text().split()
    wanted = {"rename", "fsync", "unlink", "rmdir"} | (set() if scene.mortal else {"write", "open", "mkdir"})
    assert wanted <= set(seen)
    assert names(folder) == scene.names
    return len(seen)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def whole_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints that are whole. Only the one that was damaged on purpose may not be."""
    steps = []
    for path in sorted(folder.glob("step-*")):
        try:
            steps.append(open_checkpoint(path).step)
        except CheckpointError:
            assert path.name == "step-00000030"
            assert (path / "state.json").read_text() == "{}"
    return steps


def assert_survived(scene: Scene, folder: Path, world_size: int, async_save: bool) -> None:
    """After a kill: nothing half is visible, a resume takes the newest whole one, and the same saves work."""
    published = whole_steps(folder)
    manager = CheckpointManager(folder, CheckpointConfig(keep=100), "", {}, Reports(lambda _: None))
    assert all(name.startswith(("step-", "damaged-step-", "superseded-step-")) for name in names(folder))
    steps = whole_steps(folder)
    assert set(published) <= set(steps)
    assert max(steps) >= 10, "what was there before must still be there"
    assert not {12, 20} <= set(steps), "what the run has left would be its newest"
    reader = manager.newest_valid()
    assert reader is not None
    assert reader.step == max(steps)
    play(scene, folder, world_size, async_save, first=reader.step)
    assert names(folder) == scene.names


def kill_everywhere(scene: Scene, folder: Path, world_size: int, async_save: bool) -> None:
    """One kill in each of `POINTS` equal parts of the scene."""
    total = number_of_operations(scene, folder / "dry", world_size, async_save)
    draw = random.Random(total)
    for point in range(POINTS):
        number = 1 + (point * total + draw.randrange(total)) // POINTS
        checkpoints = folder / f"killed-at-{number}-{point}"
        assert disturbed(scene, checkpoints, die_at(number), world_size, async_save) == -signal.SIGKILL, number
        assert_survived(scene, checkpoints, world_size, async_save)


@pytest.mark.parametrize(
    ("name", "world_size", "async_save"),
    [
        ("write", 1, False),
        ("write", 2, True),
        ("remove", 1, True),
        ("remove", 2, False),
        pytest.param("write", 1, True, marks=pytest.mark.whole_grid),
        pytest.param("write", 2, False, marks=pytest.mark.whole_grid),
        pytest.param("remove", 1, False, marks=pytest.mark.whole_grid),
        pytest.param("remove", 2, True, marks=pytest.mark.whole_grid),
    ],
)
def test_twenty_kills_leave_whole_checkpoints_only(
    tmp_path: Path, name: str, world_size: int, async_save: bool
) -> None:
    kill_everywhere(SCENES[name], tmp_path, world_size, async_save)


def test_a_writer_without_the_rename_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written under its own name from the start, a checkpoint is half there when the process dies."""
    monkeypatch.setattr(writer, "writing_folder_name", writer.step_folder_name)
    monkeypatch.setattr(writer, "_put_in_place", lambda folder, target: target)
    scene = Scene(prepare_two, lambda manager, fragments, _: manager.save(20, fragments, {}, lambda: None), [])
    assert disturbed(scene, tmp_path, die_at(8), 1, False) == -signal.SIGKILL
    with pytest.raises(AssertionError):
        assert_survived(scene, tmp_path, 1, False)


def test_a_removal_under_its_own_name_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted file by file where it stands, an old checkpoint is half there when the process dies."""
    monkeypatch.setattr(manager_module, "remove_checkpoint", writer.shutil.rmtree)
    scene = SCENES["remove"]
    caught = 0
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        if disturbed(scene, folder, die_at(number), 1, False) == 0:
            break
        try:
            assert_survived(scene, folder, 1, False)
        except AssertionError:
            caught += 1
    assert caught > 5


def test_a_kill_inside_a_tensor_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def half_a_write(descriptor: int, data: memoryview) -> None:
        os.write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        tensor_file.write_all = half_a_write
        play(SCENES["write"], tmp_path, 1, False)

    assert in_child(child) == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.glob("step-*")] == ["step-00000005"]
    assert list(tmp_path.glob("writing-*/*.safetensors"))
    assert CheckpointManager(tmp_path, CheckpointConfig(), "", {}).latest_steps() == [5]
    assert not list(tmp_path.glob("writing-*"))

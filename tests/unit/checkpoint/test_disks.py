"""Disks that are full, read-only or broken: what was saved stays, nothing half appears, training goes on."""

import errno
import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import SaveError
from llmtrain.values.fragment import Box, Fragment
from llmtrain.words import bytes_text
from tests.support.mortality import in_child, on_file_operations
from tests.unit.checkpoint.saved import save, state_fragments
from tests.unit.checkpoint.voices import Board, Voice

Events = list[tuple[str, dict[str, Any]]]
"""Names and facts of what was to be recorded."""


def new_manager(folder: Path, events: Events | None = None, **settings: object) -> CheckpointManager:
    def record(event: str, **facts: object) -> None:
        if events is not None:
            events.append((event, facts))

    config = CheckpointConfig.model_validate({"async_save": False, **settings})
    return CheckpointManager(folder, config, "", {}, Reports(lambda _: None, record))


def large_state() -> list[Fragment]:
    return [Fragment.whole("w", "master", torch.zeros(1 << 18))]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def nothing() -> None:
    pass


REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def save_with_a_fault(folder: Path, number: int, world_size: int, async_save: bool) -> tuple[bool, bool]:
    """Save step 20 on all ranks while file operation `number` fails, then step 21: (failed, whether it came so far).

    For a process of its own.
    """
    board, events, calls = Board(), Events(), itertools.count(1)
    whole = state_fragments(seed=1)
    parts = [whole] if world_size == 1 else [whole[:2], whole[2:]]
    managers = [new_manager(folder, events, async_save=async_save, keep=100) for _ in range(world_size)]
    for rank, manager in enumerate(managers):
        manager._ranks = Voice(board, rank, world_size) if world_size > 1 else None

    def fail(_: str, args: tuple[Any, ...]) -> None:
        if next(calls) == number:
            code = REFUSALS[number % len(REFUSALS)]
            raise OSError(code, os.strerror(code), str(args[0]))

    def one(rank: int) -> str:
        managers[rank].save(20, parts[rank], {"seed": 1}, nothing)
        try:
            managers[rank].finish()
        except SaveError as error:
            return str(error)
        return ""

    on_file_operations(fail)
    with ThreadPoolExecutor(world_size) as threads:
        errors = list(threads.map(one, range(world_size)))
        reached = next(calls) > number
        failed = errors[0] != ""
        assert all((error != "") == failed for error in errors), "the ranks do not agree"
        assert [name for name, _ in events] == (["save_failed"] if failed else [])
        assert all(str(folder) in error for error in errors if failed)
        assert open_checkpoint(folder / "step-00000020").state.get("seed") == (None if failed else 1)
        assert not list(folder.glob("writing-*"))
        list(threads.map(lambda rank: managers[rank].save(21, parts[rank], {"seed": 1}, nothing), range(world_size)))
        list(threads.map(lambda rank: managers[rank].finish(), range(world_size)))
    assert names(folder) == ["step-00000005", "step-00000020", "step-00000021"]
    open_checkpoint(folder / "step-00000021")
    return failed, reached


@pytest.mark.parametrize(
    ("world_size", "async_save"),
    [
        (1, False),
        (2, True),
        pytest.param(1, True, marks=pytest.mark.whole_grid),
        pytest.param(2, False, marks=pytest.mark.whole_grid),
    ],
)
def test_whatever_operation_fails_all_ranks_agree_and_go_on(tmp_path: Path, world_size: int, async_save: bool) -> None:
    """Each file operation of a save fails once, on whichever rank does it: the checkpoint is whole or not there."""
    failures, ended = 0, tmp_path / "ended"
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        for step in (5, 20):  # the second is replaced
            save(folder, step)

        def child(number: int = number, folder: Path = folder) -> None:
            result = save_with_a_fault(folder, number, world_size, async_save)
            ended.write_text("".join("X" if fact else "-" for fact in result))

        assert in_child(child) == 0, f"operation {number}"
        failed, reached = (letter == "X" for letter in ended.read_text())
        failures += failed
        if not reached:
            break
    assert failures > 15


def test_a_failed_save_is_told_once_and_the_end_must_be_saved(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events, warnings = Events(), []
    saver = new_manager(tmp_path, events, async_save=True)
    saver.reports.warn = warnings.append
    saver.save(1, state_fragments(), {}, full)
    saver.wait()
    saver.poll()
    assert [(name, facts["step"]) for name, facts in events] == [("save_failed", 1)]
    assert "step 1 is not saved (checkpoint.on_save_error = continue): " in warnings[0]
    assert "No space left on device. Needed: " in warnings[0]
    saver.save(2, state_fragments(), {}, nothing)
    saver.finish()
    assert names(tmp_path) == ["step-00000002"]
    saver.save(3, state_fragments(), {}, full)
    with pytest.raises(SaveError, match="writing-step-00000003"):
        saver.finish()
    assert len(warnings) == 2
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_save_stops_the_run_where_it_shall(tmp_path: Path, async_save: bool) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = new_manager(tmp_path, async_save=async_save, on_save_error="stop")
    with pytest.raises(SaveError, match="No space left"):
        saver.save(1, state_fragments(), {}, full)
        saver.wait()


def test_training_goes_on_without_an_audit_log(tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "audit.jsonl")

    warnings: list[str] = []
    saver = CheckpointManager(tmp_path, CheckpointConfig(), "", {}, Reports(warnings.append, full))
    saver.save(1, state_fragments(), {}, full)
    saver.wait()
    assert "audit.jsonl: save_failed is not in the audit log: No space left on device" in warnings[0]
    assert "step 1 is not saved (checkpoint.on_save_error = continue): " in warnings[1]


def test_training_goes_on_without_a_log(tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rank-00000.log")

    saver = CheckpointManager(tmp_path, CheckpointConfig(async_save=False), "", {}, Reports(full))
    saver.save(1, state_fragments(), {}, full)
    saver.save(2, state_fragments(), {}, nothing)
    saver.finish()
    assert names(tmp_path) == ["step-00000002"]


def test_a_defect_is_no_failed_save(tmp_path: Path) -> None:
    saver = new_manager(tmp_path)
    with pytest.raises(ValueError, match="is not inside the shape"):
        saver.save(1, [Fragment("w", "master", (4, 3), Box((0, 0), (2, 4)), torch.zeros(2, 4))], {}, nothing)


def test_a_full_disk_is_named_and_the_next_save_works(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """RLIMIT_FSIZE makes the kernel refuse a write in the middle, everywhere and for root too."""

    def child() -> None:
        manager = new_manager(tmp_path)
        manager.save(1, state_fragments(), {}, nothing)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        manager.save(2, large_state(), {}, nothing)
        try:
            manager.finish()
        except SaveError as error:
            print(error, flush=True)
        else:
            raise AssertionError("the write went through")
        assert names(tmp_path) == ["step-00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        manager.save(3, large_state(), {}, nothing)
        manager.finish()

    assert in_child(child) == 0
    message = capfd.readouterr().out
    assert "writing-step-00000002/rank-00000.safetensors" in message
    assert "Needed: 1.05 MB (1,048,576 bytes). Free: " in message
    assert "ulimit -f" in message
    assert new_manager(tmp_path).latest_steps() == [3, 1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_small_disk_is_seen_before_writing(small_disk: Path) -> None:
    saver = new_manager(small_disk)
    saver.save(2, [*large_state(), Fragment.whole("scale", "master", torch.zeros(()))], {}, nothing)
    with pytest.raises(SaveError) as caught:
        saver.finish()
    # All of it is free: nothing had been written yet.
    free = bytes_text(shutil.disk_usage(small_disk).free)
    assert f"Needed: 1.05 MB (1,048,580 bytes). Free: {free}. Free space there" in str(caught.value)
    assert names(small_disk) == []


def test_a_disk_that_fills_up_while_writing(small_disk: Path) -> None:
    """Another process takes the room between the look and the write; once it is free again, saving works again."""
    checkpoints, hog = small_disk / "checkpoints", small_disk / "hog"
    events = Events()
    saver = new_manager(checkpoints, events, keep=1)
    state = [Fragment.whole("w", "master", torch.zeros(1 << 16))]  # 256 KiB
    saver.save(1, state, {}, nothing)

    with pytest.MonkeyPatch.context() as patch:
        # It returns None: nobody can say how much is free.
        patch.setattr(
            "llmtrain.checkpoint.writer.free_bytes", lambda folder: hog.write_bytes(bytes(640 << 10)) and None
        )
        saver.save(2, state, {}, nothing)
    with pytest.raises(SaveError, match=r"No space left on device. Needed: 262 kB \(262,144 bytes\). Free: "):
        saver.finish()
    assert names(checkpoints) == ["step-00000001"]
    open_checkpoint(checkpoints / "step-00000001")
    hog.unlink()
    saver.save(3, state, {}, nothing)
    saver.finish()
    assert names(checkpoints) == ["step-00000003"]
    assert [name for name, _ in events] == ["save_failed"]


def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    """As a file system that the kernel gives up after an error; binds root as well."""
    saver = new_manager(small_disk)
    saver.save(1, state_fragments(), {}, nothing)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    saver.save(2, state_fragments(), {}, nothing)
    with pytest.raises(SaveError, match=r"Read-only file system.*Make the folder writable"):
        saver.finish()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    saver.save(3, state_fragments(), {}, nothing)
    saver.finish()
    assert names(small_disk) == ["step-00000001", "step-00000003"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    """No permission is needed to refuse this, so it refuses root as well."""
    checkpoints = tmp_path / "checkpoints"
    saver = new_manager(checkpoints)
    checkpoints.write_text("")
    saver.save(1, state_fragments(), {}, nothing)
    with pytest.raises(SaveError, match=r"checkpoints/writing-step-00000001.*Not a directory.*move it away"):
        saver.finish()


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    tmp_path.chmod(0o555)

    def child() -> None:
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.setuid(65534)  # permissions do not bind root
        saver = new_manager(Path())
        saver.save(2, state_fragments(), {}, nothing)
        try:
            saver.finish()
        except SaveError as error:
            print(error, flush=True)
        else:
            raise AssertionError("the write went through")

    try:
        assert in_child(child) == 0
    finally:
        tmp_path.chmod(0o755)
    assert "writing-step-00000002: the checkpoint could not be written: Permission denied" in capfd.readouterr().out
    assert names(tmp_path) == ["step-00000001"]

"""Death and full disks at any moment of a save: what was saved before stays, nothing half appears."""

import os
import random
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.checkpoint import tensor_file
from llmtrain.checkpoint.folders import step_folder_name
from llmtrain.checkpoint.fragments import Fragment
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import CheckpointError
from tests.unit.checkpoint.saved import save, state_fragments

SYSTEM_CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "open")


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit status as `os.waitstatus_to_exitcode` gives it.

    The child computes with one thread: a pool of threads that this process has started does not live on in it, and
    would be waited for without end.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def new_manager(folder: Path) -> CheckpointManager:
    return CheckpointManager(folder, CheckpointConfig(keep=2, async_save=False, on_save_error="stop"), "", {})


def save_three(folder: Path) -> None:
    """Saves that write, delete (keep = 2) and replace (step 20 twice)."""
    manager = new_manager(folder)
    for step in (20, 30, 30):
        manager.save(step, state_fragments(step), {"step": step}, lambda: None)


def count_calls(on_call: Callable[[str], None]) -> None:
    """Call `on_call` before each system call of a save. Only for a forked child: nothing puts it back."""
    for name in SYSTEM_CALLS:
        original = getattr(os, name)

        def counted(*args: object, _original: Callable = original, _name: str = name, **kwargs: object) -> object:
            on_call(_name)
            return _original(*args, **kwargs)

        setattr(os, name, counted)


def kill_at(target: int) -> Callable[[str], None]:
    calls = 0

    def on_call(_: str) -> None:
        nonlocal calls
        calls += 1
        if calls == target:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_call


def number_of_calls(folder: Path) -> int:
    log = folder.with_name("calls")

    def child() -> None:
        seen: list[str] = []
        count_calls(seen.append)
        save_three(folder)
        Path(log).write_text(" ".join(seen))

    prepare(folder)
    assert in_child(child) == 0
    seen = log.read_text().split()
    assert seen.count("rename") >= 6
    assert "rmdir" in seen
    return len(seen)


def prepare(folder: Path) -> None:
    for step in (5, 10):
        save(folder, step)


@pytest.mark.parametrize("seed", range(10))
def test_sigkill_at_a_random_call_leaves_whole_checkpoints_only(tmp_path: Path, seed: int) -> None:
    total = number_of_calls(tmp_path / "dry")
    # One point in each tenth of the save, so that writing, renaming and deleting are all hit.
    target = 1 + (seed * total + random.Random(seed).randrange(total)) // 10
    folder = tmp_path / "checkpoints"
    prepare(folder)

    def child() -> None:
        count_calls(kill_at(target))
        save_three(folder)

    assert in_child(child) == -signal.SIGKILL
    for path in folder.glob("step-*"):
        open_checkpoint(path)
    manager = new_manager(folder)
    assert all(entry.name.startswith("step-") for entry in folder.iterdir())
    before = manager.latest_steps()
    reader = manager.newest_valid()
    assert reader is not None
    assert reader.step == before[0]
    assert reader.step >= 10, "what was there before must still be there"
    save_three(folder)
    assert new_manager(folder).latest_steps() == [30, 20]


def test_sigkill_inside_a_tensor_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def half_a_write(descriptor: int, data: memoryview) -> None:
        os.write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        tensor_file.write_all = half_a_write
        save_three(tmp_path)

    assert in_child(child) == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.glob("step-*")] == ["step-00000005"]
    assert list(tmp_path.glob("writing-*/*.safetensors"))
    assert new_manager(tmp_path).latest_steps() == [5]
    assert not list(tmp_path.glob("writing-*"))


def large_state() -> list[Fragment]:
    return [Fragment.whole("w", "master", torch.zeros(1 << 18))]


def test_a_full_disk_is_named_and_the_next_save_works(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write as a full disk or quota would."""

    def child() -> None:
        manager = new_manager(tmp_path)
        manager.save(1, state_fragments(), {}, lambda: None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        try:
            manager.save(2, large_state(), {}, lambda: None)
        except CheckpointError as error:
            print(error, flush=True)
        else:
            raise AssertionError("the write went through")
        assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        manager.save(3, large_state(), {}, lambda: None)

    assert in_child(child) == 0
    message = capfd.readouterr().out
    assert "writing-step-00000002/rank-00000.safetensors" in message
    assert "Needed: 1.05 MB (1,048,576 bytes). Free: " in message
    assert new_manager(tmp_path).latest_steps() == [3, 1]


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10, used=9, free=1))
    with pytest.raises(CheckpointError, match=r"No space left on device. Needed: 1.05 MB \(1,048,576 bytes\). Free: 1 bytes"):
        new_manager(tmp_path).save(2, large_state(), {}, lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    tmp_path.chmod(0o555)

    def child() -> None:
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.setuid(65534)  # permissions do not bind root
        try:
            new_manager(Path()).save(2, state_fragments(), {}, lambda: None)
        except CheckpointError as error:
            print(error, flush=True)
        else:
            raise AssertionError("the write went through")

    try:
        assert in_child(child) == 0
    finally:
        tmp_path.chmod(0o755)
    assert "writing-step-00000002: the checkpoint could not be written: Permission denied" in capfd.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == [step_folder_name(1)]

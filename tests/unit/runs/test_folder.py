"""One writer per run folder, however the last one ended."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

from llmtrain.errors import DataError, LlmtrainError, RunFolderInUseError
from llmtrain.files import sealed, unsealed
from llmtrain.runs import folder
from llmtrain.runs.file_system import folder_fault
from llmtrain.runs.folder import LEASE_SECONDS, LOCK, RunFolder
from llmtrain.runs.status import read_status

fork = multiprocessing.get_context("fork")


def dead_process() -> int:
    """The id of a process that has just ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def edit_lock(folder: Path, **changes: object) -> None:
    """Rewrite the lock as another owner would have left it."""
    content = json.loads((folder / LOCK).read_bytes())
    (folder / LOCK).write_text(json.dumps(content | changes))


def abandoned(folder: Path, **changes: object) -> None:
    """A lock whose owner ended without releasing it."""
    owner = RunFolder(folder)
    content = (folder / LOCK).read_text()
    owner.close()
    (folder / LOCK).write_text(content)
    edit_lock(folder, token="other", **changes)


def test_a_second_writer_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "runs" / "a") as first:
        first.ensure_held()
        with pytest.raises(RunFolderInUseError) as caught:
            RunFolder(tmp_path / "runs" / "a")
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert f"process {os.getpid()} on {folder.socket.gethostname()} since 2" in message
    assert "choose another name" in message
    with RunFolder(tmp_path / "runs" / "a"):
        pass
    assert list((tmp_path / "runs" / "a").iterdir()) == []


def test_a_lock_that_is_the_same_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row asks, many times a second; another process's lock is noticed by the next question all the same."""
    reads = []
    read, now = folder.read_owner, 0.0
    monkeypatch.setattr(folder, "read_owner", lambda lock: (reads.append(lock), read(lock))[1])
    monkeypatch.setattr(folder.time, "monotonic", lambda: now)
    with RunFolder(tmp_path) as owner:
        reads.clear()
        for _ in range(5):
            owner.ensure_held()
        assert len(reads) == 1
        now += folder.READ_SECONDS  # a file system of the network may show an old file
        owner.ensure_held()
        os.utime(tmp_path / LOCK)  # a renewal
        owner.ensure_held()
        owner.ensure_held()
        assert len(reads) == 3
        other = tmp_path / "other"
        other.write_bytes((tmp_path / LOCK).read_bytes())
        other.replace(tmp_path / LOCK)
        edit_lock(tmp_path, token="other")
        with pytest.raises(RunFolderInUseError, match="taken over by process"):
            owner.ensure_held()
        with pytest.raises(RunFolderInUseError, match="taken over by process"):
            owner.ensure_held()


def test_a_dead_owner_is_replaced_at_once(tmp_path: Path) -> None:
    abandoned(tmp_path, pid=dead_process())
    with RunFolder(tmp_path) as owner:
        owner.ensure_held()


def test_a_killed_owner_is_replaced_at_once_even_before_it_is_reaped(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        RunFolder(tmp_path)
        signal.pause()
    while not (tmp_path / LOCK).exists():
        time.sleep(0.01)
    with pytest.raises(RunFolderInUseError, match=f"process {child} on"):
        RunFolder(tmp_path)
    os.kill(child, signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(RunFolderInUseError):
        RunFolder(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with RunFolder(tmp_path) as owner:
        owner.ensure_held()
    os.waitpid(child, 0)


def test_a_process_id_in_use_again_is_recognized_by_its_start(tmp_path: Path) -> None:
    abandoned(tmp_path, pid=os.getpid())
    with pytest.raises(RunFolderInUseError):
        RunFolder(tmp_path)
    edit_lock(tmp_path, process_started="1")
    with RunFolder(tmp_path):
        pass


@pytest.mark.parametrize("change", [{"host": "other"}, {"machine": "another boot"}])
def test_on_another_machine_the_lease_decides(tmp_path: Path, change: dict[str, str]) -> None:
    """There a process id says nothing, even one that is dead here."""
    abandoned(tmp_path, pid=dead_process(), **change)
    now = time.time()
    os.utime(tmp_path / LOCK, (now, now - LEASE_SECONDS + 20))
    with pytest.raises(RunFolderInUseError):
        RunFolder(tmp_path)
    os.utime(tmp_path / LOCK, (now, now - LEASE_SECONDS - 1))
    with RunFolder(tmp_path):
        pass


def test_a_launch_takes_the_lock_of_its_earlier_attempt_at_once(tmp_path: Path) -> None:
    """Even of one that seems to live: its launcher knows better, and what it writes no more is its own affair."""
    first = RunFolder(tmp_path, launch_id="one")
    with pytest.raises(RunFolderInUseError):
        RunFolder(tmp_path, launch_id="other")
    with RunFolder(tmp_path, 1, launch_id="one"):
        with pytest.raises(RunFolderInUseError):
            first.ensure_held()
        first.close()
        with pytest.raises(RunFolderInUseError):
            RunFolder(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": 1}'])
def test_a_lock_without_sense_counts_until_its_lease_ends(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(RunFolderInUseError, match="cannot be understood"):
        RunFolder(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    with RunFolder(tmp_path):
        pass


def test_the_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "RENEW_SECONDS", 0.01)
    with RunFolder(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def contend(folder: Path, start: Barrier, results: Queue, release: Event) -> None:
    start.wait()
    try:
        with RunFolder(folder) as owner:
            owner.ensure_held()
            results.put("won")
            release.wait(60)  # hold it until all have tried
    except RunFolderInUseError:
        results.put("refused")


@pytest.mark.parametrize("stale", [True, False])
def test_of_processes_that_come_at_once_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    for turn in range(5):
        folder = tmp_path / f"run-{turn}"
        if stale:
            abandoned(folder, pid=dead_process())
        start, results, release = fork.Barrier(4), fork.Queue(), fork.Event()
        processes = [fork.Process(target=contend, args=(folder, start, results, release)) for _ in range(4)]
        for process in processes:
            process.start()
        found = sorted(results.get(timeout=60) for _ in processes)
        release.set()
        for process in processes:
            process.join(60)
        assert found == ["refused"] * 3 + ["won"]


def test_a_lost_lock_is_noticed_and_not_released(tmp_path: Path) -> None:
    owner = RunFolder(tmp_path)
    edit_lock(tmp_path, token="other", pid=4242, host="elsewhere")
    with pytest.raises(RunFolderInUseError, match="process 4242 on elsewhere"):
        owner.ensure_held()
    owner.close()
    assert (tmp_path / LOCK).exists()


EXITS_WHILE_HOLDING = """
import os, sys
from pathlib import Path
from llmtrain.runs.folder import LOCK, RunFolder

folder = Path(sys.argv[1])
RunFolder(folder)
child = os.fork()
if child == 0:
    sys.exit()  # runs the exit handlers that it inherited
os.waitpid(child, 0)
assert (folder / LOCK).exists(), "the child released its parent's lock"
"""


def test_the_lock_is_released_at_exit_and_not_by_a_forked_child(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", EXITS_WHILE_HOLDING, str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_status_round_trip(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    with RunFolder(tmp_path) as owner:
        owner.write_status("running", 3, 200)
        owner.verdict = "persistent: step 40 skipped"
        owner.write_status("preempted", 40, 200, "told to stop")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.status, status.step, status.total_steps, status.message) == ("preempted", 40, 200, "told to stop")
    assert (status.pid, status.updated[:2]) == (os.getpid(), "20")
    assert status.next_action == "start the same command again: it continues"
    assert status.verdict == "persistent: step 40 skipped"
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_a_verdict_outlives_the_process_that_found_it(tmp_path: Path) -> None:
    """What the launcher writes when a run has failed, or the next attempt, does not take it away."""
    with RunFolder(tmp_path) as owner:
        owner.verdict = "persistent: step 40 skipped"
        owner.write_status("running", 40, 200)
    for status in ("stalled", "running"):
        with RunFolder(tmp_path) as owner:
            owner.write_status(status, 40, 200)
        found = read_status(tmp_path)
        assert found is not None and found.verdict == "persistent: step 40 skipped"
    (tmp_path / "status.json").write_text("{}")
    with RunFolder(tmp_path) as owner:
        owner.write_status("running", 40, 200)
    assert (found := read_status(tmp_path)) is not None and found.verdict == ""


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"status": "done"}'])
def test_a_damaged_status_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(DataError, match=r"status\.json: is not a status") as raised:
        read_status(tmp_path)
    assert "__init__" not in str(raised.value)


def test_a_changed_number_of_a_status_is_seen(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as owner:
        owner.write_status("done", 3, 3)
    file = tmp_path / "status.json"
    file.write_text(file.read_text().replace('"step": 3', '"step": 7'))
    with pytest.raises(DataError, match=r"status\.json: is not a status .* do not give the seal"):
        read_status(tmp_path)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if key != "seal"}))
    assert read_status(tmp_path), "of before"


def test_a_status_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as owner:
        owner.write_status("done", 3, 3)
    content = json.loads((tmp_path / "status.json").read_bytes())
    (tmp_path / "status.json").write_text(json.dumps(sealed(unsealed(content) | {"status": "on fire"})))
    with pytest.raises(
        DataError, match="status = on fire, allowed are running, restarting, done, preempted, failed, stalled"
    ):
        read_status(tmp_path)


def test_a_full_disk_leaves_nothing_of_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a disk takes a name, and no content."""

    def full(path: Path, *_: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder(tmp_path) as folder:
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(LlmtrainError, match=r"No space left on device\. Free space there"):
            folder.write_status("running", 1, 2)
        monkeypatch.undo()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(LlmtrainError, match="No space left on device"):
        RunFolder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_have_left_is_cleared(tmp_path: Path) -> None:
    forgotten, waiting = tmp_path / ".run.lock.dead", tmp_path / ".run.lock.alive"
    for path in (tmp_path / ".status.json.dead", forgotten, waiting):
        path.touch()
    os.utime(forgotten, (0, 0))
    with RunFolder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [waiting.name, LOCK]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """So are vfat, and most buckets that are mounted."""

    def refuse(source: object, target: object, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(LlmtrainError) as caught:
        RunFolder(tmp_path / "run")
    for part in (str(tmp_path / "run"), "has no hard links", os.strerror(number), "Set output_dir to"):
        assert part in str(caught.value)
    assert list((tmp_path / "run").iterdir()) == []
    fault = folder_fault(tmp_path / "runs" / "later")
    assert fault is not None and f"{tmp_path} is on" in fault and "has no hard links" in fault
    monkeypatch.undo()
    assert folder_fault(tmp_path / "runs" / "later") is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    abandoned(tmp_path, pid=dead_process())
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LlmtrainError, match=r"run\.lock: .* has no locks on files \(flock: Function not implemented"):
        RunFolder(tmp_path)


def test_folders_that_cannot_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "further")
    faults = {
        "file/runs": "is a file",
        "file": "is a file",
        "x" * 300: "File name too long",
        "dangling/runs": "No such file or directory",
        "a\0b": "null byte",
    }
    for wanted, fault in faults.items():
        assert fault in (folder_fault(tmp_path / wanted) or ""), wanted


def test_a_folder_that_cannot_be_made_is_a_users_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmtrainError, match="cannot be used: Not a directory"):
        RunFolder(tmp_path / "file" / "run")

"""The order of a save: training waits for the copy only, and a name appears once all behind it is on the disk."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.writer import HostCopy
from llmtrain.config.schema import CheckpointConfig
from llmtrain.values.fragment import Fragment
from tests.support.mortality import in_child, on_file_operations
from tests.unit.checkpoint.saved import state_fragments


def test_training_waits_for_the_copy_only_and_a_save_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    second_copy = threading.Event()
    take = HostCopy.take

    def noted(self: HostCopy, fragments: Iterable[Fragment]) -> list[Fragment]:
        events.append("copy")
        if events.count("copy") == 2:
            second_copy.set()
        return take(self, fragments)

    monkeypatch.setattr(HostCopy, "take", noted)
    manager = CheckpointManager(tmp_path, CheckpointConfig(async_save=True), "", {})
    returned = threading.Event()

    def before_publish() -> None:
        assert returned.wait(60), "training waits for the writing"
        # Time for a second save that does not wait; one that does cannot come before this ends.
        second_copy.wait(0.3)
        events.append(f"written, {checkpoint_steps(tmp_path)} visible")

    manager.save(1, state_fragments(), {}, before_publish)
    events.append("back in training")
    returned.set()
    manager.save(2, state_fragments(), {}, lambda: events.append(f"written, {checkpoint_steps(tmp_path)} visible"))
    manager.finish()
    assert events == ["copy", "back in training", "written, [] visible", "copy", "written, [1] visible"]
    assert checkpoint_steps(tmp_path) == [2, 1]


def operations_of_a_save(folder: Path) -> list[tuple[str, str]]:
    """(operation, path) in order, paths relative to the folder; `published` marks the call of before_publish."""
    log = folder.with_name("operations")
    seen: list[tuple[str, str]] = []

    def child() -> None:
        def note(name: str, args: tuple[Any, ...]) -> None:
            target = Path(f"/proc/self/fd/{args[0]}").readlink() if isinstance(args[0], int) else os.fspath(args[0])
            seen.append((name, os.path.relpath(target, folder)))

        manager = CheckpointManager(folder, CheckpointConfig(), "name: x\n", {})
        on_file_operations(note)
        manager.save(7, state_fragments(), {}, lambda: seen.append(("published", "")))
        manager.finish()
        log.write_text("\n".join(" ".join(entry) for entry in seen))

    assert in_child(child) == 0
    return [(line.split(" ")[0], line.split(" ")[1]) for line in log.read_text().splitlines()]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for the path behind a descriptor")
def test_files_then_manifest_then_the_name_each_on_the_disk_before_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    seen = operations_of_a_save(folder)
    writing = "writing-step-00000007"
    order = [f"{writing}/{name}" for name in ("rank-00000.safetensors", "config.yaml", "state.json", "manifest.json")]
    order.append(f"{writing}/manifest.json.sha256")
    first = {path: seen.index(("open", path)) for path in order}
    synced = {path: seen.index(("fsync", path)) for path in order}
    for path in order:
        writes = [number for number, entry in enumerate(seen) if entry == ("write", path)]
        assert first[path] < min(writes) <= max(writes) < synced[path]
    for path in order[:3]:
        assert synced[path] < first[f"{writing}/manifest.json"]
    folder_synced, renamed = seen.index(("fsync", writing)), seen.index(("rename", writing))
    assert max(synced.values()) < folder_synced < seen.index(("published", "")) < renamed
    assert renamed < seen.index(("fsync", "."))

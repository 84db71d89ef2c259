"""A manager whose run is another process's by now changes nothing, at whatever moment it finds out."""

from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import RunFolderInUseError
from tests.unit.checkpoint.saved import state_fragments

NUM_CHECKS = 3
"""Of a save that has an old checkpoint to remove: before it writes, before it publishes, before it removes."""


class Lock:
    """Is lost after so many questions. What lies in the folder by then is noted."""

    def __init__(self, folder: Path, answers: int) -> None:
        self.folder, self.answers, self.found = folder, answers, set[str]()

    def ensure_held(self) -> None:
        self.answers -= 1
        if self.answers < 0:
            self.found = self.found or names(self.folder)
            raise RunFolderInUseError("taken over")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("answers", range(NUM_CHECKS + 1))
def test_nothing_is_changed_once_the_folder_is_lost(tmp_path: Path, answers: int, async_save: bool) -> None:
    settings = CheckpointConfig(keep=1, async_save=async_save, on_save_error="continue")
    before = CheckpointManager(tmp_path, settings, "", {})
    before.save(1, state_fragments(), {}, lambda: None)
    before.finish()
    lock = Lock(tmp_path, answers)
    manager = CheckpointManager(tmp_path, settings, "", {}, Reports(ensure_held=lock.ensure_held))
    if answers == NUM_CHECKS:
        manager.save(2, state_fragments(), {}, lambda: None)
        manager.finish()
        assert checkpoint_steps(tmp_path) == [2]
        return
    with pytest.raises(RunFolderInUseError):
        manager.save(2, state_fragments(), {}, lambda: None)
        manager.finish()
    assert names(tmp_path) == lock.found
    assert 1 in checkpoint_steps(tmp_path)

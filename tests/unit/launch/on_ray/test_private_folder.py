"""A process's own folder: gone when it ends, gone after the next start when it was killed, kept while it lives."""

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from launch.on_ray import cluster as module
from launch.on_ray.cluster import PREFIX, private_folder


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "LONGEST_PATH", 4096)
    return tmp_path


def _hold(ready: Connection) -> None:
    with private_folder() as folder:
        ready.send(str(folder))
        ready.recv()


def test_it_is_the_owners_alone_and_goes_with_it(parent: Path) -> None:
    with private_folder() as folder:
        assert folder.parent == parent and folder.name.startswith(PREFIX)
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "socket").touch()
    assert list(parent.iterdir()) == []


def test_a_killed_owners_folder_is_removed_and_a_living_ones_is_kept(parent: Path) -> None:
    here, there = multiprocessing.Pipe()
    owner = multiprocessing.get_context("fork").Process(target=_hold, args=(there,))
    owner.start()
    folder = Path(here.recv())
    with private_folder() as other:
        assert sorted(parent.iterdir()) == sorted([folder, other])
    owner.kill()
    owner.join()
    assert folder.exists()
    with private_folder() as other:
        assert list(parent.iterdir()) == [other]


def test_somebody_elses_link_is_left_alone(parent: Path) -> None:
    (parent / "theirs").mkdir()
    (parent / f"{PREFIX}link").symlink_to(parent / "theirs")
    with private_folder():
        assert (parent / "theirs").is_dir()

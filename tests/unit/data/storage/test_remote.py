"""Files behind a real HTTP server: fetched once, retried where that may help, never wrong."""

import errno
import fcntl
import multiprocessing
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.data.storage import remote as remote_module
from llmtrain.data.storage.folders import fetch_config, open_folder, scheme_fault
from llmtrain.data.storage.manifest import DamagedFileError
from llmtrain.data.storage.remote import FetchConfig, RemoteFolder, scheme_of
from llmtrain.errors import ConfigError, DataError
from tests.support.http_folder import Fault, HttpFolder, serve

CONTENT = bytes(range(256)) * 4000
HASH = sha256(CONTENT).hexdigest()
NAME = "shard-000000.tar"
TIMEOUT_SECONDS = 1.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpFolder]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(CONTENT)
    with serve(tmp_path / "served") as folder:
        yield folder


def remote(server: HttpFolder, tmp_path: Path, attempts: int = 4) -> RemoteFolder:
    return RemoteFolder(server.url, FetchConfig(tmp_path / "cache", attempts, TIMEOUT_SECONDS))


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_a_file_is_fetched_once_and_named_by_its_hash(server: HttpFolder, tmp_path: Path) -> None:
    for _ in range(2):
        path = remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT))
        assert path.read_bytes() == CONTENT
    assert server.requests[NAME] == 1
    assert cached(tmp_path) == [f"{HASH}.tar"]


@pytest.mark.parametrize("fault", ["500", "503", "hang", "cut", "stall", "spoil"])
def test_what_may_pass_is_tried_again(server: HttpFolder, tmp_path: Path, fault: Fault) -> None:
    server.faults[NAME] = [fault, fault]
    assert remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT)).read_bytes() == CONTENT
    assert server.requests[NAME] == 3
    assert cached(tmp_path) == [f"{HASH}.tar"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [("500", "the server answers 500"), ("hang", "silent for 1 seconds"), ("cut", "ClientPayloadError")],
)
def test_tries_have_an_end(server: HttpFolder, tmp_path: Path, fault: Fault, says: str) -> None:
    """Nothing is known of the file then: that is no damage, which could be skipped."""
    server.forever[NAME] = fault
    with pytest.raises(DataError, match=says) as raised:
        remote(server, tmp_path, attempts=2).fetch(NAME, HASH, len(CONTENT))
    assert not isinstance(raised.value, DamagedFileError)
    assert f"{server.url}/{NAME}" in str(raised.value) and "2 attempts" in str(raised.value)
    assert server.requests[NAME] == 2
    assert cached(tmp_path) == []


def test_a_slow_server_is_not_a_silent_one(server: HttpFolder, tmp_path: Path) -> None:
    """It takes longer than the longest silence, but says something all the time."""
    server.forever[NAME] = "slow"
    assert remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT)).read_bytes() == CONTENT
    assert server.requests[NAME] == 1


def test_a_missing_file_is_damage_and_not_tried_again(server: HttpFolder, tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="404") as raised:
        remote(server, tmp_path).fetch("shard-000001.tar", HASH, len(CONTENT))
    assert raised.value.reason == "missing"
    assert server.requests["shard-000001.tar"] == 1


def test_a_refused_file_is_an_error_and_not_tried_again(server: HttpFolder, tmp_path: Path) -> None:
    server.forever[NAME] = "403"
    with pytest.raises(DataError, match="403") as raised:
        remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT))
    assert not isinstance(raised.value, DamagedFileError)
    assert server.requests[NAME] == 1


@pytest.mark.parametrize("change", [b"more", b""])
def test_another_file_than_the_manifest_s_is_damage(server: HttpFolder, tmp_path: Path, change: bytes) -> None:
    other = CONTENT + change if change else CONTENT[:-1] + b"x"
    (tmp_path / "served" / NAME).write_bytes(other)
    with pytest.raises(DamagedFileError, match=r"expected .*, actual") as raised:
        remote(server, tmp_path, attempts=2).fetch(NAME, HASH, len(CONTENT))
    assert raised.value.reason == ("size" if change else "sha256")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("spoiled", [CONTENT[:-5], CONTENT[:-1] + b"x"])
def test_a_spoiled_cache_heals(server: HttpFolder, tmp_path: Path, spoiled: bytes) -> None:
    path = remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT))
    path.write_bytes(spoiled)
    assert remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT)).read_bytes() == CONTENT
    assert server.requests[NAME] == 2


def test_what_a_killed_process_left_is_written_over(server: HttpFolder, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{HASH}.tar.fetching").write_bytes(b"half" * len(CONTENT))
    (tmp_path / "cache" / f"{HASH}.tar.lock").touch()
    assert remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT)).read_bytes() == CONTENT
    assert cached(tmp_path) == [f"{HASH}.tar"]


def _fetch(url: str, cache: Path) -> None:
    path = RemoteFolder(url, FetchConfig(cache, 1, 30.0)).fetch(NAME, HASH, len(CONTENT))
    assert path.read_bytes() == CONTENT


def test_processes_do_not_fetch_the_same_file_twice(server: HttpFolder, tmp_path: Path) -> None:
    server.faults[NAME] = ["slow", "slow", "slow", "slow"]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fetch, args=(server.url, tmp_path / "cache")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests[NAME] == 1
    assert cached(tmp_path) == [f"{HASH}.tar"]


def test_the_lock_of_a_killed_process_is_free(server: HttpFolder, tmp_path: Path) -> None:
    server.faults[NAME] = ["slow"] * 100
    process = multiprocessing.get_context("fork").Process(target=_fetch, args=(server.url, tmp_path / "cache"))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "cache" / f"{HASH}.tar.fetching").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    server.faults[NAME] = []
    assert (tmp_path / "cache" / f"{HASH}.tar.lock").exists(), "it was killed in the middle"
    assert remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT)).read_bytes() == CONTENT
    assert cached(tmp_path) == [f"{HASH}.tar"]


def test_a_file_system_without_locks_is_said(
    server: HttpFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other lock is taken instead: it would outlive a killed process."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"cannot be written: Function not implemented\. Set data\.cache_dir"):
        remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT))
    assert server.requests[NAME] == 0


def test_a_cache_that_cannot_be_written_is_named(server: HttpFolder, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache: cannot be written.*data\.cache_dir"):
        remote(server, tmp_path).fetch(NAME, HASH, len(CONTENT))


def test_no_server_is_said_in_words(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = server.url
    folder = RemoteFolder(url, FetchConfig(tmp_path / "cache", 2, TIMEOUT_SECONDS))
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read: .*2 attempts"):
        folder.read("manifest.json")


def test_names_are_quoted_and_a_query_stays_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a b?#%.tar").write_bytes(CONTENT)
    with serve(tmp_path / "served") as server:
        folder = RemoteFolder(f"{server.url}/?key=canary", FetchConfig(tmp_path / "cache", 1, TIMEOUT_SECONDS))
        assert folder.read("a b?#%.tar") == CONTENT


def test_errors_hide_credentials(server: HttpFolder, tmp_path: Path) -> None:
    url = server.url.replace("http://", "http://user:canary@") + "/?token=canary"
    folder = RemoteFolder(url, FetchConfig(tmp_path / "cache", 1, TIMEOUT_SECONDS))
    server.forever[NAME] = "500"
    said = str(folder)
    for name in (NAME, "missing.tar"):
        with pytest.raises(DataError) as raised:
            folder.fetch(name, HASH)
        said += str(raised.value)
    assert "canary" not in said and f"{server.url}/{NAME}" in said


@pytest.mark.parametrize("path", ["pipe:cat x", "ftp://host/a", "file:///a", "simplecache::http://a/b", "https:/a"])
def test_other_schemes_are_refused(path: str) -> None:
    assert "https://, http://, s3://, gs://, hf://" in (scheme_fault(path) or "")
    with pytest.raises(ConfigError, match="Allowed are"):
        open_folder(path)


@pytest.mark.parametrize(
    "path", ["https://a/b", "HTTP://a", "s3://b/c", "gs://b/c", "hf://datasets/a/b", "a/b", "./x:y"]
)
def test_allowed_places(path: str) -> None:
    assert scheme_fault(path) is None


def test_a_folder_with_a_colon_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert scheme_of("pipe:x") == "pipe"
    Path("pipe:x").mkdir()
    assert scheme_of("pipe:x") is None


def test_the_cache_is_where_the_user_s_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(train=(SourceConfig(path="none"),), seq_len=8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_config(data).cache_dir == tmp_path / "llmtrain"
    if sys.platform == "linux":
        for unset in ("relative", ""):  # the XDG specification: to be ignored
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
            assert fetch_config(data).cache_dir == Path.home() / ".cache" / "llmtrain"
    assert fetch_config(data.with_keys({"cache_dir": "here"})).cache_dir == Path("here")


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_SECONDS", 1.0)
    pauses = [remote_module.pause_seconds(attempt) for attempt in range(1, 12)]
    assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(pauses[:5]))
    assert max(pauses) <= remote_module.LONGEST_PAUSE_SECONDS
    assert len({remote_module.pause_seconds(3) for _ in range(9)}) > 1

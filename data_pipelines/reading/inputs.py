"""Which files an input means: itself, every file below a folder, or what a pattern matches; each file once.

Left out below a folder, and counted: hidden entries, pipes and devices, and a file or folder that was taken already
under another name. Links are followed. A URL means a file, or with s3, gs and hf what lies below it or it matches.
"""

import glob
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from llmtrain.config.reading.credentials import without_credentials
from llmtrain.data.storage.remote import SCHEMES, fault_of, file_system, retried, scheme_of
from llmtrain.errors import ConfigError, DataError

Result = TypeVar("Result")

NAMED_EXAMPLES = 2
"""How many of the things of one kind that were left out a summary names."""

_ATTEMPTS = 5
_SILENCE_SECONDS = 60.0
_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "blob_id")
"""What servers say of a file's version, the surest first."""

LEFT_OUT = {
    "empty": "empty",
    "not_text": "that are not UTF-8 text",
    "archive": "that are archives or tables: unpack them, or write them as .jsonl",
    "no_field": "of JSON without text under the key that --field names",
    "not_json": "lines that are not JSON objects",
    "too_long": "that are too long",
    "not_page": "of archives that are no pages of text",
    "unsafe_name": "of archives that are links or have names that lead out of them",
    "damaged": "that are damaged, from the damage on",
    "hidden": "hidden",
    "repeated": "that had been read under another name or input",
    "not_file": "that are not files: pipes, devices, links to nothing",
}
"""Kinds of what is not read, in words behind their number."""


@dataclass
class ReadReport:
    """Counts of documents that were read and of what was left out, kept while documents are drawn."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    forgiving: bool = False
    """What is broken is left out, and not an error."""

    def refuse(self, kind: str, where: object, error: DataError) -> None:
        """Raise the error for something broken, or count it."""
        if not self.forgiving:
            raise error
        self.leave_out(kind, where)

    def leave_out(self, kind: str, where: object) -> None:
        """Count something of a kind of LEFT_OUT."""
        self.left_out[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NAMED_EXAMPLES:
            examples.append(str(where))

    def summary(self) -> str:
        """One line for people."""
        text = f"read {self.documents:,} documents ({self.text_bytes / 1e6:,.1f} MB) from {self.files:,} files"
        for kind, words in LEFT_OUT.items():
            if count := self.left_out[kind]:
                text += f"; left out {count:,} {words}, such as {', '.join(self.examples[kind])}"
        return text


@dataclass(frozen=True)
class InputFile:
    """A file to read, by its path or URL. `named`: the user wrote its name or a pattern of it, so that it is not passed
    over in silence."""

    location: str
    named: bool

    @property
    def is_remote(self) -> bool:
        return scheme_of(self.location) in SCHEMES

    @property
    def name(self) -> str:
        """The location, to show."""
        return without_credentials(self.location) if self.is_remote else self.location

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """The file on this machine; of a remote one a copy, as long as it is needed. Raises OSError, DataError."""
        if not self.is_remote:
            yield Path(self.location)
            return
        # The ending says what is in it, here as there.
        with tempfile.NamedTemporaryFile(suffix=PurePosixPath(self.name).name) as copy:
            _asked(self.name, lambda files: files.get_file(self.location, copy.name))
            yield Path(copy.name)

    def state(self) -> tuple[int, str]:
        """Size and version: another version may have another content. Raises as `on_disk`."""
        if not self.is_remote:
            found = Path(self.location).stat()
            return found.st_size, str(found.st_mtime_ns)
        info = _asked(self.name, lambda found: found.info(self.location))
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        if not info.get("size"):
            raise DataError(f"{self.name}: the server does not say how large it is. Copy it here first.")
        return int(info["size"]), version


def find_files(inputs: Sequence[str | Path], report: ReadReport) -> list[InputFile]:
    """The files of all inputs, those of one sorted by name. All are looked for before the first is read.

    Raises ConfigError for an input that does not exist, DataError for a folder that cannot be listed.
    """
    search = _Search(report)
    found: list[InputFile] = []
    for name in map(str, inputs):
        files = search.files_of(name)
        if files is None:
            raise ConfigError(f"{name}: no such file, folder or pattern with files. Check the spelling.")
        found += files
    return found


def source_exists(name: str) -> bool:
    """False where an input means nothing on this machine; servers are asked when their files are needed."""
    if scheme_of(name) is not None and "://" in name:
        return True
    if os.path.lexists(name):
        return True
    return any(True for _ in glob.iglob(name, recursive=True))  # noqa: PTH207  absolute patterns too


class _Search:
    """Remembers what was found, by device and number: links, other spellings and other inputs may name it again."""

    def __init__(self, report: ReadReport) -> None:
        self._report = report
        self._seen: set[tuple[int, int]] = set()

    def files_of(self, name: str) -> list[InputFile] | None:
        """The files that an input means and that none before it has meant; None where nothing has that name."""
        if (scheme := scheme_of(name)) is not None and "://" in name:
            return self._remote(name, scheme)
        path = Path(name)
        if os.path.lexists(name):
            return self._below(path) if path.is_dir() else self._new([path], True)
        matches = sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207  absolute patterns too
        if "**" in name:  # what lies in the folders matches, too, as far as it is meant
            matches = [match for match in matches if not match.is_dir()]
        found = [file for path in matches for file in (self._below(path) if path.is_dir() else self._new([path], True))]
        return found if matches else None

    def _remote(self, url: str, scheme: str) -> list[InputFile] | None:
        """The files that a URL means, sorted by name."""
        if scheme not in SCHEMES:
            raise ConfigError(f"{without_credentials(url)}: {scheme}: is not read; {', '.join(SCHEMES)} are.")
        if scheme in ("http", "https"):
            return [InputFile(url, True)]
        shown = without_credentials(url)
        if glob.has_magic(url):
            found = _asked(shown, lambda files: sorted(files.glob(url)))
            return [InputFile(f"{scheme}://{path}", True) for path in found] or None
        found = _asked(shown, lambda files: sorted(files.find(url)))
        return [InputFile(f"{scheme}://{path}", f"{scheme}://{path}" == url) for path in found] or None

    def _below(self, folder: Path) -> list[InputFile]:
        """Real folders before linked ones, so that a link never takes the place of what it points to."""
        paths: list[Path] = []
        links: list[Path] = []
        folders = [folder]
        while folders or links:
            current = folders.pop() if folders else links.pop(0)
            if not self._is_new(current.stat()):
                self._report.leave_out("repeated", current)
                continue
            for entry in self._entries(current):
                if entry.name.startswith("."):
                    self._report.leave_out("hidden", entry.path)
                elif Path(entry.path).is_dir():
                    (links if entry.is_symlink() else folders).append(Path(entry.path))
                else:
                    paths.append(Path(entry.path))
        return sorted(self._new(sorted(paths, key=_links_last), False), key=lambda file: Path(file.location))

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name, reverse=True)  # a stack: the last comes first
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}). Repair it or leave it out.") from None

    def _new(self, paths: Sequence[Path], named: bool) -> list[InputFile]:
        return [InputFile(str(path), named) for path in self._iter_new(paths, named)]

    def _iter_new(self, paths: Sequence[Path], named: bool) -> Iterator[Path]:
        for path in paths:
            try:
                found = path.stat()
            except OSError as error:
                if named:
                    raise ConfigError(
                        f"{path}: cannot be read ({error.strerror}). Repair it or leave it out."
                    ) from None
                self._report.leave_out("not_file", path)
                continue
            if not stat.S_ISREG(found.st_mode):
                if named:
                    raise ConfigError(f"{path}: is not a file but a pipe, socket or device. Write it to a file first.")
                self._report.leave_out("not_file", path)
            elif self._is_new(found):
                yield path
            else:
                self._report.leave_out("repeated", path)

    def _is_new(self, found: os.stat_result) -> bool:
        identity = (found.st_dev, found.st_ino)
        if identity in self._seen:
            return False
        self._seen.add(identity)
        return True


def _asked(shown: str, question: Callable[[Any], Result]) -> Result:
    """What a file system behind a URL answers, asked again while its faults may pass. Raises DataError."""

    def once() -> Result:
        try:
            return question(file_system(scheme_of(shown) or "", _SILENCE_SECONDS))
        # Each library has errors of its own, without a common base.
        except Exception as error:
            raise fault_of(shown, error, _SILENCE_SECONDS) from None

    return retried(once, _ATTEMPTS, shown)


def _links_last(path: Path) -> tuple[bool, Path]:
    return path.is_symlink(), path

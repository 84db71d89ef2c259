"""Which files an input means: itself, every file below a folder, or what a pattern matches; each file once.

Left out below a folder, and counted: hidden entries, pipes and devices, and a file or folder that was taken already
under another name. Links are followed.
"""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.errors import ConfigError, DataError

NAMED_EXAMPLES = 2
"""How many of the things of one kind that were left out a summary names."""

LEFT_OUT = {
    "empty": "empty",
    "not_text": "that are not UTF-8 text",
    "archive": "that are archives or tables: unpack them, or write them as .jsonl",
    "no_field": "of JSON without text under the key that --field names",
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
    """A file to read. `named`: the user wrote its name or a pattern of it, so that it is not passed over in silence."""

    path: Path
    named: bool


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


class _Search:
    """Remembers what was found, by device and number: links, other spellings and other inputs may name it again."""

    def __init__(self, report: ReadReport) -> None:
        self._report = report
        self._seen: set[tuple[int, int]] = set()

    def files_of(self, name: str) -> list[InputFile] | None:
        """The files that an input means and that none before it has meant; None where nothing has that name."""
        path = Path(name)
        if os.path.lexists(name):
            return self._below(path) if path.is_dir() else self._new([path], True)
        matches = sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207  absolute patterns too
        if "**" in name:  # what lies in the folders matches, too, as far as it is meant
            matches = [match for match in matches if not match.is_dir()]
        found = [file for path in matches for file in (self._below(path) if path.is_dir() else self._new([path], True))]
        return found if matches else None

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
        return sorted(self._new(sorted(paths, key=_links_last), False), key=lambda file: file.path)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name, reverse=True)  # a stack: the last comes first
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}). Repair it or leave it out.") from None

    def _new(self, paths: Sequence[Path], named: bool) -> list[InputFile]:
        return [InputFile(path, named) for path in self._iter_new(paths, named)]

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


def _links_last(path: Path) -> tuple[bool, Path]:
    return path.is_symlink(), path

"""Opening what somebody else may have put there: regular files only, of bounded size, JSON of bounded depth, seals.

A pipe would hang whoever opens it, a device may do anything, and a file that grew without end fills the memory. What
goes wrong is an `OSError` or a `ValueError` that names the path: whoever reads knows whether it is the data's, the
checkpoint's or the user's fault, and what to do.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, overload

JSON_BYTES = 16 << 20
"""The size of a JSON file, unless its reader allows more: parsed, `[{},{},...]` takes 25 times as much."""

LINE_BYTES = 8 << 20
"""The size of a line in a file of lines: a row with the norms of a thousand layers has 200 kB."""

JSON_DEPTH = 32
"""How deep JSON may be nested: ours has 6 levels at most."""

_BLOCK_BYTES = 1 << 20

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@overload
def open_regular(path: Path, mode: Literal["rb"] = "rb") -> BufferedReader: ...


@overload
def open_regular(path: Path, mode: str) -> IO[bytes]: ...


def open_regular(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a regular file, or a link to one, in binary `mode`; anything else is refused without waiting for it.

    Raises: OSError with the path (FileNotFoundError, IsADirectoryError, ...; EINVAL for pipes, sockets and devices).
    """
    assert "b" in mode, mode
    try:
        _require_regular(path.stat(), path)
    except FileNotFoundError:
        if mode.startswith("r"):
            raise
        if path.is_symlink():
            raise OSError(errno.EINVAL, "it is a link that leads nowhere", str(path)) from None
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    # It may have become another kind in between: the second look is at what was opened, which did not wait for a peer.
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))  # noqa: SIM115
    try:
        _require_regular(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def open_to_go_on(path: Path) -> IO[bytes]:
    """A regular file, made with its folder where it is missing, to append to as the only process that does.

    Raises: OSError as `open_regular`, EBUSY where another process has it open likewise, or has just removed it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_regular(path, "ab")
    try:
        with _where_supported():
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink == 0:
            raise BlockingIOError
    except OSError as error:
        file.close()
        if not isinstance(error, BlockingIOError):
            raise
        raise OSError(errno.EBUSY, "another process is writing it", str(path)) from None
    return file


@contextmanager
def _where_supported() -> Iterator[None]:
    """Go on without locks on a file system that has none."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise


def open_log(path: Path) -> TextIOWrapper:
    """Open a file of text to append to. Raises: OSError as `open_regular`."""
    return TextIOWrapper(open_regular(path, "ab"), encoding="utf-8")


def _require_regular(found: os.stat_result, path: Path) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(number, f"it is {_KINDS.get(kind, 'a special file')}, not a regular file", str(path))


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises: OSError as `open_regular`, and EFBIG where the file has more.
    """
    content = bytearray()
    with open_regular(path) as file:
        # Most files of a wrong size say so themselves; one that grows is cut off.
        too_long = os.fstat(file.fileno()).st_size > limit
        while not too_long and (block := file.read(_BLOCK_BYTES)):
            content += block
            too_long = len(content) > limit
    if too_long:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes, more than such a file can have", str(path))
    return bytes(content)


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes. Raises: OSError; ValueError if it is not UTF-8."""
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: Path, limit: int = JSON_BYTES, depth: int = JSON_DEPTH) -> Any:
    """The value in a JSON file. Raises: OSError as `read_bytes`, ValueError as `parse_json`."""
    return parse_json(read_bytes(path, limit), depth)


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in the place of another, of a special file or of none, whole or not at all.

    Raises: OSError with the path, such as IsADirectoryError where a folder stands there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Return once names that were made or changed in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file's own fsync does not keep its name: that is in the folder.
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(folder: Path, target: Path, replaced: Path) -> None:
    """Put a finished folder where `target` is, or is to be; what was there is `replaced` then, for the caller.

    All three lie side by side; `replaced` is free if `target` exists. The names are on the disk when it returns. Where
    it raises OSError, `target` is what it was before: nobody finds a folder there that was called failed.
    """
    if target.exists():
        target.rename(replaced)
    try:
        folder.rename(target)
        sync_folder(target.parent)
    except OSError:
        with suppress(OSError):
            if not folder.exists():
                target.rename(folder)
            if replaced.exists():
                replaced.rename(target)
        raise


def iter_lines(path: Path, longest: int = LINE_BYTES) -> Iterator[bytes]:
    """The lines of a regular file with their ends, as they are read.

    Raises: OSError as `open_regular`, and EFBIG at a line of more than `longest` bytes.
    """
    with open_regular(path) as file:
        while line := file.readline(longest + 1):
            if len(line) > longest:
                message = f"it has a line of more than {longest:,} bytes, more than such a line can have"
                raise OSError(errno.EFBIG, message, str(path))
            yield line


def parse_json(content: bytes | str, depth: int = JSON_DEPTH) -> Any:
    """The value of a JSON text in which lists and objects are nested at most `depth` deep.

    Raises: ValueError if it is not JSON, not UTF-8, or nested deeper.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"lists or objects are nested more than {depth} deep") from None
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        children = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for inside in children for inner in inside if isinstance(inner, dict | list)]
        if not level:
            return value
    raise ValueError(f"lists or objects are nested more than {depth} deep")


SEAL = "seal"
"""The key of an object's own hash."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a hash of its values in it: whoever reads it knows whether a byte was changed."""
    return {**content, SEAL: _hash_of(content)}


def unsealed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its seal, if it has one. Raises: ValueError if the values are not those that were sealed."""
    content = {key: value for key, value in found.items() if key != SEAL}
    if SEAL in found and found[SEAL] != (actual := _hash_of(content)):
        raise ValueError(f"its values do not give the {SEAL} in it: expected {found[SEAL]}, actual {actual}")
    return content


_TEXT_SEAL = "# sha256 of the lines below: "


def sealed_text(text: str) -> str:
    """A text of lines, such as YAML, under a comment with its hash."""
    return f"{_TEXT_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def unsealed_text(text: str) -> str:
    """The text without its seal, if it has one. Raises: ValueError if it is not the text that was sealed."""
    first, _, rest = text.partition("\n")
    if not first.startswith(_TEXT_SEAL):
        return text
    expected, actual = first.removeprefix(_TEXT_SEAL), hashlib.sha256(rest.encode()).hexdigest()
    if actual != expected:
        raise ValueError(f"its first line says the sha256 {expected}, the lines below it have {actual}")
    return rest


def sealed_line(content: Mapping[str, Any]) -> bytes:
    """An object as a line of JSON with its own hash in it. Raises: ValueError for NaN, TypeError for other types."""
    as_read = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps(sealed(as_read)).encode() + b"\n"


def parse_line(line: bytes) -> Any | None:
    """The value of a line of JSON; None where a crash has cut it short, which spoils no other line.

    Raises: ValueError where it is damaged: whole and no JSON, nested too deep, or not what was sealed.
    """
    text = line.strip(b"\0\r\n")  # a power failure leaves zeros where a line was to be
    if not text:
        return None
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if _is_cut(text, error):
            return None
        raise
    if not isinstance(value, dict):
        return value
    return unsealed(value)


_BEGUN_NUMBERS = (b".", b"-", b"e", b"e-", b"e+")
_WORDS = (b"true", b"false", b"null")


def _is_cut(text: bytes, error: json.JSONDecodeError) -> bool:
    """True where only the end of a line is missing. One that was changed goes wrong before its end."""
    if error.msg.startswith("Unterminated string"):
        return not text.endswith(b"}")
    rest = text[error.pos :]
    return rest in _BEGUN_NUMBERS or any(word.startswith(rest) for word in _WORDS)


def _hash_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

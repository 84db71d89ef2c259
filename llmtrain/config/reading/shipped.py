"""The configuration files that llmtrain ships, by the names that users write for them. Pure."""

from difflib import get_close_matches
from pathlib import Path, PurePosixPath

import llmtrain
from llmtrain.config.reading.suggestions import either
from llmtrain.errors import ConfigError

SHIPPED = "llmtrain:"
"""Begins the name of a file in `configs/`. That folder lies beside the package, in the repository and in a wheel."""
SHIPPED_FOLDER = Path(llmtrain.__file__).absolute().parent.parent / "configs"


def shipped_names() -> list[str]:
    """Every name that can be written."""
    return [
        f"{SHIPPED}{file.relative_to(SHIPPED_FOLDER).as_posix()}" for file in sorted(SHIPPED_FOLDER.glob("*/*.yaml"))
    ]


def shipped_file(name: str) -> Path:
    """The file that a name means. Raises ConfigError, with the names most like it, where there is none."""
    names = shipped_names()
    if name in names:
        return SHIPPED_FOLDER / name.removeprefix(SHIPPED)
    if not names:
        raise ConfigError(f"the files that llmtrain ships are not in {SHIPPED_FOLDER}. Install llmtrain again.")
    # Whoever forgets the folder or the ending means the file all the same.
    stems = get_close_matches(PurePosixPath(name).stem, {PurePosixPath(known).stem for known in names}, 3)
    near = [known for stem in stems for known in names if PurePosixPath(known).stem == stem]
    near.sort(key=lambda known: known.partition("/")[0] != name.partition("/")[0])
    hint = f"Did you mean {either(near)}?" if near else f"There are {', '.join(names)}."
    raise ConfigError(f"llmtrain ships no such file. {hint}")

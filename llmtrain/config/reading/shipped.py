"""Configurations that the package ships: `llmtrain:models/llama-8b.yaml` is a file of `configs/`, wherever one works.

In the repository and where a wheel is installed the folder lies beside the package.
"""

from difflib import get_close_matches
from pathlib import Path, PurePosixPath

import llmtrain
from llmtrain.config.reading.key_names import either
from llmtrain.errors import ConfigError

SCHEME = "llmtrain:"
FOLDER = Path(llmtrain.__file__).absolute().parent.parent / "configs"


def is_shipped(name: str) -> bool:
    """Whether a name means a file of the package, and not one of the user's."""
    return name.startswith(SCHEME)


def shipped_names() -> list[str]:
    """Every name that can be written."""
    return [f"{SCHEME}{file.relative_to(FOLDER).as_posix()}" for file in sorted(FOLDER.glob("*/*.yaml"))]


def shipped_file(name: str) -> Path:
    """The file that a name means. Raises ConfigError, with the names most like it, where there is none."""
    names = shipped_names()
    if name in names:
        return FOLDER / name.removeprefix(SCHEME)
    if not names:
        raise ConfigError(f"the files that llmtrain ships are not in {FOLDER}. Install llmtrain again.")
    # Whoever forgets the folder or the ending means the file all the same.
    stems = get_close_matches(PurePosixPath(name).stem, {PurePosixPath(known).stem for known in names}, 3)
    near = [known for stem in stems for known in names if PurePosixPath(known).stem == stem]
    near.sort(key=lambda known: known.partition("/")[0] != name.partition("/")[0])
    hint = f"Did you mean {either(near)}?" if near else f"There are {', '.join(names)}."
    raise ConfigError(f"llmtrain ships no such file. {hint}")

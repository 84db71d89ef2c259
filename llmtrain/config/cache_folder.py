"""Where files lie that can be made or fetched again. Pure."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """llmtrain's folder among the user's caches (XDG base directory specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "llmtrain"

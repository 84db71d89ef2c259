"""A configuration that means the same wherever it is read. Pure."""

import os
from pathlib import Path

from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.remote import scheme_of

NO_PATHS = ("auto", "none")
"""Values of checkpoint.resume that are words."""


def with_absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with its relative paths taken from `folder`, an absolute one. URLs stay."""

    def absolute(path: str) -> str:
        # As the system would take it; but of two slashes at the beginning nothing is made of one.
        return path if scheme_of(path) else os.path.join(folder, path)  # noqa: PTH118  # Path would change the text

    def absolute_or_none(path: str | None) -> str | None:
        return None if path is None else absolute(path)

    data, resume = config.data, config.checkpoint.resume
    sources = {
        f"data.{key}": tuple(source.with_keys({"path": absolute(source.path)}) for source in getattr(data, key))
        for key in ("train", "valid")
    }
    return config.with_keys(
        {
            **sources,
            "output_dir": absolute(config.output_dir),
            "data.tokenizer": absolute_or_none(data.tokenizer),
            "data.cache_dir": absolute_or_none(data.cache_dir),
            "engine.nvme_path": absolute_or_none(config.engine.nvme_path),
            "checkpoint.resume": resume if resume in NO_PATHS else absolute(resume),
        }
    )

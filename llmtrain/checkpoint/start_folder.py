"""A folder that runs begin from: one checkpoint of step 0, its configuration, and what lies beside it."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.folders import CHECKPOINTS
from llmtrain.checkpoint.writer import Contents, publish, size_bytes, start_checkpoint, write_rank_files
from llmtrain.values.fragment import Fragment

PART_BYTES = 1_000_000_000
"""Weights that are in memory at a time; a larger tensor is alone."""


def write_start_folder(
    out: Path,
    fragments: Iterable[Fragment],
    config_text: str,
    about: dict[str, Any],
    finish: Callable[[Path], object],
    part_bytes: int = PART_BYTES,
) -> Path:
    """Write OUT as a run folder with one checkpoint; returns the checkpoint. Nothing is left where it fails.

    `finish` writes into the folder what lies beside checkpoints, such as the tokenizer, before it gets its name; what
    it raises leaves nothing.
    """
    target = out.resolve()
    writing = target.with_name(f".writing-{target.name}-{os.getpid()}")
    try:
        unfinished = start_checkpoint(writing / CHECKPOINTS, step=0)
        # Part after part takes the place of rank after rank: nobody has to hold it all.
        groups = enumerate(_iter_groups(fragments, part_bytes))
        parts = [write_rank_files(unfinished, number, group) for number, group in groups]
        contents = Contents(0, {}, config_text, about)
        checkpoint = publish(unfinished, parts, contents, before_publish=lambda: None)
        (writing / "config.yaml").write_text(config_text, "utf-8")
        finish(writing)
        if target.exists():
            target.rmdir()
        writing.rename(target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return out / checkpoint.relative_to(writing)


def _iter_groups(fragments: Iterable[Fragment], part_bytes: int) -> Iterator[list[Fragment]]:
    """Fragments that together take at most so much, or a single one."""
    group: list[Fragment] = []
    for fragment in fragments:
        if group and size_bytes(group) + fragment.tensor.nbytes > part_bytes:
            yield group
            group = []
        group.append(fragment)
    yield group

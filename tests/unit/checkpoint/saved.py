"""Small states and checkpoints for the tests of this folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.values.fragment import Box, Fragment

CONFIG_TEXT = "name: tiny\n"
STATE = {"train": {"step": 7, "samples": 112, "tokens": 1792}, "engine": {"scale": 1024.0, "lr": 0.1 + 0.2}}


def state_fragments(seed: int = 0) -> list[Fragment]:
    """A weight with its moments, a scalar, and an integer buffer; a few hundred bytes."""
    draw = torch.Generator().manual_seed(seed)
    fragments = [
        Fragment.whole("decoder.layers.0.mlp.up", kind, torch.randn(5, 3, generator=draw))
        for kind in ("master", "exp_avg", "exp_avg_sq")
    ]
    fragments.append(Fragment.whole("scale", "master", torch.randn((), generator=draw)))
    fragments.append(Fragment.whole("counts", "buffer", torch.randint(0, 99, (4,), generator=draw)))
    return fragments


def save(checkpoints: Path, step: int, fragments: list[Fragment] | None = None, **contents: Any) -> Path:
    """A published checkpoint of one rank; `contents` are fields of `Contents` in place of the usual ones."""
    writing = start_checkpoint(checkpoints, step)
    part = write_rank_files(writing, 0, fragments or state_fragments(step))
    usual = {"state": STATE, "config_text": CONFIG_TEXT, "about": {"layout": {"dp": 1}}}
    return publish(writing, [part], Contents(step, **{**usual, **contents}), lambda: None)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def cut(name: str, kind: str, tensor: Tensor, boxes: list[Box]) -> list[Fragment]:
    """Fragments of a tensor as ranks would hold them: views, most of them not contiguous."""
    whole = Box.whole(tensor.shape)
    return [Fragment(name, kind, tuple(tensor.shape), box, tensor[box.slices_in(whole)]) for box in boxes]

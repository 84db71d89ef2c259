"""Every file that a run, a checkpoint, a data set or an export rests on, spoiled in every way: what each reader does.

A row has a letter for each of KINDS, in their order:
`3`, `2`, `4`  the command ends with that code and names the file; `1` of `status`: nothing is known of the run
`s`            it does its work without the file, and says so with the file's name
`=`            it does its work, and the result is the one of the whole file: it does not rest on it, or makes it anew
`-`            it goes without: a kind of damage that is how a run may look, or that leaves less to be shown
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from llmtrain.files import sealed_line

RUN, SAVED, IMPORTED = "runs/tiny", "runs/tiny/checkpoints/step-00000004", "imported/checkpoints/step-00000000"
_SAY = ("--prompt", "the fox", "--max-tokens", "4", "--temperature", "0")

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "run.yaml", "name=other", "train.steps=2"),
    "resume": ("train", "run.yaml", "train.steps=6", "data.on_corrupt=skip"),
    "resume from": ("train", "run.yaml", "name=other", "train.steps=5", f"checkpoint.resume={SAVED}"),
    "dry run": ("train", "run.yaml", "--dry-run", "train.steps=6", "data.on_corrupt=skip"),
    "continue import": ("train", "more.yaml"),
    "generate": ("generate", RUN, *_SAY),
    "generate from": ("generate", SAVED, *_SAY),
    "generate export": ("generate", "model", *_SAY),
    "generate import": ("generate", "imported", *_SAY),
    "export": ("export", RUN, "out"),
    "export import": ("export", "imported", "out"),
    "import": ("import", "model", "out"),
    "checkpoint list": ("checkpoint", "list", RUN),
    "checkpoint inspect": ("checkpoint", "inspect", SAVED),
    "checkpoint verify": ("checkpoint", "verify", RUN),
    "checkpoint diff": ("checkpoint", "diff", SAVED, "runs/tiny/checkpoints/step-00000002"),
    "verify import": ("checkpoint", "verify", "imported"),
    "data verify": ("data", "verify", "data"),
    "data inspect": ("data", "inspect", "data"),
    "data show": ("data", "show", "data/train", "--seq-len", "16"),
    "data index": ("data", "index", "data/train"),
    "verify json": ("data", "verify", "jdata"),
    "status": ("status", RUN),
    "report": ("report", RUN),
    "logs": ("logs", RUN),
}


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _replaced(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        put(path)

    return spoil


KINDS: dict[str, Callable[[Path], object]] = {
    "a byte changed": change_a_byte,
    "cut in half": _cut,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a folder": _replaced(lambda path: path.mkdir()),
    "a link to nowhere": _replaced(lambda path: path.symlink_to("nowhere")),
    "a named pipe": _replaced(lambda path: os.mkfifo(path)),
}

TABLE: dict[str, dict[str, str]] = {
    "runs/tiny/tokenizer.model": {
        "resume": "====2==",
        "dry run": "=======",
        "generate": "3332333",
        "generate from": "3332333",
        "export": "3332333",
    },
    "runs/tiny/audit.jsonl": {"resume": "3===3=3", "status": "3---3-3"},
    "runs/tiny/status.json": {"status": "3331313", "report": "333-3-3"},
    "runs/tiny/config.yaml": {"report": "333-3-3"},
    "runs/tiny/environment.json": {"report": "333-3-3"},
    "runs/tiny/metrics.jsonl": {"status": "==--3-3", "report": "3--2222"},
    "runs/tiny/run.lock": {"resume": "444=3=3", "status": "====3=3"},
    "runs/tiny/skipped_shards.jsonl": {"resume": "3===3=="},
    "runs/tiny/logs/rank-00000.log": {"resume": "====222"},
    f"{SAVED}/state.json": {"generate": "sssssss", "dry run": "sssssss"},
}

_ELSEWHERE = {"host": "elsewhere", "machine": "m", "pid": 1, "process_started": "", "since": "2026-01-01", "token": "t"}
_SKIPPED = {"path": "data/train/x.tar", "sha256": "0", "actual": "1", "reason": "sha256", "samples": 1}
ABSENT = {
    "runs/tiny/run.lock": json.dumps(_ELSEWHERE).encode(),
    "runs/tiny/skipped_shards.jsonl": sealed_line(_SKIPPED),
}
"""Files that a good run does not have, to be spoiled."""

MORE = """\
base: imported/config.yaml
name: more
data: {train: [{path: jdata/train}], seq_len: 32}
train: {steps: 2, global_batch_size: 2, micro_batch_size: 1}
optim: {warmup_steps: 1}
checkpoint: {resume: imported, async_save: false}
observe: {wandb: "off", tensorboard: false}
launch: {threads_per_worker: 1, max_stalled_attempts: 0, device: cpu}
"""

"""Every file that a run, a checkpoint, a data set or an export rests on, spoiled in every way: what each reader does.

A row has a letter for each of KINDS, in their order:
`3`, `2`, `4`  the command ends with that code and names the file; `1` of `status`: nothing is known of the run
`s`            it does its work without the file, and says so with the file's name
`=`            it does its work, and the result is the one of the whole file: it does not rest on it, or makes it anew
`-`            it goes without: a kind of damage that is how a run may look, or that leaves less to be shown
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llmtrain.files import sealed_line

RUN, SAVED, IMPORTED = "runs/tiny", "runs/tiny/checkpoints/step-00000004", "imported/checkpoints/step-00000000"
RANK, STATE, CONFIG = "rank-00000.safetensors", "state.json", "config.yaml"
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

_OF_A_CHECKPOINT = {
    **dict.fromkeys(("resume", "dry run", "generate", "export"), "s" * 7),
    **dict.fromkeys(("resume from", "generate from"), "3" * 7),
    **dict.fromkeys(("checkpoint inspect", "checkpoint verify", "checkpoint diff"), "3" * 7),
    "checkpoint list": "-" * 7,
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
    "data/train/manifest.json": {
        "train": "3332222",
        "dry run": "3332222",
        "data verify": "3333333",
        "data inspect": "3333333",
        "data show": "3333333",
        "data index": "333=2==",
    },
    "data/train/shard-000000.tar": {
        "train": "3333333",
        "dry run": "=======",
        "data verify": "3333333",
        "data inspect": "=333333",
        "data show": "3333333",
    },
    "data/train/shard-000000.idx": {
        "train": "3333333",
        "dry run": "=======",
        "data verify": "3333333",
        "data inspect": "3333333",
        "data show": "3333333",
        "data index": "====2==",
    },
    "data/valid/manifest.json": {
        "train": "3332222",
        "dry run": "3332222",
        "data verify": "3333333",
        "data inspect": "3333333",
    },
    "data/valid/shard-000000.tar": {
        "train": "3333333",
        "dry run": "=======",
        "data verify": "3333333",
        "data inspect": "=333333",
    },
    "data/valid/shard-000000.idx": {
        "train": "3333333",
        "dry run": "=======",
        "data verify": "3333333",
        "data inspect": "3333333",
    },
    "data/tokenizer.model": {
        "train": "3332333",
        "resume": "3332333",
        "dry run": "3332333",
        "data verify": "333=333",
        "data show": "3332333",
        "data inspect": "=======",
    },
    "jdata/tokenizer.json": {"continue import": "3332333", "verify json": "333=333"},
    "jdata/tokenizer_settings.json": {"continue import": "3333333", "verify json": "3333333"},
    **{f"{SAVED}/{name}": _OF_A_CHECKPOINT for name in ("manifest.json", "manifest.json.sha256", STATE, CONFIG)},
    # Who reads the small files only does not see what a tensor file holds.
    f"{SAVED}/{RANK}": {**_OF_A_CHECKPOINT, "dry run": "=======", "checkpoint list": "=------"},
    "imported/tokenizer.json": {"continue import": "=======", "generate import": "3332333", "export import": "3332333"},
    "imported/tokenizer_settings.json": {
        "continue import": "3333333",
        "generate import": "3333333",
        "export import": "3333333",
    },
    "imported/config.yaml": {"continue import": "2222222", "generate import": "=======", "export import": "======="},
    **{
        f"{IMPORTED}/{name}": dict.fromkeys(
            ("continue import", "generate import", "export import", "verify import"), "3" * 7
        )
        for name in ("manifest.json", "manifest.json.sha256", STATE, CONFIG, RANK)
    },
    "model/model.safetensors": {"generate export": "3333333", "import": "3333333"},
    "model/tokenizer.json": {"generate export": "3333333", "import": "3333333"},
    "model/tokenizer.model": {"generate export": "3333333", "import": "3333333"},
    "model/config.json": {"generate export": "2332222", "import": "2332222"},
    "model/generation_config.json": {"generate export": "s33s333", "import": "s33s333"},
    "model/tokenizer_config.json": {"generate export": "333s333", "import": "333s333"},
}

_ELSEWHERE = {"host": "elsewhere", "machine": "m", "pid": 1, "process_started": "", "since": "2026-01-01", "token": "t"}
_SKIPPED = {"path": "data/train/x.tar", "sha256": "0", "actual": "1", "reason": "sha256", "samples": 1}
ABSENT = {
    "runs/tiny/run.lock": json.dumps(_ELSEWHERE).encode(),
    "runs/tiny/skipped_shards.jsonl": sealed_line(_SKIPPED),
}
"""Files that a good run does not have, to be spoiled."""


def _copied(source: str, target: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(folder / source, folder / target)


EARLIER, LATER = "runs/tiny/checkpoints/step-00000002", "runs/tiny/checkpoints/step-00000006"
_TRAIN = COMMANDS["train"]


def _renamed(folder: Path) -> None:
    shutil.copytree(folder / EARLIER, folder / LATER)


CONTRADICTIONS: tuple[tuple[str, Callable[[Path], object], tuple[str, ...], str, str], ...] = (
    ("sidecar", _copied("data/valid/shard-000000.idx", "data/train/shard-000000.idx"), _TRAIN, "3", "000000.idx"),
    ("manifest", _copied("data/valid/manifest.json", "data/train/manifest.json"), _TRAIN, "3", "shard-000000"),
    ("shard", _copied("data/valid/shard-000000.tar", "data/train/shard-000000.tar"), _TRAIN, "3", "000000.tar"),
    (
        "state",
        _copied(f"{EARLIER}/state.json", f"{SAVED}/state.json"),
        COMMANDS["generate"],
        "0",
        f"{SAVED}/state.json",
    ),
    ("rank", _copied(f"{EARLIER}/{RANK}", f"{SAVED}/{RANK}"), COMMANDS["resume"], "0", f"{SAVED}/{RANK}"),
    ("renamed, resumed", _renamed, ("train", "run.yaml", "train.steps=8"), "0", f"{LATER}: its name says step 6"),
    ("renamed, generated", _renamed, COMMANDS["generate"], "0", f"{LATER}: its name says step 6"),
    ("renamed, exported", _renamed, ("export", LATER, "out"), "3", f"{LATER}: its name says step 6"),
    ("renamed, verified", _renamed, COMMANDS["checkpoint verify"], "3", f"{LATER}: its name says step 6"),
    ("renamed, asked", _renamed, COMMANDS["dry run"], "0", f"{LATER}: its name says step 6"),
    ("export's weights", _copied("hf2/model.safetensors", "model/model.safetensors"), COMMANDS["import"], "3", "model"),
    ("export's config", _copied("hf2/config.json", "model/config.json"), COMMANDS["import"], "3", "model"),
    ("tokenizer", _copied("tokenizer.model", "imported/tokenizer.json"), COMMANDS["export import"], "3", "tokenizer"),
)
"""Whole files that contradict others: a title, what is put where, a command, its exit code, and what it must say."""

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

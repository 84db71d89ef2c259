"""Command lines: every verb with every option, and arguments that are wrong, useless or not there."""

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

from llmtrain.cli.app import VERBS, load_verb
from tests.hostile import values
from tests.hostile.command import Case

GOOD = {
    "train": ("train", "run.yaml", "--dry-run"),
    "submit": ("submit", "run.yaml", "--to", "slurm", "--dry-run"),
    "parity": ("parity", "run.yaml"),
    "drill": ("drill", "run.yaml"),
    "schema": ("schema",),
    "status": ("status", "runs/tiny"),
    "logs": ("logs", "runs/tiny"),
    "report": ("report", "runs/tiny"),
    "generate": ("generate", "runs/tiny", "--prompt", "the", "--max-tokens", "2"),
    "serve": ("serve", "runs/tiny", "--slots", "2", "--host", "127.0.0.1"),
    "eval": ("eval", "runs/tiny", "--tasks", "tasks.yaml", "--limit", "2"),
    "export": ("export", "runs/tiny", "out"),
    "import": ("import", "hf", "out"),
    "compress": ("compress", "runs/tiny", "out", "--scheme", "w8a16", "--max-perplexity-increase", "9"),
    "data tokenizer": ("data", "tokenizer", "texts", "out.model", "--vocab-size", "300"),
    "data shards": ("data", "shards", "texts", "out", "--tokenizer", "tokenizer.model"),
    "data chat": (
        "data",
        "chat",
        "chats.jsonl",
        "out",
        "--tokenizer",
        "tokenizer.model",
        "--template",
        "chatml",
        "--grow",
    ),
    "data labels": (
        "data",
        "labels",
        "labels.jsonl",
        "out",
        "--tokenizer",
        "tokenizer.model",
        "--task",
        "classification",
    ),
    "data run": ("data", "run", "pipeline.yaml", "--dry-run"),
    "data index": ("data", "index", "data"),
    "data inspect": ("data", "inspect", "data"),
    "data verify": ("data", "verify", "data"),
    "data show": ("data", "show", "data", "--seq-len", "16"),
    "checkpoint list": ("checkpoint", "list", "runs/tiny"),
    "checkpoint inspect": ("checkpoint", "inspect", "runs/tiny"),
    "checkpoint verify": ("checkpoint", "verify", "runs/tiny"),
    "checkpoint diff": ("checkpoint", "diff", "runs/tiny", "runs/tiny"),
}
"""A command line of each verb that works; what would not end gets a wrong word in `command_cases`."""

WITHOUT_END = {"--watch", "-w", "--follow", "-f", "--address", "--status", "--logs", "--stop"}
"""Options that wait for a run or ask a server."""
UNKNOWN_HERE = {"generate", "export", "import", "compress"}
UNKNOWN_OPTIONS = ("--xyzzy", "--", "-q", "--help=1", "--seq-len", "--seed=--seed", "-", "--steps", "@file", "--json=1")


@cache
def all_verbs() -> dict[str, Any]:
    return dict(verbs())


def verbs() -> Iterator[tuple[str, Any]]:
    """Each verb, those of groups with the group's name before theirs, and its parameters."""
    for name in VERBS:
        command = load_verb(name)
        for inner, found in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), found


def options_of(command: Any) -> list[Any]:
    return [found for found in command.params if found.param_type_name == "option" and found.name != "help"]


def command_cases(random: Random) -> Case:
    """A good line of which one to three words are others."""
    name = random.choice(list(GOOD))
    words = list(GOOD[name])
    options = [o for o in options_of(all_verbs()[name]) if not WITHOUT_END & set(o.opts)]
    for _ in range(random.choice((1, 1, 2, 3))):
        kind = random.randrange(8)
        first = len(name.split())
        place = random.randrange(first, len(words)) if len(words) > first else first
        if kind < 3 and place < len(words) and not words[place].startswith("-"):
            words[place] = random.choice(values.PATHS) if kind else _text(random)
        elif kind < 6 and options:
            option = random.choice(options)
            words.append(random.choice(option.opts))
            if not option.is_flag:
                words.append(_text(random) if kind < 5 else random.choice(values.PATHS))
        elif kind == 6 and len(words) > first:
            del words[place]
        else:
            words.insert(place, random.choice((*UNKNOWN_OPTIONS, _text(random))))
    if name == "submit":  # whatever was taken out: nothing is handed to a cluster that may be there
        words.insert(1, "--dry-run")
    if name in ("drill", "parity"):  # they would start whole runs
        words.append("model.num_layers=0")
    if name == "serve":
        words += ["--port", "65536"]
    return Case("command line", tuple(word.replace("\0", "") for word in words if word not in WITHOUT_END))


def _text(random: Random) -> str:
    return str(values.number(random)) if random.random() < 0.6 else random.choice(values.TEXTS)

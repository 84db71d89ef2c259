"""A small trained run that knows its tokenizer, and tasks to put to it."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config.schema import RunConfig
from tests.support.datasets import write_dataset
from tests.support.small_runs import small_run, train_here
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece

ANIMALS, PLACES = ("fox", "dog", "cat", "owl", "wolf", "hen"), ("den", "house", "barn", "tree", "forest", "coop")
LINES = [
    f"the {animal} sleeps in the {place}. the {animal} is {'old' if number % 2 else 'young'}.\n"
    for number, (animal, place) in enumerate(zip(ANIMALS * 6, PLACES * 5 + PLACES[::-1], strict=True))
]


def write_run_data(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """The data of a run, and its configuration, which `sections` change."""
    content = train_sentencepiece(LINES, "bpe", 330)
    tokenizer = saved_tokenizer(folder / "tokenizer.model", content)
    # In many orders: windows that are always the same would be learned by their positions.
    orders = (random.Random(number).sample(LINES, len(LINES)) for number in range(8))
    documents = [np.array(tokenizer.encode(line)) for order in orders for line in order]
    for name in ("train", "valid"):
        write_dataset(folder / name, [documents], tokenizer.vocab_size, tokenizer=content)
    base: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": tokenizer.vocab_size, "max_seq_len": 48,
        },
        "data": {"seq_len": 48},
        "optim": {"lr": 5e-3, "warmup_steps": 0},
        "train": {"steps": 30},
        "checkpoint": {"every_steps": 30},
    }  # fmt: skip
    return small_run(
        folder, **{name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    )


def trained_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run that has ended."""
    config = write_run_data(folder, **sections)
    assert train_here(config) == 0
    return config


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


QUESTIONS = [
    {
        "q": f"where does the {animal} sleep?", "animal": animal, "options": [PLACES[number], PLACES[(number + 3) % 6]],
        "a": 0, "answers": [PLACES[number], f"the {PLACES[number]}."],
    }
    for number, animal in enumerate(ANIMALS)
]  # fmt: skip
TEXTS = [{"text": "".join(LINES[start : start + 5])} for start in range(0, 20, 5)]

"""A sample as a run's objective presents it, as text: the model's input and its targets."""

from itertools import groupby
from pathlib import Path

from llmtrain.config.data import DataConfig
from llmtrain.config.reading.load import load_config
from llmtrain.data.loader import build_stream
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import build_row_config
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.preflight.resolve import resolve
from llmtrain.values.batch import IGNORED_LABEL
from llmtrain.values.tokenizer import Tokenizer

SKIPPED = "..."
"""Stands for positions without a target."""


def objective_texts(run: Path, dataset: Path, number: int) -> dict[str, str]:
    """Texts by title of sample `number`, as the run of a YAML file would see it on this data set alone.

    Raises ConfigError and DataError.
    """
    alone = {"data.train": [{"path": str(dataset)}], "data.valid": [], "data.tokenizer": None, "data.schedule": []}
    resolved = resolve(load_config(run).config.with_keys(alone))
    config = resolved.config
    stream = build_stream(config.data.train, config.data, config.seed, manifests=resolved.train)
    row_config = build_row_config(config, stream, lambda: resolved.tokenizer, trained=True)
    row = pack_sample(stream.sample(number), row_config)
    tokenizer = load_tokenizer(resolved.tokenizer)
    texts = {"input": row.tokens_S, "targets": row.labels_S}
    if row.encoder_tokens_T is not None:
        texts = {"encoder": row.encoder_tokens_T, "decoder": row.tokens_S, "targets": row.labels_S}
    names = _names(config.data, tokenizer)
    return {title: _text(ids.tolist(), tokenizer, names) for title, ids in texts.items()}


def _names(data: DataConfig, tokenizer: Tokenizer) -> dict[int, str]:
    """The names under which special tokens are shown."""
    pieces = tokenizer.pieces
    names = {token: pieces[token] for token, special in enumerate(tokenizer.special) if special}
    sentinels = data.special_tokens.sentinels or ()
    marks = (
        ("prefix", "middle", "suffix") if data.objective == "fim" else [f"sentinel {n}" for n in range(len(sentinels))]
    )
    names |= {token: f"<{mark}>" for token, mark in zip(sentinels, marks, strict=False)}
    return {IGNORED_LABEL: SKIPPED, **names}


def _text(ids: list[int], tokenizer: Tokenizer, names: dict[int, str]) -> str:
    """Special tokens by their names, one for each run of positions without targets, and the text between them."""
    parts = []
    for is_text, group in groupby(ids, lambda token: token not in names):
        if is_text:
            parts.append(tokenizer.decode(list(group)))
        else:
            parts += [names[token] for token, same in groupby(group) for _ in ([0] if token == IGNORED_LABEL else same)]
    return "".join(parts)

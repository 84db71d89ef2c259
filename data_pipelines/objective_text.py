"""A sample as a run's objective presents it, as text: the model's input and its targets."""

from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

from llmtrain.config.data import DataConfig
from llmtrain.config.reading.load import load_config
from llmtrain.data.loader import build_stream
from llmtrain.data.objectives.causal import PackedSample
from llmtrain.data.objectives.chat import trained_tokens
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import build_row_config
from llmtrain.data.storage.folders import find_tokenizer, run_settings
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.storage.targets import LabelsRecord
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
    tokenizer = load_tokenizer(resolved.tokenizer, run_settings(config.data, resolved.train[0]))
    texts = {"input": row.tokens_S, "targets": row.labels_S}
    if row.encoder_tokens_T is not None:
        texts = {"encoder": row.encoder_tokens_T, "decoder": row.tokens_S, "targets": row.labels_S}
    names = _names(config.data, tokenizer)
    shown = {title: _text(ids.tolist(), tokenizer, names) for title, ids in texts.items()}
    labels = {} if row_config.labels is None else {"targets": _labels_text(row, row_config.labels, tokenizer)}
    return shown | labels


def _labels_text(row: PackedSample, record: LabelsRecord, tokenizer: Tokenizer) -> str:
    """The answer, or each label behind the piece that has it."""
    if record.task == "qa":
        begin, end = row.labels_S[:2].tolist()
        return tokenizer.decode(row.tokens_S[begin : end + 1].tolist()) if end >= 0 else SKIPPED
    pieces = tokenizer.pieces
    places = (row.labels_S != IGNORED_LABEL).nonzero()[0].tolist()
    return "\n".join(f"{pieces[row.tokens_S[place]]}: {record.names[row.labels_S[place]]}" for place in places)


def conversation_texts(dataset: Path, number: int, seq_len: int, seed: int, marks: tuple[str, str]) -> Iterator[str]:
    """The conversations of sample `number` of a data set of them, control tokens by their names, with marks around what
    the assistant is trained to say. Raises ConfigError and DataError."""
    tree = {"train": [{"path": str(dataset)}], "objective": "chat", "chat": {"too_long": "truncate"}}
    data = DataConfig.model_validate({**tree, "seq_len": seq_len})
    stream = build_stream(data.train, data, seed)
    folder = Path(dataset)
    manifest = read_manifest(folder)
    path = find_tokenizer(folder, manifest.tokenizer_sha256)
    tokenizer = load_tokenizer(path, run_settings(data, manifest))
    sample = stream.sample(number)
    trained = trained_tokens(sample, data.chat, stream.end_ids)
    names = _names(data, tokenizer)
    bounds = [*sample.document_starts.tolist(), len(sample.tokens) - sample.padding]
    for begin, end in pairwise(bounds):
        parts, place = list[str](), begin
        for is_trained, group in groupby(trained[begin:end].tolist()):
            until = place + len(list(group))
            text = _text(sample.tokens[place:until].tolist(), tokenizer, names)
            parts.append(f"{marks[0]}{text}{marks[1]}" if is_trained else text)
            place = until
        yield "".join(parts)


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

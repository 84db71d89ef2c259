"""Conversations in samples: whole, apart from each other, and with exactly the targets that were asked for."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config.data import DataConfig
from llmtrain.data.loader import build_stream
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import RowConfig
from llmtrain.data.stream import Sample, SampleStream
from llmtrain.errors import ConfigError, DataError
from llmtrain.values.batch import IGNORED_LABEL, PADDING
from tests.support.datasets import (
    END_ID,
    EOS_ID,
    chat_record,
    random_conversations,
    random_documents,
    write_dataset,
    write_target_dataset,
)

SEQ_LEN = 48
CHATS = [random_conversations(30, seed) for seed in range(3)]
BY_IDS = {ids.tobytes(): spans for shard in CHATS for ids, spans in shard}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_target_dataset(folder, CHATS, chat_record())
    return folder


def config_of(folder: Path, chat: dict[str, Any] | None = None, **keys: Any) -> DataConfig:
    tree = {"objective": "chat", "seq_len": SEQ_LEN, "chat": chat or {}, "cache_dir": str(folder / "cache"), **keys}
    return DataConfig.model_validate({"train": [{"path": str(folder)}], **tree})


def stream_of(data: DataConfig) -> SampleStream:
    return build_stream(data.train, data, seed=1)


def epoch(stream: SampleStream) -> list[Sample]:
    return [stream.sample(number) for number in range(stream.length_once)]


def conversations(sample: Sample) -> list[tuple[int, int]]:
    """Where conversations begin and end in a sample, ends of sequence left out."""
    bounds = [*sample.document_starts.tolist(), len(sample.tokens) - sample.padding]
    return [(begin, end - 1) for begin, end in pairwise(bounds)]


def expected(spans: np.ndarray, ids: np.ndarray, chat: dict[str, Any]) -> set[int]:
    """The slow reference: the targets of one conversation. Its turns have a span each."""
    if chat.get("train_on") == "all":
        found = set(range(1, len(ids)))
    else:
        chosen = spans[-1:] if chat.get("train_on") == "last" else spans
        found = {token for begin, end in chosen.tolist() for token in range(begin, end)}
    ends = {token for token in found if ids[token] == END_ID}
    if chat.get("train_on") != "all":
        ends &= {int(end) - 1 for _, end in spans}
    return found if chat.get("train_on_end", True) else found - ends


CHOICES = [{}, {"train_on": "last"}, {"train_on": "all"}]
CHOICES += [{**choice, "train_on_end": False} for choice in CHOICES]


@pytest.mark.parametrize("packing", ["best_fit", "single"])
@pytest.mark.parametrize("chat", CHOICES, ids=str)
def test_every_conversation_has_its_targets_and_none_sees_another(
    folder: Path, chat: dict[str, Any], packing: str
) -> None:
    data = config_of(folder, chat, packing=packing)
    stream = stream_of(data)
    row_config = RowConfig(data, 1, stream.eos_id, end_ids=stream.end_ids)
    seen = []
    for sample in epoch(stream):
        row, targets = pack_sample(sample, row_config), set()
        assert row.segments_S is not None
        for number, (begin, end) in enumerate(conversations(sample)):
            ids = sample.tokens[begin:end]
            targets |= {begin + token for token in expected(BY_IDS[ids.tobytes()], ids, chat)}
            seen.append(ids.tobytes())
            inside = slice(begin, min(end + 1, SEQ_LEN))
            assert set(row.segments_S[inside].tolist()) == {number}, "attention stays within"
            assert row.positions_S[begin:end].tolist() == list(range(end - begin)), "positions begin again"
        given = {place + 1 for place in np.flatnonzero(row.labels_S != IGNORED_LABEL).tolist()}
        assert given == targets
        assert all(row.labels_S[place - 1] == sample.tokens[place] for place in given)
        if sample.padding > 1:
            assert set(row.segments_S[1 - sample.padding :].tolist()) == {PADDING}
    assert sorted(seen) == sorted(ids.tobytes() for shard in CHATS for ids, _ in shard), "each once, none cut"
    assert len(epoch(stream)) == (90 if packing == "single" else stream.length_once) >= 30


def test_a_turn_of_several_spans_is_one_turn() -> None:
    """Thinking and answer: a turn ends with the span that ends one."""
    tokens = np.array([10, 11, END_ID, 12, 13, 14, END_ID, 20, 21, 22, 23, END_ID, EOS_ID])
    spans = np.array([[1, 3], [4, 5], [5, 7], [8, 9], [10, 12]])
    sample = Sample(0, tokens, np.array([0, 7]), 0, 0, 0, 0, targets=spans)
    for chat, places in (
        ({"train_on": "last"}, [4, 5, 6, 8, 10, 11]),
        ({}, [1, 2, 4, 5, 6, 8, 10, 11]),
        ({"train_on_end": False}, [1, 4, 5, 8, 10]),
    ):
        data = DataConfig.model_validate({"train": [{"path": "x"}], "objective": "chat", "chat": chat, "seq_len": 12})
        row = pack_sample(sample, RowConfig(data, 1, EOS_ID, end_ids=(END_ID,)))
        assert (np.flatnonzero(row.labels_S != IGNORED_LABEL) + 1).tolist() == places


def test_conversations_that_are_too_long(folder: Path) -> None:
    lengths = [len(ids) for shard in CHATS for ids, _ in shard]
    seq_len, longest = 30, max(lengths)
    long = sum(length > seq_len for length in lengths)
    with pytest.raises(
        ConfigError, match=rf"has {long} documents of more than data.seq_len = 30 .*longest of {longest}"
    ):
        stream_of(config_of(folder, seq_len=seq_len))
    dropped = epoch(stream_of(config_of(folder, {"too_long": "drop"}, seq_len=seq_len, packing="single")))
    assert len(dropped) == len(lengths) - long
    data = config_of(folder, {"too_long": "truncate"}, seq_len=seq_len, packing="single")
    stream = stream_of(data)
    cut = epoch(stream)
    assert len(cut) == len(lengths) and sum(sample.padding == 0 for sample in cut) >= long
    by_begin = {ids[: seq_len + 1].tobytes(): (ids, spans) for shard in CHATS for ids, spans in shard}
    for sample in cut:
        ids = sample.tokens[: len(sample.tokens) - sample.padding]
        _, spans = (
            by_begin[ids.tobytes()] if sample.padding == 0 and ids[-1] != EOS_ID else by_begin[ids[:-1].tobytes()]
        )
        row = pack_sample(sample, RowConfig(data, 1, EOS_ID, end_ids=stream.end_ids))
        wanted = [place for begin, end in spans.tolist() for place in range(begin, min(end, seq_len + 1))]
        assert (np.flatnonzero(row.labels_S != IGNORED_LABEL) + 1).tolist() == wanted


def test_other_objectives_read_no_spans(folder: Path) -> None:
    stream = stream_of(config_of(folder, objective="causal"))
    assert stream.sample(0).targets is None
    packed = stream_of(config_of(folder, objective="causal", packing="best_fit"))
    assert packed.sample(0).targets is None


def test_data_without_spans_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [random_documents(30)])
    with pytest.raises(DataError, match=r"has no trained members, which data.objective = chat needs"):
        stream_of(config_of(tmp_path))


def test_a_mixture_has_one_template(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace
    from hashlib import sha256

    other = replace(chat_record(), template="b", template_sha256=sha256(b"b").hexdigest())
    write_target_dataset(tmp_path, CHATS[:1], other)
    data = config_of(folder).with_keys({"train": ({"path": str(folder)}, {"path": str(tmp_path)})})
    with pytest.raises(DataError, match="has another chat template"):
        stream_of(data)

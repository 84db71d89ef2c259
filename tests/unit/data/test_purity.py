"""Every objective is a pure function of (seed, sample): of no rank, order, resume, number of workers or batch size."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.config.data import DataConfig
from llmtrain.config.sequence_lengths import sample_lengths
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.objectives.causal import PackedSample
from llmtrain.data.objectives.table import OBJECTIVES, pack_sample
from llmtrain.data.row_config import PieceTable, RowConfig
from llmtrain.values.batch import IGNORED_LABEL, TENSORS, Batch
from tests.support.datasets import (
    EOS_ID,
    LABELS,
    VOCAB_SIZE,
    chat_record,
    random_conversations,
    random_documents,
    write_dataset,
    write_target_dataset,
)
from tests.support.rows import random_sample, row_config_of

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("decoder", "causal", {}),
    ("encoder", "masked", {}),
    ("encoder", "masked", {"masked": {"unit": "word"}, "reset_attention": True}),
    ("encoder", "masked", {"masked": {"unit": "span"}, "reset_positions": True}),
    ("encoder_decoder", "span_corruption", {"span_corruption": {"density": 0.5}}),
    ("encoder_decoder", "ul2", {}),
    ("encoder_decoder", "prefix", {}),
    ("decoder", "prefix", {}),
    ("decoder", "prefix", {"reset_attention": True}),
    ("decoder", "fim", {"reset_attention": True, "reset_positions": True}),
    ("decoder", "chat", {"chat": {"too_long": "truncate", "train_on": "last"}}),
    ("encoder", "labels", {"labels": {"too_long": "drop"}}),
    ("decoder", "labels", {"labels": {"too_long": "drop"}}),
]
IDS = [f"{family}-{objective}-{len(keys)}" for family, objective, keys in CASES]
SEQ_LEN = 24


def arrays(row: PackedSample) -> list[Any]:
    return [None if value is None else np.asarray(value).tolist() for value in vars(row).values()]


def test_every_objective_is_tried() -> None:
    assert {objective for _, objective, _ in CASES} == set(OBJECTIVES)


@pytest.mark.parametrize(("family", "objective", "keys"), CASES, ids=IDS)
def test_rows_depend_on_seed_and_number_alone(family: str, objective: str, keys: dict[str, Any]) -> None:
    row_config = row_config_of(family, objective, SEQ_LEN, **keys)
    forth = {number: arrays(pack_sample(random_sample(number, SEQ_LEN), row_config)) for number in range(20)}
    fresh = row_config_of(family, objective, SEQ_LEN, **keys)
    back = {number: arrays(pack_sample(random_sample(number, SEQ_LEN), fresh)) for number in reversed(range(20))}
    assert forth == back
    if objective in ("causal", "chat", "labels"):
        return  # they draw nothing
    other = row_config_of(family, objective, SEQ_LEN, seed=2, **keys)
    seeded = [arrays(pack_sample(random_sample(number, SEQ_LEN), other)) for number in range(20)]
    assert sum(one != two for one, two in zip(forth.values(), seeded, strict=True)) > 5
    same_text = [np.random.default_rng(0).integers(7, 100, SEQ_LEN + 1)] * 20
    rows = [
        arrays(pack_sample(type(sample)(number, text, *[*vars(sample).values()][2:]), row_config))
        for number, text in enumerate(same_text)
        for sample in [random_sample(number, SEQ_LEN, eos_share=0)]
    ]
    assert len({str(row) for row in rows}) > 5, "the same text is another task each time that it comes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder / "texts", [random_documents(30, seed) for seed in range(2)])
    write_target_dataset(folder / "chats", [random_conversations(30, seed) for seed in range(2)], chat_record())
    write_target_dataset(folder / "labels", [random_labels(30, seed) for seed in range(2)], LABELS)
    return folder


def random_labels(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Texts of different lengths, some too long for a sample, with one label each."""
    texts = random_documents(count, seed)
    return [(text, np.array([number % 3])) for number, text in enumerate(texts) if len(text)]


def loader(folder: Path, case: tuple[str, str, dict[str, Any]], dp_rank: int = 0, dp_size: int = 1) -> BatchLoader:
    family, objective, keys = case
    special = {"mask": 4, "pad": 0, "sentinels": list(range(VOCAB_SIZE, VOCAB_SIZE + 100))}
    path = folder / {"chat": "chats", "labels": "labels"}.get(objective, "texts")
    tree = {"train": [{"path": str(path)}], "objective": objective, "special_tokens": special, "seq_len": SEQ_LEN}
    data = DataConfig.model_validate({**tree, **keys})
    ids = np.arange(VOCAB_SIZE)
    row_config = RowConfig(data, 1, EOS_ID, family, PieceTable(ids < 4, ids % 3 == 0), labels=LABELS)
    return BatchLoader(build_stream(data.train, data, seed=1), row_config, 8, 2, dp_rank, dp_size)


def take(loader: BatchLoader, first_sample: int = 0, steps: int = 2) -> list[list[Batch]]:
    iterator = loader.steps(first_sample)
    taken = list(islice(iterator, steps))
    iterator.close()
    return taken


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in TENSORS]
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_batches_have_the_shapes_of_the_run_in_every_layout_and_after_a_resume(
    folder: Path, case: tuple[str, str, dict[str, Any]]
) -> None:
    whole = take(loader(folder, case), steps=3)
    lengths = sample_lengths(case[0], loader(folder, case)._row_config.data)
    for batch in whole[0]:
        assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.positions_BS.shape == (2, lengths.main)
        assert batch.segments_BS is None or batch.segments_BS.shape == (2, lengths.main)
        assert (batch.prefix_B is not None) == (case[:2] == ("decoder", "prefix"))
        assert batch.prefix_B is None or batch.prefix_B.shape == (2,)
        assert (batch.encoder_tokens_BT is not None) == (case[0] == "encoder_decoder")
        if batch.encoder_tokens_BT is not None:
            assert batch.encoder_tokens_BT.shape == (2, lengths.encoder)
            assert batch.encoder_segments_BT is None or batch.encoder_segments_BT.shape == (2, lengths.encoder)
        assert {getattr(batch, name).dtype for name in TENSORS if getattr(batch, name) is not None} == {torch.int64}
        assert 0 < batch.num_valid_tokens == int((batch.labels_BS != IGNORED_LABEL).sum())
    resumed = take(loader(folder, case), first_sample=8)
    assert all(same(a, b) for one, two in zip(whole[1:], resumed, strict=True) for a, b in zip(one, two, strict=True))
    ranks = [take(loader(folder, case, rank, 2)) for rank in range(2)]
    for step in range(2):
        for number, batch in enumerate(whole[step]):
            assert same(batch, ranks[number % 2][step][number // 2])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_blank_sample_has_no_targets(case: tuple[str, str, dict[str, Any]]) -> None:
    family, objective, keys = case
    sample = random_sample(3, SEQ_LEN, eos_share=1.0)
    blank = replace(sample, blank=True)
    row = pack_sample(blank, row_config_of(family, objective, SEQ_LEN, **keys))
    assert (row.labels_S == IGNORED_LABEL).all()


def test_a_prefix_is_given_and_the_rest_predicted() -> None:
    row_config = row_config_of("decoder", "prefix", 16)
    seen = set()
    for number in range(300):
        sample = random_sample(number, 16)
        row = pack_sample(sample, row_config)
        assert row.prefix is not None and 4 <= row.prefix <= 12
        seen.add(row.prefix)
        assert row.tokens_S.tolist() == sample.tokens[:-1].tolist()
        assert (row.labels_S[: row.prefix - 1] == IGNORED_LABEL).all(), "what is seen is not predicted"
        assert row.labels_S[row.prefix - 1 :].tolist() == sample.tokens[row.prefix :].tolist()
    assert seen == set(range(4, 13))

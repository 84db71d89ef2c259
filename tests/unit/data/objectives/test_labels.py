"""Rows of labelled texts: which position has which label, and which text a token belongs to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config.data import DataConfig
from llmtrain.data.loader import build_stream
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import RowConfig
from llmtrain.data.storage.targets import NO_LABEL, LabelsRecord
from llmtrain.errors import ConfigError, DataError
from llmtrain.values.batch import IGNORED_LABEL, PADDING
from tests.support.datasets import EOS_ID, VOCAB_SIZE, random_documents, write_dataset, write_target_dataset

SEQ_LEN, SEPARATOR = 24, 5


def rows_of(folder: Path, **keys: Any) -> list[Any]:
    """(row, the ids of its text) of every text that a run reads."""
    tree = {"train": [{"path": str(folder)}], "objective": "labels", "seq_len": SEQ_LEN, **keys}
    data = DataConfig.model_validate({**tree, "cache_dir": str(folder / "cache")})
    stream = build_stream(data.train, data, seed=1)
    record = stream.labels
    assert record is not None
    row_config = RowConfig(data, 1, EOS_ID, record.family, labels=record)
    samples = [stream.sample(number) for number in range(stream.length_once)]
    return [(pack_sample(sample, row_config), sample) for sample in samples]


def texts(seed: int = 0, count: int = 20) -> list[np.ndarray]:
    """Of 3 to SEQ_LEN tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(6, VOCAB_SIZE, size) for size in (SEQ_LEN, 3, *generator.integers(3, SEQ_LEN, count))]


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_text_has_its_label_where_it_is_classified(tmp_path: Path, family: str) -> None:
    documents = texts()
    labels = {document.tobytes(): number % 3 for number, document in enumerate(documents)}
    record = LabelsRecord("classification", ("a", "b", "c"), family)  # type: ignore[arg-type]
    pairs = [(document, np.array([labels[document.tobytes()]])) for document in documents]
    write_target_dataset(tmp_path, [pairs[:9], pairs[9:]], record)
    seen = set()
    for row, sample in rows_of(tmp_path):
        length = SEQ_LEN - sample.padding
        ids = row.tokens_S[:length]
        seen.add(ids.tobytes())
        place = 0 if family == "encoder" else length - 1
        assert row.labels_S[place] == labels[ids.tobytes()]
        assert (np.delete(row.labels_S, place) == IGNORED_LABEL).all()
        assert ((row.segments_S == PADDING) == (np.arange(SEQ_LEN) >= length)).all()
        assert row.token_types_S is None
    assert seen == set(labels)


def test_a_word_has_its_tag_at_its_first_token(tmp_path: Path) -> None:
    documents = texts()
    tags = [np.where(document % 2 == 0, document % 4, NO_LABEL) for document in documents]
    write_target_dataset(tmp_path, [list(zip(documents, tags, strict=True))], LabelsRecord("tagging", tuple("abcd")))
    for row, sample in rows_of(tmp_path):
        length = SEQ_LEN - sample.padding
        ids = row.tokens_S[:length]
        assert (row.labels_S[:length] == np.where(ids % 2 == 0, ids % 4, IGNORED_LABEL)).all()
        assert (row.labels_S[length:] == IGNORED_LABEL).all()


def test_an_answer_is_where_it_begins_and_where_it_ends(tmp_path: Path) -> None:
    documents = texts()
    for document in documents:
        document[[1, -1]] = SEPARATOR
    bounds = [np.array([len(document) // 2, len(document)]) for document in documents]
    record = LabelsRecord("qa", separator_id=SEPARATOR)
    write_target_dataset(tmp_path, [list(zip(documents, bounds, strict=True))], record)
    for row, sample in rows_of(tmp_path):
        length = SEQ_LEN - sample.padding
        assert row.labels_S[:2].tolist() == [length // 2, length - 1]  # the last position of the answer
        assert (row.labels_S[2:] == IGNORED_LABEL).all()
        # The question with the separator behind it, the context with its own; padding is of neither.
        assert row.token_types_S.tolist() == [0] * 2 + [1] * (length - 2) + [0] * sample.padding


def test_texts_that_are_too_long_are_refused_or_left_out(tmp_path: Path) -> None:
    documents = [*texts(), np.full(SEQ_LEN + 1, 7)]
    pairs = [(document, np.array([0])) for document in documents]
    write_target_dataset(tmp_path, [pairs], LabelsRecord("classification", ("a", "b")))
    with pytest.raises(ConfigError, match=r"data.labels.too_long = error: .*has 1 document of .*Set drop, or data"):
        rows_of(tmp_path)
    assert len(rows_of(tmp_path, labels={"too_long": "drop"})) == len(documents) - 1


def test_data_without_labels_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [random_documents(5)])
    with pytest.raises(DataError, match=r"has no labels members, which data\.objective = labels needs"):
        rows_of(tmp_path)
    for name in ("ab", "ba"):
        record = LabelsRecord("classification", tuple(name))
        write_target_dataset(tmp_path / name, [[(np.arange(6, 9), np.array([0]))]], record)
    sources = [{"path": str(tmp_path / name)} for name in ("ab", "ba")]
    with pytest.raises(DataError, match=r"has other labels \(names = \('b', 'a'\), not \('a', 'b'\)\)"):
        rows_of(tmp_path / "ab", train=sources)


def test_a_soft_prompt_is_of_the_first_text_and_no_target(tmp_path: Path) -> None:
    record = LabelsRecord("classification", ("a", "b"), separator_id=SEPARATOR)
    write_target_dataset(tmp_path, [[(np.array([7, SEPARATOR, 8, SEPARATOR]), np.array([1]))]], record)
    ((row, sample),) = rows_of(tmp_path)
    data = DataConfig.model_validate({"train": [{"path": str(tmp_path)}], "objective": "labels", "seq_len": SEQ_LEN})
    prompted = pack_sample(sample, RowConfig(data, 1, EOS_ID, "encoder", labels=record, prompt_tokens=2))
    assert prompted.labels_S.tolist() == [IGNORED_LABEL] * 2 + row.labels_S.tolist()
    assert prompted.token_types_S.tolist() == [0] * 2 + row.token_types_S.tolist()  # type: ignore[union-attr]
    assert row.token_types_S.tolist()[:4] == [0, 0, 1, 1]

"""Augmentation: what is read changes, what is to be predicted does not, and nothing of it depends on anything else."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import DataConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.objectives.causal import PackedSample
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import PieceTable, RowConfig
from llmtrain.data.storage.targets import LabelsRecord
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL, PADDING, TENSORS
from tests.support.datasets import EOS_ID, VOCAB_SIZE, random_documents, write_dataset
from tests.support.rows import EOS, FIRST_SENTINEL, MASK, NUM_SPECIAL, PAD, random_sample, row_config_of, sample_of
from tests.unit.data.objectives.test_masking import words_of

SEQ_LEN = 48
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("decoder", "causal", {}),
    ("decoder", "causal", {"reset_attention": True, "reset_positions": True}),
    ("decoder", "prefix", {}),
    ("decoder", "fim", {}),
    ("encoder", "masked", {}),
    ("encoder", "masked", {"masked": {"unit": "word"}, "reset_attention": True, "reset_positions": True}),
    ("encoder_decoder", "span_corruption", {}),
    ("encoder_decoder", "ul2", {}),
    ("encoder_decoder", "prefix", {}),
]
IDS = [f"{family}-{objective}-{len(keys)}" for family, objective, keys in CASES]
OPERATIONS = ("drop_tokens", "delete_words", "replace_words", "swap_words")


def noisy(family: str, objective: str, augment: dict[str, float], **keys: Any) -> RowConfig:
    return replace(row_config_of(family, objective, SEQ_LEN, augment=augment, **keys), augmented=True)


def both(sample: Sample, row_config: RowConfig) -> tuple[PackedSample, PackedSample]:
    """The row to evaluate, and the row to train on."""
    return pack_sample(sample, replace(row_config, augmented=False)), pack_sample(sample, row_config)


def arrays(row: PackedSample) -> list[Any]:
    return [None if value is None else np.asarray(value).tolist() for value in vars(row).values()]


def numbers(count: int = 40) -> Iterator[Sample]:
    yield from (random_sample(number, SEQ_LEN) for number in range(count))


@pytest.mark.parametrize(("family", "objective", "keys"), CASES, ids=IDS)
def test_off_it_changes_no_bit(family: str, objective: str, keys: dict[str, Any]) -> None:
    plain = row_config_of(family, objective, SEQ_LEN, **keys)
    for sample in numbers(10):
        assert arrays(pack_sample(sample, plain)) == arrays(pack_sample(sample, replace(plain, augmented=True)))


@pytest.mark.parametrize(
    ("case", "operation"),
    [
        (case, operation)
        for case in CASES
        for operation in OPERATIONS
        if (case[0], operation) != ("decoder", "swap_words")
    ],
)
def test_the_targets_are_those_of_the_text(case: tuple[str, str, dict[str, Any]], operation: str) -> None:
    """Every target that is left is one of the row without noise, in its order (masked: at its token)."""
    family, objective, keys = case
    row_config, changed, lost = noisy(family, objective, {operation: 0.3}, **keys), 0, 0
    for sample in numbers():
        clean, noised = both(sample, row_config)
        changed += arrays(clean) != arrays(noised)
        if family == "encoder_decoder":
            for name in ("tokens_S", "labels_S", "positions_S", "segments_S"):
                assert np.array_equal(getattr(clean, name), getattr(noised, name)), "the target is not touched"
            continue
        before = clean.labels_S[clean.labels_S != IGNORED_LABEL].tolist()
        after = noised.labels_S[noised.labels_S != IGNORED_LABEL].tolist()
        if objective == "masked":
            assert sorted(after) == sorted(before), "all that is hidden is still to be predicted"
            continue
        left = iter(before)
        assert all(label in left for label in after), "in their order, none twice"
        lost += len(before) - len(after)
    assert changed > 20
    assert (lost > 0) == (family == "decoder")


@pytest.mark.parametrize(("family", "objective", "keys"), CASES, ids=IDS)
def test_what_is_dropped_leaves_padding_that_nobody_sees(family: str, objective: str, keys: dict[str, Any]) -> None:
    row_config = noisy(family, objective, {"delete_words": 0.4, "drop_tokens": 0.1}, **keys)
    for sample in numbers(20):
        clean, noised = both(sample, row_config)
        if family == "encoder_decoder":
            tokens, segments, filler = noised.encoder_tokens_T, noised.encoder_segments_T, PAD
            before = clean.encoder_tokens_T
        else:
            tokens, segments, before, filler = noised.tokens_S, noised.segments_S, clean.tokens_S, EOS
        assert tokens is not None and before is not None and len(tokens) == len(before)
        special = before[(before < NUM_SPECIAL) | (before >= FIRST_SENTINEL)].tolist()
        found = iter(tokens.tolist())
        assert all(token in found for token in special), "special tokens and sentinels stay, in their order"
        if segments is not None:
            gone = segments == PADDING
            assert (np.diff(gone.astype(int)) >= 0).all(), "padding stands at the end"
            assert (tokens[gone] == filler).all()
        elif family == "decoder":
            length = len(tokens) - int(np.argmax(noised.labels_S[::-1] != IGNORED_LABEL))
            assert (tokens[length:] == EOS).all() or length == len(tokens)


def test_a_causal_row_is_what_the_slow_reference_makes_of_it() -> None:
    """Words drop out of the pairs of (token that is read, token that is to be predicted)."""
    row_config, deleted = noisy("decoder", "causal", {"delete_words": 0.5}), 0
    for sample in numbers():
        clean, noised = both(sample, row_config)
        pairs = list(zip(clean.tokens_S.tolist(), clean.labels_S.tolist(), strict=True))
        words = words_of(clean.tokens_S)
        left = list(zip(noised.tokens_S.tolist(), noised.labels_S.tolist(), strict=True))
        left = [pair for pair in left if pair[1] != IGNORED_LABEL]
        # Each word is there as a whole or not at all: go through both side by side.
        place = 0
        for begin, end in _units(words, len(pairs)):
            unit = pairs[begin:end]
            if left[place : place + len(unit)] == unit:
                place += len(unit)
            else:
                assert range(begin, end) in words
                deleted += 1
        assert place == len(left)
    assert deleted


def _units(words: list[range], length: int) -> Iterator[tuple[int, int]]:
    """Words, and the special tokens between them."""
    place = 0
    for word in words:
        for other in range(place, word.start):
            yield other, other + 1
        yield word.start, word.stop
        place = word.stop
    for other in range(place, length):
        yield other, other + 1


def test_replaced_words_have_as_many_tokens_and_lose_the_targets_within() -> None:
    row_config = noisy("decoder", "causal", {"replace_words": 0.5})
    replaced = 0
    for sample in numbers():
        clean, noised = both(sample, row_config)
        differs = clean.tokens_S != noised.tokens_S
        silent = noised.labels_S == IGNORED_LABEL
        for word in words_of(clean.tokens_S):
            inside = np.arange(word.start, word.stop)
            assert silent[inside[:-1]].all() or not silent[inside].any(), "a word as a whole"
            if len(inside) > 1 and not silent[inside[0]]:
                assert not differs[inside].any()
            replaced += int(differs[inside].any())
            assert not silent[inside[-1]], "what follows the word is still a target"
            begins = noised.tokens_S[inside] % 3 == 0
            if differs[inside[0]]:
                assert begins[0] and not begins[1:].any()
        assert (noised.tokens_S[clean.tokens_S < NUM_SPECIAL] == clean.tokens_S[clean.tokens_S < NUM_SPECIAL]).all()
        assert (noised.tokens_S >= NUM_SPECIAL).sum() == (clean.tokens_S >= NUM_SPECIAL).sum()
    assert replaced > 100


def test_swapped_words_stay_whole_and_take_their_hidden_tokens_along() -> None:
    row_config = noisy("encoder", "masked", {"swap_words": 0.5}, masked={"mask_share": 1.0, "random_share": 0.0})
    moved = 0
    for sample in numbers():
        tokens = sample.tokens.copy()
        behind_special = np.concatenate(([True], tokens[:-1] < NUM_SPECIAL)) & (tokens >= NUM_SPECIAL)
        tokens[behind_special] = 9  # it begins a word wherever it stands
        clean, noised = both(sample_of(tokens, sample.number), row_config)
        text = [np.where(row.labels_S == IGNORED_LABEL, row.tokens_S, row.labels_S) for row in (clean, noised)]
        before, after = ([tuple(tokens[list(word)]) for word in words_of(tokens)] for tokens in text)
        assert sorted(before) == sorted(after)
        assert (noised.tokens_S[noised.labels_S != IGNORED_LABEL] == MASK).all()
        place = 0
        while place < len(before):
            if before[place] != after[place]:
                assert (after[place], after[place + 1]) == (before[place + 1], before[place])
                moved, place = moved + 1, place + 1
            place += 1
    assert moved > 50


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_text_that_is_classified_keeps_its_label_and_where_it_is_predicted(family: str) -> None:
    """At an encoder's first token, and at a decoder's last one, which stays with its word."""
    record = LabelsRecord("classification", ("a", "b", "c"), family)  # type: ignore[arg-type]
    augment = {"drop_tokens": 0.1, "delete_words": 0.3, "replace_words": 0.2, "swap_words": 0.2}
    row_config = replace(noisy(family, "labels", augment), labels=record)
    changed = 0
    for sample in numbers():
        text = replace(sample, padding=sample.number % 9, targets=np.array([sample.number % 3]))
        text.tokens[0] = MASK
        text.tokens[SEQ_LEN + 1 - text.padding :] = EOS
        clean, noised = both(text, row_config)
        (place,) = np.flatnonzero(noised.labels_S != IGNORED_LABEL)
        assert noised.segments_S is not None
        last = int((noised.segments_S != PADDING).sum()) - 1
        assert noised.labels_S[place] == sample.number % 3
        assert place == (0 if family == "encoder" else last)
        (before,) = np.flatnonzero(clean.labels_S != IGNORED_LABEL)
        assert noised.tokens_S[place] == clean.tokens_S[before]
        changed += not np.array_equal(clean.tokens_S, noised.tokens_S)
    assert changed > 30


@given(share=st.sampled_from([0.1, 0.3, 0.6]), operation=st.sampled_from(OPERATIONS[:3]))
@settings(deadline=None, max_examples=9)
def test_shares(share: float, operation: str) -> None:
    """As many as asked for, of words or of tokens."""
    row_config, counts, total = noisy("decoder", "causal", {operation: share}), 0, 0
    for sample in numbers(150):
        clean, noised = both(sample, row_config)
        if operation == "replace_words":
            for word in words_of(clean.tokens_S):
                counts += bool((clean.tokens_S[list(word)] != noised.tokens_S[list(word)]).any())
                total += 1
        else:
            counts += int((noised.labels_S == IGNORED_LABEL).sum())
            total += int((clean.tokens_S >= NUM_SPECIAL).sum())
    assert counts / total == pytest.approx(share, abs=0.04)


def test_positions_have_no_gaps_and_documents_their_own() -> None:
    row_config = noisy("decoder", "causal", {"delete_words": 0.4}, reset_positions=True, reset_attention=True)
    for sample in numbers(20):
        _, noised = both(sample, row_config)
        assert noised.segments_S is not None
        for document in set(noised.segments_S.tolist()) - {PADDING}:
            positions = noised.positions_S[noised.segments_S == document]
            assert positions.tolist() == list(range(len(positions)))


@pytest.mark.parametrize(("family", "objective", "keys"), CASES, ids=IDS)
def test_it_depends_on_seed_and_number_alone(family: str, objective: str, keys: dict[str, Any]) -> None:
    augment = {"delete_words": 0.2, "replace_words": 0.2}
    forth = [arrays(pack_sample(sample, noisy(family, objective, augment, **keys))) for sample in numbers(20)]
    samples = list(numbers(20))[::-1]
    back = [arrays(pack_sample(sample, noisy(family, objective, augment, **keys))) for sample in samples]
    assert forth == back[::-1]
    again = noisy(family, objective, augment, **keys)
    text = random_sample(1, SEQ_LEN).tokens
    rows = {str(arrays(pack_sample(sample_of(text, number), again))) for number in range(20)}
    assert len(rows) == 20, "the same text is another one each time that it comes"
    other = replace(again, seed=2)
    assert arrays(pack_sample(sample_of(text), again)) != arrays(pack_sample(sample_of(text), other))


def test_all_layouts_and_resumes_read_the_same(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [random_documents(60, seed) for seed in range(2)])
    data = DataConfig.model_validate(
        {"train": [{"path": str(tmp_path / "data")}], "seq_len": 24, "augment": {"delete_words": 0.3}}
    )
    stream, ids = build_stream(data.train, data, 1), np.arange(VOCAB_SIZE)
    row_config = RowConfig(data, 1, EOS_ID, "decoder", PieceTable(ids < 4, ids % 3 == 0), augmented=True)

    def read(first_step: int, dp_size: int) -> list[Any]:
        """Steps first_step to 4 put together from all data ranks, micro-batches in their order."""
        steps = []
        loaders = [BatchLoader(stream, row_config, 8, 2, rank, dp_size) for rank in range(dp_size)]
        runs = [loader.steps(8 * (first_step - 1), first_step) for loader in loaders]
        for batches in islice(zip(*runs, strict=True), 5 - first_step):
            order = [batch for group in zip(*batches, strict=True) for batch in group]
            steps.append([[getattr(batch, name) for name in TENSORS] for batch in order])
        for run in runs:
            run.close()
        return [[[None if t is None else t.tolist() for t in batch] for batch in step] for step in steps]

    whole = read(1, 1)
    assert whole == read(1, 2) == read(1, 4)
    assert whole[2:] == read(3, 2)

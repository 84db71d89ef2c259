"""Masked language modelling: what is chosen and what stands there, against the papers and their released code."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.objectives.causal import PackedSample
from llmtrain.data.objectives.masking import find_words, masked
from llmtrain.values.batch import IGNORED_LABEL
from tests.support.rows import EOS, MASK, NUM_SPECIAL, PIECES, VOCAB_SIZE, random_sample, row_config_of, sample_of

UNITS = ("token", "word", "span")
windows = st.lists(st.integers(0, VOCAB_SIZE - 1) | st.just(EOS), min_size=2, max_size=40)


def chosen_of(row: PackedSample) -> np.ndarray:
    return np.flatnonzero(row.labels_S != IGNORED_LABEL)


def words_of(tokens: np.ndarray) -> list[range]:
    """The slow reference."""
    words: list[range] = []
    previous_special = True
    for place, token in enumerate(tokens.tolist()):
        if token < NUM_SPECIAL:
            previous_special = True
            continue
        if previous_special or token % 3 == 0:
            words.append(range(place, place + 1))
        else:
            words[-1] = range(words[-1].start, place + 1)
        previous_special = False
    return words


@pytest.mark.parametrize("unit", UNITS)
@given(tokens=windows, number=st.integers(0, 10**9), probability=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=60)
def test_labels_are_the_hidden_tokens_and_nothing_else_changes(
    unit: str, tokens: list[int], number: int, probability: float
) -> None:
    sample = sample_of(tokens, number)
    row_config = row_config_of("encoder", "masked", len(tokens) - 1, masked={"unit": unit, "probability": probability})
    row = masked(sample, row_config)
    window, chosen = np.array(tokens[:-1]), chosen_of(row)
    others = np.setdiff1d(np.arange(len(window)), chosen)
    assert row.labels_S[chosen].tolist() == window[chosen].tolist()
    assert row.tokens_S[others].tolist() == window[others].tolist()
    assert (window[chosen] >= NUM_SPECIAL).all(), "special tokens are never chosen"
    replaced = row.tokens_S[chosen]
    assert ((replaced == MASK) | (replaced >= NUM_SPECIAL)).all(), "no special token but the mask is put in"
    usable = int((window >= NUM_SPECIAL).sum())
    count = min(usable, max(1, round(probability * usable)))
    if unit == "word":
        assert min(usable, 1) <= len(chosen) <= count
    else:
        assert len(chosen) == count
    assert sample.tokens.tolist() == tokens, "the sample itself is left as it was"


def test_words_equal_a_slow_reference() -> None:
    for number in range(50):
        sample = random_sample(number, 60, eos_share=0.2)
        window = sample.tokens[:-1]
        words = find_words(window, window >= NUM_SPECIAL, sample.document_starts, PIECES)
        pairs = list(zip(words.begins.tolist(), words.ends.tolist(), strict=True))
        assert pairs == [(word.start, word.stop) for word in words_of(window)]


def test_eighty_ten_ten() -> None:
    """Devlin et al. 2019, section 3.1. Of the 10% random ones, one in 93 is the original by chance."""
    row_config = row_config_of("encoder", "masked", 256)
    fates: Counter[str] = Counter()
    random_tokens: Counter[int] = Counter()
    places: Counter[int] = Counter()
    total = 0
    for number in range(400):
        sample = random_sample(number, 256)
        row, window = masked(sample, row_config), sample.tokens[:-1]
        chosen = chosen_of(row)
        total += len(chosen)
        places.update((chosen // 32).tolist())
        for old, new in zip(window[chosen], row.tokens_S[chosen], strict=True):
            fates["mask" if new == MASK else "kept" if new == old else "random"] += 1
            if new not in (MASK, old):
                random_tokens[int(new)] += 1
    shares = {fate: count / total for fate, count in fates.items()}
    assert shares["mask"] == pytest.approx(0.8, abs=0.015)
    assert shares["kept"] == pytest.approx(0.1, abs=0.012)
    assert shares["random"] == pytest.approx(0.1, abs=0.012)
    assert len(random_tokens) == VOCAB_SIZE - NUM_SPECIAL and min(random_tokens) == NUM_SPECIAL
    assert max(places.values()) / min(places.values()) < 1.2, "every place is chosen as often, the first and last too"


def test_the_shares_are_keys() -> None:
    only_masks = {"mask_share": 1.0, "random_share": 0.0}
    row = masked(random_sample(1, 64), row_config_of("encoder", "masked", 64, masked=only_masks))
    assert (row.tokens_S[chosen_of(row)] == MASK).all()
    kept = {"mask_share": 0.0, "random_share": 0.0}
    row = masked(random_sample(1, 64), row_config_of("encoder", "masked", 64, masked=kept))
    assert row.tokens_S.tolist() == random_sample(1, 64).tokens[:-1].tolist()


def test_whole_words_are_chosen_whole_and_alike() -> None:
    row_config = row_config_of("encoder", "masked", 128, masked={"unit": "word"})
    chosen_words: Counter[int] = Counter()
    total = 0
    for number in range(200):
        sample = random_sample(number, 128)
        chosen = set(chosen_of(masked(sample, row_config)).tolist())
        total += len(chosen)
        for word in words_of(sample.tokens[:-1]):
            inside = chosen & set(word)
            assert not inside or inside == set(word)
            chosen_words[len(word)] += bool(inside)
    assert total / (200 * 128 * 0.95) == pytest.approx(0.15, abs=0.005)
    assert chosen_words[3] > 100, "long words have their share"


def test_a_word_longer_than_the_count_is_cut() -> None:
    row = masked(sample_of([10] * 21), row_config_of("encoder", "masked", 20, masked={"unit": "word"}))
    assert chosen_of(row).tolist() == [0, 1, 2]


def test_spans_have_truncated_geometric_lengths_and_one_fate() -> None:
    """Joshi et al. 2020, section 3.1: Geo(0.2) up to 10, mean 3.8 words. Every token is a word of its own here."""
    row_config = row_config_of("encoder", "masked", 2000, masked={"unit": "span", "random_share": 0.2})
    lengths: list[int] = []
    for number in range(60):
        tokens = np.random.default_rng(number).integers(3, 33, 2001) * 3
        row = masked(sample_of(tokens, number), row_config)
        chosen = chosen_of(row)
        assert len(chosen) == 300
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)
        lengths += [len(run) for run in runs]
        masks = [(row.tokens_S[run] == MASK).mean() for run in runs if len(run) <= 10]
        assert np.mean([share in (0.0, 1.0) for share in masks]) > 0.8, "but for spans that run into each other"
    # Spans that touch look like one: compare with a simulation of the paper's procedure instead of with its mean.
    assert np.mean(lengths) == pytest.approx(simulated_mean_run(2000, 300), rel=0.04)


def simulated_mean_run(size: int, count: int) -> float:
    generator = np.random.default_rng(0)
    shares = 0.2 * 0.8 ** np.arange(10)
    assert (shares / shares.sum() * np.arange(1, 11)).sum() == pytest.approx(3.8, abs=0.01)
    runs = []
    for _ in range(60):
        hidden: set[int] = set()
        while len(hidden) < count:
            length, anchor = generator.choice(10, p=shares / shares.sum()) + 1, generator.integers(size)
            if anchor in hidden:
                continue
            for place in range(anchor, min(anchor + length, size)):
                if len(hidden) < count:
                    hidden.add(place)
        places = np.array(sorted(hidden))
        runs.append(len(places) / (1 + int((np.diff(places) > 1).sum())))
    return float(np.mean(runs))


def test_spans_do_not_cross_documents() -> None:
    tokens = ([9, 12, EOS] * 30)[:61]
    row_config = row_config_of("encoder", "masked", 60, masked={"unit": "span", "probability": 0.5, "max_span": 10})
    for number in range(20):
        row = masked(sample_of(tokens, number), row_config)
        assert len(chosen_of(row)) == 20
        assert not set(chosen_of(row).tolist()) & set(range(2, 60, 3))


@pytest.mark.parametrize("unit", UNITS)
def test_a_window_of_ends_alone_has_no_targets(unit: str) -> None:
    row = masked(sample_of([EOS] * 9), row_config_of("encoder", "masked", 8, masked={"unit": unit}))
    assert row.tokens_S.tolist() == [EOS] * 8 and not len(chosen_of(row))


def test_documents_are_told_apart() -> None:
    sample = sample_of([10, 11, EOS, 12, 13, EOS, 14])
    row = masked(sample, row_config_of("encoder", "masked", 6, reset_attention=True, reset_positions=True))
    assert row.segments_S is not None
    assert row.segments_S.tolist() == [0, 0, 0, 1, 1, 1] and row.positions_S.tolist() == [0, 1, 2, 0, 1, 2]

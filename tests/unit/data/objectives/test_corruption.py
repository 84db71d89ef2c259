"""Span corruption, UL2 and split prefixes: nothing is lost, nothing leaks, and the numbers are the papers'."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import CorruptionConfig
from llmtrain.config.sequence_lengths import span_counts
from llmtrain.data.objectives.causal import PackedSample
from llmtrain.data.objectives.corruption import noise_mask
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import RowConfig
from llmtrain.values.batch import IGNORED_LABEL, PADDING
from tests.support.rows import EOS, FIRST_SENTINEL, PAD, VOCAB_SIZE, random_sample, row_config_of, sample_of

windows = st.lists(st.integers(5, VOCAB_SIZE - 1) | st.just(EOS), min_size=3, max_size=60)


def sides(row: PackedSample) -> tuple[list[int], list[int]]:
    """Input and target without padding, after a look at how they are laid out."""
    assert row.encoder_tokens_T is not None
    target = row.labels_S[row.labels_S != IGNORED_LABEL]
    size = len(target)
    assert (row.labels_S[size:] == IGNORED_LABEL).all(), "padding comes last"
    assert row.tokens_S[:size].tolist() == [PAD, *target[:-1].tolist()], "the decoder never reads what it predicts"
    assert (row.tokens_S[size:] == PAD).all()
    if row.segments_S is not None:
        assert row.segments_S.tolist() == [0] * size + [PADDING] * (len(row.labels_S) - size)
    else:
        assert size == len(row.labels_S)
    given_T = row.encoder_tokens_T
    if row.encoder_segments_T is not None:
        is_real = row.encoder_segments_T != PADDING
        assert (given_T[~is_real] == PAD).all() and (np.diff(is_real.astype(int)) <= 0).all()
        given_T = given_T[is_real]
    return given_T.tolist(), target.tolist()


def rebuilt(given: list[int], target: list[int], num_spans: int) -> list[int]:
    """The window from both sides, and that its tokens stand on one side only."""
    assert given[-1] == target[-1] == EOS
    sentinels = list(range(FIRST_SENTINEL, FIRST_SENTINEL + num_spans))
    assert [token for token in given if token >= FIRST_SENTINEL] == sentinels
    assert [token for token in target if token >= FIRST_SENTINEL] == sentinels
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= FIRST_SENTINEL:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    window: list[int] = []
    for token in given[:-1]:
        window += spans[token] if token >= FIRST_SENTINEL else [token]
    return window


@given(tokens=windows, number=st.integers(0, 10**9), density=st.floats(0.01, 0.99), mean_length=st.floats(0.5, 70))
@settings(deadline=None, max_examples=100)
def test_input_and_target_give_the_window_back(
    tokens: list[int], number: int, density: float, mean_length: float
) -> None:
    corruption = {"density": density, "mean_length": mean_length}
    row_config = row_config_of("encoder_decoder", "span_corruption", len(tokens) - 1, span_corruption=corruption)
    row = pack_sample(sample_of(tokens, number), row_config)
    counts = span_counts(len(tokens) - 1, row_config.data.span_corruption)
    given, target = sides(row)
    assert rebuilt(given, target, counts.spans) == tokens[:-1]
    assert len(target) == counts.tokens + counts.spans + 1


def published_noise_mask(length: int, density: float, mean: float, generator: np.random.Generator) -> np.ndarray:
    """random_spans_noise_mask of the T5 repository, preprocessors.py, line by line."""
    num_noise_tokens = int(np.round(length * density))
    num_noise_tokens = min(max(num_noise_tokens, 1), length - 1)
    num_noise_spans = max(int(np.round(num_noise_tokens / mean)), 1)
    num_nonnoise_tokens = length - num_noise_tokens

    def random_segmentation(num_items: int, num_segments: int) -> np.ndarray:
        first_in_segment = np.arange(num_items - 1) < num_segments - 1
        generator.shuffle(first_in_segment)
        segment_id = np.cumsum(np.pad(first_in_segment, [[1, 0]]))
        return np.bincount(segment_id, minlength=num_segments)

    noise_lengths = random_segmentation(num_noise_tokens, num_noise_spans)
    nonnoise_lengths = random_segmentation(num_nonnoise_tokens, num_noise_spans)
    interleaved = np.reshape(np.stack([nonnoise_lengths, noise_lengths], axis=1), [num_noise_spans * 2])
    starts = np.cumsum(interleaved)[:-1]
    indicator = np.zeros(length, int)
    indicator[starts] = 1
    return np.cumsum(indicator) % 2 == 1


def test_spans_are_distributed_as_published() -> None:
    """Share of noise by place, and lengths of spans, over many samples; the counts are equal in each."""
    length, samples = 114, 3000
    generator = np.random.default_rng(0)
    corruption = CorruptionConfig()
    counts = span_counts(length, corruption)
    ours = np.array(
        [noise_mask(length, counts, row_config_of("encoder_decoder", "causal", 8).draws(n)) for n in range(samples)]
    )
    theirs = np.array([published_noise_mask(length, 0.15, 3.0, generator) for _ in range(samples)])
    assert set(ours.sum(1)) == set(theirs.sum(1)) == {17}
    assert set(num_spans(ours)) == set(num_spans(theirs)) == {6}
    assert not ours[:, 0].any() and not theirs[:, 0].any() and ours[:, -1].all() and theirs[:, -1].all()
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.05
    a, b = span_lengths(ours), span_lengths(theirs)
    assert np.abs(a - b).max() < 0.015 and np.abs(a - b).sum() > 0


def num_spans(masks: np.ndarray) -> np.ndarray:
    return (masks[:, 1:] & ~masks[:, :-1]).sum(1)


def span_lengths(masks: np.ndarray) -> np.ndarray:
    """Share of each length from 0 to 12."""
    ends = np.flatnonzero(np.diff(np.pad(masks, ((0, 0), (1, 1))).astype(int).ravel()))
    lengths = np.bincount(ends[1::2] - ends[::2], minlength=13)[:13]
    return lengths / lengths.sum()


def test_partitions_have_equal_chances() -> None:
    """Of 2 spans in 5 noise tokens there are 4 partitions, and 4 of the 5 other tokens: 16 masks in all."""
    counts = span_counts(10, CorruptionConfig(density=0.5, mean_length=2.5))
    draws = row_config_of("encoder_decoder", "causal", 8).draws(0)
    found = Counter(tuple(noise_mask(10, counts, draws)) for _ in range(8000))
    assert len(found) == 16 and all(abs(count - 500) < 110 for count in found.values())


def test_a_worked_example() -> None:
    row_config = row_config_of("encoder_decoder", "span_corruption", 12)
    given, target = sides(pack_sample(sample_of([*range(10, 22), 99]), row_config))
    assert (given, target) == ([*range(10, 20), FIRST_SENTINEL, EOS], [FIRST_SENTINEL, 20, 21, EOS])


ul2_modes = {"denoisers": [
    {"mean_length": 3.0, "density": 0.15, "weight": 3, "mode_token": 97},
    {"mean_length": 8.0, "density": 0.5, "weight": 1, "mode_token": 98},
    {"kind": "prefix", "density": 0.25, "weight": 2, "mode_token": 99},
    {"kind": "prefix", "density": 0.5, "weight": 2},
]}  # fmt: skip


@given(tokens=windows, number=st.integers(0, 10**9))
@settings(deadline=None, max_examples=60)
def test_ul2_gives_the_window_back_under_every_denoiser(tokens: list[int], number: int) -> None:
    row_config = row_config_of("encoder_decoder", "ul2", len(tokens) - 1, ul2=ul2_modes)
    given, target = sides(pack_sample(sample_of(tokens, number), row_config))
    modes = [token - FIRST_SENTINEL for token in given if token >= FIRST_SENTINEL + 97]
    if modes:
        assert given.pop(0) == FIRST_SENTINEL + modes[0]
    spans = sum(token >= FIRST_SENTINEL for token in target)
    assert rebuilt(given, target, spans) == tokens[:-1]
    if modes in ([], [99]):
        density = 0.25 if modes else 0.5
        assert target[1:-1] == tokens[-1 - max(1, round(density * (len(tokens) - 1))) : -1], "the end is taken out"


def test_ul2_mixes_by_weight_and_by_number_alone() -> None:
    row_config = row_config_of("encoder_decoder", "ul2", 40, ul2=ul2_modes)
    found = Counter(mode_of(row_config, number) for number in range(4000))
    for mode, weight in {97: 3, 98: 1, 99: 2, None: 2}.items():
        assert found[mode] / 4000 == pytest.approx(weight / 8, abs=0.03)
    assert [mode_of(row_config, n) for n in (7, 3, 5)] == [mode_of(row_config, n) for n in (3, 5, 7)][2:] + [
        mode_of(row_config, n) for n in (3, 5)
    ]


def mode_of(row_config: RowConfig, number: int) -> int | None:
    first = sides(pack_sample(random_sample(number, 40), row_config))[0][0]
    return first - FIRST_SENTINEL if first >= FIRST_SENTINEL + 97 else None


@given(tokens=windows, number=st.integers(0, 10**9), bounds=st.tuples(st.floats(0.01, 0.98), st.floats(0.01, 0.98)))
@settings(deadline=None, max_examples=60)
def test_a_split_prefix_is_within_its_bounds(tokens: list[int], number: int, bounds: tuple[float, float]) -> None:
    keys = {"min_share": min(bounds), "max_share": max(bounds)}
    row_config = row_config_of("encoder_decoder", "prefix", len(tokens) - 1, prefix=keys)
    given, target = sides(pack_sample(sample_of(tokens, number), row_config))
    assert given[-1] == target[-1] == EOS and given[:-1] + target[:-1] == tokens[:-1]
    size, length = len(tokens) - 1, len(given) - 1
    assert 1 <= length <= size - 1
    assert int(size * keys["min_share"]) <= length <= max(1, int(size * keys["max_share"]))


def test_prefixes_have_all_lengths() -> None:
    row_config = row_config_of("encoder_decoder", "prefix", 16)
    lengths = Counter(len(sides(pack_sample(random_sample(n, 16), row_config))[0]) - 1 for n in range(900))
    assert sorted(lengths) == list(range(4, 13)) and min(lengths.values()) > 60


@pytest.mark.parametrize(("objective", "keys"), [("span_corruption", {}), ("ul2", {"ul2": ul2_modes}), ("prefix", {})])
@pytest.mark.parametrize("seq_len", [2, 3, 7, 64, 509])
def test_every_row_has_the_lengths_of_the_run(objective: str, keys: dict[str, Any], seq_len: int) -> None:
    row_config = row_config_of("encoder_decoder", objective, seq_len, **keys)
    rows = [pack_sample(random_sample(number, seq_len), row_config) for number in range(20)]
    for row in rows:
        sides(row)
        assert row.encoder_tokens_T is not None
        assert (len(row.tokens_S), len(row.encoder_tokens_T)) == (row_config.lengths.main, row_config.lengths.encoder)
    assert len({(row.segments_S is None, row.encoder_segments_T is None) for row in rows}) == 1


def test_a_run_without_padding_has_no_segments() -> None:
    """Of 134 tokens 20 are taken out, in 3 spans: 24 in the target and 118 in the input, which is filled up to 120."""
    row_config = row_config_of("encoder_decoder", "span_corruption", 134, span_corruption={"mean_length": 7.0})
    row = pack_sample(random_sample(0, 134), row_config)
    assert row.segments_S is None and row.encoder_segments_T is not None
    assert (row_config.lengths.main, row_config.lengths.encoder) == (24, 120)


def test_published_lengths() -> None:
    """T5: 512 inputs and 114 targets come from windows of 568 tokens (Raffel et al. 2020, section 3.1.4)."""
    row_config = row_config_of("encoder_decoder", "span_corruption", 568)
    given, target = sides(pack_sample(random_sample(0, 568), row_config))
    assert (len(given), len(target)) == (512, 114)

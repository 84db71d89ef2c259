"""Fill in the middle: documents come back from their parts, and keep their places."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.objectives.causal import PackedSample
from llmtrain.data.objectives.table import pack_sample
from llmtrain.values.batch import IGNORED_LABEL
from tests.support.rows import EOS, FIRST_SENTINEL, VOCAB_SIZE, random_sample, row_config_of, sample_of

PREFIX, MIDDLE, SUFFIX = range(FIRST_SENTINEL, FIRST_SENTINEL + 3)

windows = st.lists(st.integers(5, VOCAB_SIZE - 1) | st.just(EOS), min_size=2, max_size=50)


def window_of(row: PackedSample) -> list[int]:
    """All seq_len + 1 tokens, after a look at the labels."""
    assert row.labels_S[:-1].tolist() == row.tokens_S[1:].tolist()
    return [*row.tokens_S.tolist(), int(row.labels_S[-1])]


def split(tokens: list[int]) -> list[list[int]]:
    """Parts of documents, each with its end of sequence where it has one."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts[-1].append(token)
        if token == EOS:
            parts.append([])
    return parts if parts[-1] else parts[:-1]


def restored(part: list[int]) -> tuple[list[int], str, tuple[int, int]]:
    """The text of a part as it was, how it was written, and where it was cut."""
    if PREFIX not in part:
        return part, "whole", (0, 0)
    end = part[-1:] if part[-1] == EOS else []
    body = part[: len(part) - len(end)]
    assert [body.count(sentinel) for sentinel in (PREFIX, MIDDLE, SUFFIX)] == [1, 1, 1] and body[0] == PREFIX
    middle, suffix = body.index(MIDDLE), body.index(SUFFIX)
    assert suffix < middle
    if suffix == 1:
        # The second variant of SPM does not say where the prefix ends: prefix and middle stand together.
        return body[middle + 1 :] + body[2:middle] + end, "spm", (0, len(body) - middle - 1)
    prefix = body[1:suffix]
    return prefix + body[middle + 1 :] + body[suffix + 1 : middle] + end, "psm", (suffix - 1, len(body) - middle - 1)


@given(tokens=windows, number=st.integers(0, 10**9), rate=st.floats(0, 1), spm=st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_documents_come_back_but_for_three_tokens(tokens: list[int], number: int, rate: float, spm: float) -> None:
    row_config = row_config_of("decoder", "fim", len(tokens) - 1, fim={"rate": rate, "suffix_first_share": spm})
    sample = sample_of(tokens, number)
    window = window_of(pack_sample(sample, row_config))
    assert sample.tokens.tolist() == tokens and len(window) == len(tokens)
    before, after = split(tokens), split(window)
    assert [len(part) for part in before] == [len(part) for part in after], "documents keep their places"
    for part, moved in zip(before, after, strict=True):
        text, kind, _ = restored(moved)
        end = part[-1:] if part[-1] == EOS else []
        body = part[: len(part) - len(end)]
        if kind == "whole":
            assert moved == part
            assert rate < 1 or len(body) <= 3
        else:
            assert text == body[:-3] + end and len(body) > 3


def test_shares_and_cuts_are_the_paper_s() -> None:
    """Bavarian et al. 2022, section 3: half are cut, half of these SPM; both cuts uniform, so thirds on average."""
    row_config = row_config_of("decoder", "fim", 63)
    kinds: Counter[str] = Counter()
    prefixes, middles = [], []
    for number in range(2000):
        _, kind, (prefix, middle) = restored(window_of(pack_sample(random_sample(number, 63, eos_share=0), row_config)))
        kinds[kind] += 1
        if kind == "psm":
            prefixes.append(prefix)
            middles.append(middle)
    assert kinds["whole"] / 2000 == pytest.approx(0.5, abs=0.04)
    assert kinds["spm"] / (kinds["spm"] + kinds["psm"]) == pytest.approx(0.5, abs=0.05)
    assert np.mean(prefixes) == pytest.approx(61 / 3, abs=2) and np.mean(middles) == pytest.approx(61 / 3, abs=2)
    assert min(prefixes) == 1 and max(prefixes) > 52, "an empty prefix reads as SPM"
    assert min(middles) == 0 and max(middles) > 52


def test_a_document_does_not_depend_on_those_after_it() -> None:
    one, other = [*range(10, 40), EOS, *range(40, 60)], [*range(10, 40), EOS, *range(70, 90)]
    row_config = row_config_of("decoder", "fim", 50, fim={"rate": 1.0})
    rows = [window_of(pack_sample(sample_of(tokens, 5), row_config)) for tokens in (one, other)]
    assert rows[0][:31] == rows[1][:31] and rows[0][:31] != one[:31]


def test_documents_are_told_apart_where_they_were() -> None:
    tokens = [*range(10, 20), EOS, *range(20, 30)]
    row_config = row_config_of("decoder", "fim", 20, fim={"rate": 1.0}, reset_attention=True, reset_positions=True)
    row = pack_sample(sample_of(tokens), row_config)
    assert row.segments_S is not None
    assert row.segments_S.tolist() == [0] * 11 + [1] * 9 and row.positions_S.tolist() == [*range(11), *range(9)]
    assert row.labels_S[10] == IGNORED_LABEL and (row.labels_S == IGNORED_LABEL).sum() == 1


def test_worked_examples() -> None:
    tokens = [*range(10, 18), EOS]
    psm, spm = ({"rate": 1.0, "suffix_first_share": share} for share in (0.0, 1.0))
    row = window_of(pack_sample(sample_of(tokens), row_config_of("decoder", "fim", 8, fim=psm)))
    cut = row.index(SUFFIX) - 1
    middle = row[row.index(MIDDLE) + 1 : -1]
    assert row == [PREFIX, *range(10, 10 + cut), SUFFIX, *range(10 + cut + len(middle), 15), MIDDLE, *middle, EOS]
    row = window_of(pack_sample(sample_of(tokens), row_config_of("decoder", "fim", 8, fim=spm)))
    end = row.index(MIDDLE)
    assert row == [PREFIX, SUFFIX, *range(15 - (end - 2), 15), MIDDLE, *range(10, 15 - (end - 2)), EOS]


@given(tokens=windows, number=st.integers(0, 10**9))
@settings(deadline=None, max_examples=50)
def test_what_begins_every_document_stays_in_front(tokens: list[int], number: int) -> None:
    begin = 5
    parts = [[begin, *part] for part in split([token for token in tokens if token != begin])] or [[begin, EOS]]
    window = [token for part in parts for token in part]
    row_config = row_config_of("decoder", "fim", max(1, len(window) - 1), fim={"rate": 1.0})
    moved = window_of(pack_sample(sample_of(window, number), replace(row_config, bos_ids=(begin,))))
    plain = [part[1:] for part in split(moved)]
    assert [part[0] for part in split(moved)] == [begin] * len(parts)
    for part, was in zip(plain, parts, strict=True):
        text, kind, _ = restored(part) if part else (part, "whole", (0, 0))
        end = was[-1:] if was[-1] == EOS else []
        assert text == (was[1:] if kind == "whole" else was[1 : len(was) - len(end) - 3] + end)

"""The kinds' masks: pieces and rules are the definitions, and what is off by one is caught."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from llmtrain.config.attention import AttentionConfig, AttentionKind
from llmtrain.errors import ConfigError
from llmtrain.models.attention.blockwise import Work
from llmtrain.models.attention.patterns import PATTERNS, Extent, drawn_blocks, runs
from llmtrain.models.attention.scoring import Visibility
from tests.unit.models.attention.attention_cases import Case, compared, documents
from tests.unit.models.attention.dense_attention import KINDS, SOFTMAX_KINDS, SPARSE_KINDS, pair_allowed

pytestmark = pytest.mark.usefixtures("small_blocks")

VARIANTS: list[dict[str, Any]] = [
    *(KINDS[kind] for kind in SOFTMAX_KINDS),
    {"kind": "sliding_window", "window": 1},
    {"kind": "sliding_window", "window": 100},
    {"kind": "strided", "stride": 1},
    {"kind": "strided", "stride": 30},
    {"kind": "bigbird", "block_size": 1, "num_global": 0, "num_random": 3},
    {"kind": "bigbird", "block_size": 16, "num_global": 2, "num_random": 0},
    {"kind": "longformer", "window": 1, "num_global": 0},
    {"kind": "longformer", "window": 3, "num_global": 17},
]


def test_every_kind_has_a_pattern_and_a_definition() -> None:
    assert set(get_args(AttentionKind)) == set(PATTERNS) == set(KINDS)


@pytest.mark.parametrize("kind", ["sliding_window", "strided", "longformer"])
def test_a_pattern_without_its_size_is_refused(kind: AttentionKind) -> None:
    with pytest.raises(ConfigError, match=rf"model\.attention\.kind = {kind} needs"):
        PATTERNS[kind](AttentionConfig(kind=kind))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_pieces_and_rules_are_the_definition(variant: dict[str, Any]) -> None:
    """Of whole sequences and of those that begin in a cache; nothing is covered twice."""
    config = AttentionConfig(**variant)
    pattern = PATTERNS[config.kind](config)
    for num_queries, num_keys in ((23, 23), (1, 1), (1, 18), (9, 23), (4, 24)):
        s, t = torch.arange(num_keys - num_queries, num_keys)[:, None], torch.arange(num_keys)
        meant = torch.tensor([[pair_allowed(config, int(i), int(j)) for j in t] for i in s[:, 0]])
        rule = pattern.rule(num_keys, torch.device("cpu"))
        assert rule is None or torch.equal(rule(s, t), meant)
        for looks_ahead in (True, False):
            count = torch.zeros(num_queries, num_keys, dtype=torch.int64)
            for piece in pattern.pieces(Extent(num_queries, num_keys, looks_ahead)):
                queries, keys = s[piece.queries], t[piece.keys]
                assert queries.numel() and keys.numel()
                inside = torch.ones(len(queries), len(keys)) if piece.rule is None else piece.rule(queries, keys)
                count[piece.queries, piece.keys] += inside.long()
            order = torch.ones_like(meant) if looks_ahead else t <= s
            assert torch.equal(count * order, (meant & order).long())


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_pieces_leave_out_what_the_pattern_leaves_out(kind: str) -> None:
    """The area of all pieces grows with the length (of strides: with its power 1.5), not with the square."""
    config = AttentionConfig(**KINDS[kind])

    def area(length: int) -> int:
        pattern = PATTERNS[config.kind](config.with_keys({"stride": int(length**0.5)}))
        pieces = pattern.pieces(Extent(length, length, looks_ahead=True, block=int(length**0.5)))
        return sum(len(range(length)[piece.queries]) * len(range(length)[piece.keys]) for piece in pieces)

    growth = area(2048) / area(512)
    assert growth < 9 if kind != "bigbird" else growth < 5


def test_random_blocks_are_fixed_earlier_distinct_and_not_seen_anyway() -> None:
    assert sorted(drawn_blocks(40, 1, 3)) == sorted(drawn_blocks(40, 1, 3))
    for block in range(60):
        drawn = drawn_blocks(block, 2, 3)
        assert len(drawn) == min(3, max(0, block - 3))
        assert all(2 <= other < block - 1 for other in drawn)
    chosen = [other for block in range(400, 800) for other in drawn_blocks(block, 0, 2)]
    assert 150 < sum(chosen) / len(chosen) < 450
    assert len(set(chosen)) > 350


def test_runs_of_numbers() -> None:
    assert list(runs([])) == []
    assert list(runs({7, 3, 4, 5, 0})) == [(0, 1), (3, 6), (7, 8)]


MUTATED: dict[str, tuple[Case, str, str, Any]] = {
    "a window too long": (Case("sliding_window"), "pattern", "window", 7),
    "a window too short": (Case("sliding_window", causal=False), "pattern", "window", 5),
    "a stride too long": (Case("strided"), "pattern", "stride", 6),
    "a window of longformer too long": (Case("longformer"), "pattern", "window", 5),
    "a global position too many": (Case("longformer"), "pattern", "num_global", 4),
    "a global position too few": (Case("longformer", causal=False), "pattern", "num_global", 2),
    "a global block too many": (Case("bigbird"), "pattern", "num_global", 2),
    "a random block too few": (Case("bigbird", causal=False), "pattern", "num_random", 1),
    "blocks too long": (Case("bigbird"), "pattern", "block_size", 5),
    **{f"{kind} does not see itself": (Case(kind, sinks=True), "order", "", -1) for kind in SOFTMAX_KINDS},
    **{f"{kind} sees the next": (Case(kind, softcap=2.0), "order", "", 1) for kind in SOFTMAX_KINDS},
    "a prefix too long": (Case("full", restriction="prefix"), "prefix", "", 1),
    "a prefix too short": (Case("longformer", restriction="prefix"), "prefix", "", -1),
    "a document too long": (Case("full", restriction="documents"), "documents", "", 1),
    "a document begun too late": (Case("bigbird", restriction="documents"), "documents", "", -1),
    "padding seen": (Case("longformer", False, "padding"), "documents", "", 1),
}


@pytest.mark.parametrize("name", list(MUTATED))
def test_a_mask_off_by_one_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, what, field, value = MUTATED[name]
    config = case.config.attention
    right_order, right_belonging = Visibility.order, Visibility.belonging
    match what:
        case "pattern":
            wrong = PATTERNS[config.kind](config.with_keys({field: value}))
            monkeypatch.setitem(PATTERNS, config.kind, lambda _: wrong)
        case "order":
            monkeypatch.setattr(Visibility, "order", lambda self, s, t: right_order(self, s + value, t))
            # Pieces end behind their last query and a fused kernel has an order of its own.
            monkeypatch.setattr(Visibility, "looks_ahead", True)
            monkeypatch.setattr(Work, "behind", lambda self, piece: False)
            monkeypatch.setattr("llmtrain.models.attention.multi_head.kernel_for", lambda *_: "blockwise")
        case "prefix":
            wrong_prefix = Visibility(prefix_B=torch.tensor([11 + value, max(0, value)]))
            monkeypatch.setattr(Visibility, "order", lambda self, s, t: right_order(wrong_prefix, s, t))
        case "documents":
            rolled = torch.where(documents() < 0, -1, documents() if case.restriction == "documents" else 0).roll(
                value, 1
            )
            other = Visibility(case.causal, documents() if case.restriction == "documents" else None, rolled)
            monkeypatch.setattr(Visibility, "belonging", lambda self, *parts: right_belonging(other, *parts))
    ours, theirs = compared(case)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_the_pictures_in_the_documentation_are_the_masks() -> None:
    page = (Path(__file__).parents[4] / "docs" / "attention.md").read_text("utf-8")
    rows = [line.split() for line in page.splitlines() if re.fullmatch(r"[#. ]+", line) and "#" in line]
    drawn: list[dict[str, Any]] = [
        {"kind": "full"},
        {"kind": "sliding_window", "window": 3},
        {"kind": "strided", "stride": 4},
        {"kind": "longformer", "window": 3, "num_global": 1},
        {"kind": "bigbird", "block_size": 2, "num_global": 1, "num_random": 1},
    ]
    for column, variant in enumerate(drawn):
        config = AttentionConfig(**variant)
        for s, row in enumerate(rows):
            expected = "".join("#" if t <= s and pair_allowed(config, s, t) else "." for t in range(len(rows)))
            assert row[column] == expected

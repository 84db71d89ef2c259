"""Near duplicates: what was planted is found, what is not near stays, and comparing signatures is what does it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.duplicates import near
from data_pipelines.duplicates.near import SignatureFiles, connected, grouped_by_heads
from data_pipelines.duplicates.signatures import NUM_HASHES, band_hashes, ngrams, num_bands, rows_of_band
from tests.support.collections import documents_of, run_quietly, source_texts

RATES = (0.0, 0.003, 0.006, 0.009)
"""Share of the words of a planted copy that are changed: each takes five n-grams away, and brings five others."""


def jaccard(first: str, second: str) -> float:
    one, other = set(ngrams(first, 5)), set(ngrams(second, 5))
    return len(one & other) / len(one | other)


def planted(texts: list[str], rate: float, count: int, seed: int) -> list[tuple[str, str]]:
    """Copies of documents with some words changed, with their originals."""
    draw = random.Random(seed)
    copies = []
    for original in draw.sample([text for text in texts if len(text.split()) > 300], count):
        words = original.split()
        for place in draw.sample(range(len(words)), round(rate * len(words))):
            words[place] = f"word{draw.randrange(10**6)}"
        copies.append((" ".join(words), original))
    return copies


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real documents and planted copies of some, in lines whose ids tell what they are."""
    folder = tmp_path_factory.mktemp("near")
    texts = source_texts(110)
    rows = [{"id": f"original-{number}", "text": text} for number, text in enumerate(texts)]
    for rate in RATES:
        for number, (copy, original) in enumerate(planted(texts, rate, 25, 7)):
            rows.append({"id": f"copy-{rate}-{number}-of-{texts.index(original)}", "text": copy})
    draw = random.Random(8)
    shared = texts[0].split()[:300]
    for number in range(80):  # of each pair 43% of the n-grams are the same: candidates now and then, and not near
        own = [f"own{draw.randrange(10**9)}" for _ in range(200)]
        rows.append({"id": f"family-{number}", "text": " ".join(shared + own)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def kept_of(folder: Path, name: str) -> tuple[set[str], dict[str, str]]:
    """The ids that stay of the collection, and the ids of the removed ones with their heads'."""
    pipeline = folder / f"{name}.yaml"
    config = {
        "name": name,
        "output_dir": str(folder / "out"),
        "read": [{"path": str(folder / "rows.jsonl"), "id": "id"}],
        "steps": [{"near_dedup": {"threshold": 0.8}}],
        "run": {"workers": 1, "keep_work": True},
        "chunk_bytes": 300_000,
    }
    pipeline.write_text(json.dumps(config, indent=1))
    result = run_quietly(pipeline)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    lines = json.loads((result / "plan.json").read_text())["chunks"]
    first = [pieces[0][4] if len(pieces[0]) > 2 else 0 for _, pieces in lines]
    removals = np.fromfile(result / "work" / "clusters-0" / "000000.removed", np.uint64).reshape(-1, 2).tolist()
    names = [[rows[first[place >> 32] + (place & 0xFFFFFFFF)]["id"] for place in pair] for pair in removals]
    return {document["id"] for document in documents_of(result)}, dict(names)


def test_planted_copies_are_found_and_every_removal_is_near_its_head(collection: Path) -> None:
    kept, removed = kept_of(collection, "whole")
    texts = {row["id"]: row["text"] for row in map(json.loads, (collection / "rows.jsonl").read_text().splitlines())}
    pairs = [(name, f"original-{name.rpartition('-')[2]}") for name in texts if name.startswith("copy-")]
    near_ones = [copy for copy, original in pairs if jaccard(texts[copy], texts[original]) >= 0.9]
    assert len(near_ones) > 75 and [copy for copy in near_ones if copy in kept] == []
    # The first of each cluster stays, and what goes is near it.
    assert kept.isdisjoint(removed) and kept | set(removed) == set(texts)
    order = list(texts)
    for gone, head in removed.items():
        assert head in kept and order.index(head) < order.index(gone)
        assert jaccard(texts[gone], texts[head]) > 0.65, (gone, head)  # four deviations below the threshold


def test_without_comparing_signatures_much_that_is_not_near_goes(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the comparison is for: candidates alone take away documents that only share a paragraph."""
    _, right = kept_of(collection, "right")
    monkeypatch.setattr(SignatureFiles, "near", lambda self, first, second: np.ones(len(first), bool))
    monkeypatch.setattr(near, "num_bands", num_bands)
    _, wrong = kept_of(collection, "wrong")
    texts = {row["id"]: row["text"] for row in map(json.loads, (collection / "rows.jsonl").read_text().splitlines())}
    far = [gone for gone, head in wrong.items() if jaccard(texts[gone], texts[head]) < 0.5]
    assert len(wrong) > len(right) and far


def test_a_chain_is_cut_where_it_leads_away_from_its_head() -> None:
    """1 is near 2, 2 near 3, 3 near 4, and nothing else: 1 takes 2 along, and 3 takes 4."""
    close = {(1, 2), (2, 3), (3, 4)}

    class Files:
        def near(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.array([(int(a), int(b)) in close for a, b in zip(first, second, strict=True)], bool)

    ids = np.array([1, 2, 3, 4], np.uint64)
    removed, heads, left = grouped_by_heads(np.zeros(4), ids, Files(), None)  # pyright: ignore[reportArgumentType]
    assert sorted(zip(removed.tolist(), heads.tolist(), strict=True)) == [(2, 1), (4, 3)] and left == 0
    removed, heads, left = grouped_by_heads(np.zeros(4), ids, Files(), 1)  # pyright: ignore[reportArgumentType]
    assert removed.tolist() == [2] and left == 2


def test_a_copy_goes_with_its_original_that_goes_for_a_third_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is near the first, and the third near the second: at 0.83 each, which leaves 0.7 of the first."""
    words = [f"word{number}" for number in range(2000)]
    second = [f"{word}x" if number % 55 == 0 else word for number, word in enumerate(words)]
    third = [f"{word}y" if number % 55 == 27 else word for number, word in enumerate(second)]
    texts = [" ".join(text) for text in (words, second, third)]
    assert jaccard(texts[0], texts[1]) > 0.82 and jaccard(texts[1], texts[2]) > 0.82
    assert 0.65 < jaccard(texts[0], texts[2]) < 0.72
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert kept_of(tmp_path, "together") == ({"0"}, {"1": "0", "2": "0"})
    monkeypatch.setattr(near, "CHAIN", 0.0)
    assert kept_of(tmp_path, "alone") == ({"0", "2"}, {"1": "0"})


@pytest.mark.parametrize("seed", range(20))
def test_components_are_those_of_a_walk(seed: int) -> None:
    draw = np.random.default_rng(seed)
    number = int(draw.integers(1, 60))
    edges = draw.integers(0, number, (int(draw.integers(0, 60)), 2))
    labels = np.arange(number)
    for _ in range(number):  # the plainest way: the smaller label goes over every edge, until nothing changes
        for first, second in edges:
            labels[first] = labels[second] = min(labels[first], labels[second])
    assert connected(number, edges).tolist() == labels.tolist()


def test_bands_find_pairs_at_the_threshold_and_few_below() -> None:
    assert (rows_of_band(0.8), num_bands(0.8)) == (8, 16)
    draw = np.random.default_rng(1)
    signatures = draw.integers(0, 2**32, (2000, NUM_HASHES), np.uint32)

    def found(similarity: float) -> float:
        others = np.where(draw.random(signatures.shape) < similarity, signatures, signatures ^ np.uint32(1))
        return float((band_hashes(signatures, 0.8) == band_hashes(others, 0.8)).any(0).mean())

    assert found(0.9) > 0.999 and 0.93 < found(0.8) < 0.97 and found(0.4) < 0.03
    hashes = band_hashes(signatures, 0.8)
    assert len(np.unique(hashes)) == hashes.size

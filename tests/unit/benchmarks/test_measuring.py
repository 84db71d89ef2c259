import pytest
import torch

from tests.benchmarks.measuring import Row, Table, measure, one_core, readable


def test_contenders_take_turns_and_the_first_round_is_not_recorded() -> None:
    turns: list[str] = []

    def turn(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    rows = measure({"a": lambda: turn("a"), "b": lambda: turn("b")}, rounds=2)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert rows == (Row("a", (3.0, 5.0)), Row("b", (4.0, 6.0)))


@pytest.mark.parametrize(("better", "expected"), [("higher", (2.0, 0.5)), ("lower", (0.5, 2.0))])
def test_ratios_are_taken_within_a_round(better: str, expected: tuple[float, ...]) -> None:
    """The machine is ten times slower in the second round, which no ratio shows."""
    ours, peer = Row("ours", (200.0, 10.0)), Row("peer", (100.0, 20.0))
    table = Table("t", "u", better, "ours", (ours, peer))  # type: ignore[arg-type]  # parametrize hands on plain strings
    assert table.advantage(peer) == expected
    assert table.advantage(ours) == (1.0, 1.0)


def test_a_table_shows_each_row_with_its_figures_and_notes() -> None:
    rows = (Row("ours", (3.0, 1.0, 2.0)), Row("a longer name", (1.0, 1.0, 1.0)))
    title, header, ours, peer, note = Table("t", "MB/s", "higher", "ours", rows, ("said",)).to_text().splitlines()
    assert title == "t - higher is better"
    assert "MB/s (median)" in header
    assert ours.split() == ["ours", "2.000", "1.000", "3.000"]
    assert peer.split() == ["a", "longer", "name", "1.000", "1.000", "1.000", "2.00", "(1.00-3.00)"]
    assert note == "  note: said"


def test_a_table_without_ours_compares_nothing() -> None:
    table = Table("t", "us", "lower", None, (Row("a", (-1.0, 1.0)),))
    assert table.to_json()["rows"][0]["advantage"] is None
    assert "times as good" not in table.to_text()


def test_differences_are_taken_within_a_round() -> None:
    assert Row("a", (5.0, 50.0)).minus(Row("b", (1.0, 45.0)), "a - b") == Row("a - b", (4.0, 5.0))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.012"), (12.345, "12.35"), (123.45, "123.5"), (1234567.8, "1,234,568"), (-12.3, "-12.30")],
)
def test_figures_have_as_many_digits_as_matter(value: float, text: str) -> None:
    assert readable(value) == text


def test_one_core_gives_back_what_it_took() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_core():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == threads

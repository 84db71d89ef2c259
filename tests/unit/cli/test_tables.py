"""Tables: rows at once, drawn on a terminal, tabs elsewhere; parity and drill print theirs through them."""

import sys
from io import StringIO
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmtrain.cli.tables import GrowingTable, aligned

RUN = Path(__file__).parents[3] / "configs" / "runs" / "quickstart.yaml"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_columns_stand_under_each_other_however_long() -> None:
    long = "x" * 300
    assert aligned(["a", "b"], [["1", "[red]2"], [long, "3"]]).splitlines() == [
        f"a{' ' * 301}b",
        f"1{' ' * 301}[red]2",
        f"{long}  3",
    ]


def test_a_row_is_there_before_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    with GrowingTable(["a", "b"]) as table:
        assert capsys.readouterr().out == "a\tb\n"
        table.add(["1", "[red]2"])
        assert capsys.readouterr().out == "1\t[red]2\n"


def test_a_terminal_shows_each_row_at_once_and_what_is_printed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with GrowingTable(["name", "result"]) as table:
        table.add(["first", "[red]equal"])
        assert "first" in screen.getvalue() and "[red]equal" in screen.getvalue()
        print("a remark")
        table.add(["second", "other"])
    shown = screen.getvalue()
    assert shown.index("a remark") < shown.index("second")
    assert sys.stdout is screen, "what was redirected is given back"


def test_a_table_that_is_interrupted_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(KeyboardInterrupt), GrowingTable(["name"]):
        raise KeyboardInterrupt
    assert sys.stdout is screen


def test_parity_prints_a_row_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.checks.parity import compare
    from llmtrain.cli.app import app

    good = compare.Comparison("torch:dp2", 2, 1.25, compare.Verdict(loss=1e-7))
    bad = compare.Comparison("megatron:tp2", 2, 3.0, compare.Verdict(problems=["loss of step 1: 2", "gradient of x"]))
    monkeypatch.setattr(compare, "compare_layouts", lambda *_: iter([good, bad]))
    done = CliRunner().invoke(app, ["parity", str(RUN), "--layouts", "torch:dp2,megatron:tp2"])
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "layout\tranks\tloss 1\tloss\tnorm\tgradient\tweights\tseconds\tnumbers",
        "torch:dp2\t2\t0e+00\t1e-07\t0e+00\t0e+00\t0e+00\t1.2\tequal",
        "megatron:tp2\t2\t0e+00\t0e+00\t0e+00\t0e+00\t0e+00\t3.0\tDIFFERENT: loss of step 1: 2; gradient of x",
    ]

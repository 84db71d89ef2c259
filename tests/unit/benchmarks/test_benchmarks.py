"""Each benchmark runs at its small size and yields figures that make sense. No time is asserted."""

import json
import math
from importlib import import_module

import pytest

from tests.benchmarks.__main__ import BENCHMARKS, main
from tests.benchmarks.measuring import Options, Table

QUICK = Options(rounds=1, quick=True)
WHOLE_RUNS = ("command", "launch", "recovery", "cluster", "engines", "graphs", "packed")
"""Those that start runs, peers and ranks as a user does, and that compile: each for seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.whole_grid] if name in WHOLE_RUNS else []) for name in BENCHMARKS]
)
def test_every_benchmark_yields_figures_beside_peers(name: str) -> None:
    tables: list[Table] = import_module(f"tests.benchmarks.{name}").benchmark(QUICK)
    assert tables
    for table in tables:
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names) > 1
        assert all(len(row.values) == QUICK.rounds and all(map(math.isfinite, row.values)) for row in table.rows)
        if table.ours is not None:  # differences may be negative
            assert table.ours in names
            assert all(value > 0 for row in table.rows for value in row.values)
        for row in table.rows:
            assert row.name in table.to_text()


def test_one_can_be_chosen_and_read_by_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sharding", "--quick", "--rounds", "1", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["quick"] is True
    assert {"date", "processor", "versions", "threads"} <= printed["machine"].keys()
    assert printed["benchmark"] == "sharding"
    (table,) = printed["tables"]
    assert [row["name"] for row in table["rows"]] == ["llmtrain: text to shards", "sentencepiece alone"]


def test_an_unknown_name_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["steps"])
    assert "no benchmark named steps; there are step, engines, overhead" in capsys.readouterr().err

import json
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.cli.watching import report
from llmtrain.config.parameters import num_active_parameters, num_parameters
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.errors import ConfigError
from llmtrain.report.page import chart_data, render, script_json, write_report
from llmtrain.report.results import MOST_EVENTS, sentence, summary
from llmtrain.report.run_record import flat, load_run, smoothed, thinned
from llmtrain.runs.audit import record
from llmtrain.runs.metrics_file import JsonlTracker
from tests.unit.config.small_run import run as small_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def make_run(folder: Path, steps: int = 40, name: str = "tiny", lr: float = 3e-4) -> Path:
    tracker = JsonlTracker(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        rate = 100.0 if step % 2 else 50.0
        row = {
            "step": step,
            "loss": 5.0 / step,
            "lr": lr,
            "grad_norm": 1.0,
            "tokens": 100 * step,
            "step_seconds": 100 / rate,
            "skipped": int(step == 7),
        }
        tracker.log({**row, "tokens_per_second": rate, "memory_bytes": 2**30})
        if step % 10 == 0:
            tracker.log(
                {"step": step, "valid_loss": 6.0 / step + (step == 40), "valid_perplexity": 1.0, "valid_seconds": 1.0}
            )
    tracker.close("done")
    quoted = json.dumps(name)
    (folder / "config.yaml").write_text(f"name: {quoted}\noptim:\n  lr: {lr}\ntrain:\n  steps: {steps}\n")
    (folder / "status.json").write_text(json.dumps({"status": "done", "step": steps, "message": "all steps done"}))
    checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json.sha256").write_text("0")
    return folder


class Elements(HTMLParser):
    """Collects elements with attributes, script bodies, and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def test_the_page_tells_the_run(tmp_path: Path):
    run = make_run(tmp_path / "run")
    out = tmp_path / "page" / "report.html"
    write_report([run], out)
    page = Elements(out.read_text())
    for part in ("tiny", "done", "all steps done", "step-00000040", "lr", "Skipped steps"):
        assert part in page.text
    cells = {label: (value, note) for label, value, note in summary(load_run(run))}
    assert cells["Training loss"][0] == "0.1250"
    assert cells["Validation loss"][0] == "1.1500"
    assert cells["Best validation"] == ("0.2000", "at step 30")
    assert cells["Steps"] == ("40", "of 40")
    assert cells["Training time"][0] == "0:01:00", "20 steps of 1 s and 20 of 2 s"
    assert cells["Tokens per second"][0] == "66.7"
    assert cells["Skipped steps"][0] == "1"
    assert cells["Peak memory"][0] == "1.00 GiB"
    curves = chart_data([load_run(run)])["runs"][0]["curves"]
    assert curves["loss"] == [list(range(1, 41)), [5.0 / step for step in range(1, 41)]]
    assert curves["valid_loss"][0] == [10, 20, 30, 40]


def test_curves_can_be_drawn_over_tokens_and_time(tmp_path: Path):
    """Steps take 1 s and 2 s in turn, and predict 100 tokens each."""
    run = make_run(tmp_path / "run")
    places = chart_data([load_run(run)])["runs"][0]["places"]
    assert places["steps"] == list(range(1, 41))
    assert places["tokens"] == [100.0 * step for step in range(1, 41)]
    assert places["seconds"][:4] == [1.0, 3.0, 4.0, 6.0] and places["seconds"][-1] == 60.0
    page = Elements(render([load_run(run)]))
    assert ("div", "axes") in [(tag, attributes.get("id")) for tag, attributes in page.tags]
    for name in (
        "nats per target",
        "L2 norm before clipping",
        "tokens per second",
        "tokens predicted",
        "time in steps",
    ):
        assert name in page.scripts[-1], f"an axis is named: {name}"


def test_time_is_that_of_steps_where_few_tokens_are_targets(tmp_path: Path):
    """Of 100 tokens that are read, 15 are predicted: the speed counts the former, and time follows neither."""
    run = tmp_path / "run"
    tracker = JsonlTracker(run / "metrics.jsonl")
    for step in (10, 20):
        tracker.log({"step": step, "loss": 1.0, "tokens": 15 * step, "tokens_per_second": 50.0, "step_seconds": 2.0})
    tracker.close("done")
    cells = {label: value for label, value, _ in summary(load_run(run))}
    assert (cells["Training time"], cells["Tokens per second"]) == ("0:00:40", "50")


def test_the_page_tells_what_was_trained(tmp_path: Path):
    """Parameters, and sizes that the file left out."""
    run = make_run(tmp_path / "run")
    assert "Model and sizes" not in Elements(render([load_run(run)])).text, "nothing is known of this model"
    config = small_run(
        model={"num_layers": 2, "num_kv_heads": 2, "vocab_size": 300, "moe": {"num_experts": 4, "top_k": 1}},
        parallel={"tensor": 2, "pipeline": 2, "pipeline_schedule": "zero_bubble"},
        engine={"name": "megatron", "zero_stage": 1},
        launch={"num_workers": 8},
    )
    (run / "config.yaml").write_text(to_yaml(config))
    text = " ".join(Elements(render([load_run(run)])).text.split())
    whole, active = num_parameters(config.model), num_active_parameters(config.model)
    assert active < whole
    for part in (
        f"{whole:,}, of which a token meets {active:,}",
        "decoder, 2 layers of width 64",
        "4 of size 16, 2 for keys and values",
        f"width {config.model.ffn_size}, swiglu",
        "8 samples of 64 tokens = 512 tokens a step",
        "8 ranks, engine megatron, data 2, tensor 2, pipeline 2, zero-bubble schedule, ZeRO stage 1",
    ):
        assert part in text


def test_the_page_needs_nothing_from_outside(tmp_path: Path):
    run = make_run(tmp_path / "run")
    page = render([load_run(run)])
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert "src" not in attributes, tag
        assert tag != "link" or attributes["href"] == "data:,"
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)


def test_hostile_names_and_values_stay_text(tmp_path: Path):
    run = make_run(tmp_path / "run", name=HOSTILE)
    (run / "status.json").write_text(json.dumps({"status": HOSTILE, "message": HOSTILE}))
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "devices": [{"name": HOSTILE}]}))
    (run / "checkpoints" / "step-00000040" / "manifest.json").write_text(HOSTILE)
    other = make_run(tmp_path / "other")
    for records in ([load_run(run)], [load_run(run), load_run(other)]):
        page = Elements(render(records))
        assert [tag for tag, _ in page.tags].count("script") == 2
        assert "img" not in [tag for tag, _ in page.tags]
        assert HOSTILE in page.text
        assert json.loads(page.scripts[0])["runs"][0]["name"] == HOSTILE
        policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
        assert "script-src 'sha256-" in policy


@given(text=st.text())
def test_inlined_data_cannot_end_its_element(text: str):
    written = script_json({"name": text})
    assert "<" not in written
    assert json.loads(written) == {"name": text}


def test_two_runs_are_laid_side_by_side_with_what_differs(tmp_path: Path):
    first, second = make_run(tmp_path / "a", lr=1e-4), make_run(tmp_path / "b", lr=2e-4)
    out = tmp_path / "comparison.html"
    write_report([first, second], out)
    page = Elements(out.read_text())
    assert "optim.lr" in page.text
    assert "train.steps" not in page.text
    whole = {attributes.get("title") for tag, attributes in page.tags if tag == "td"}
    assert {"0.0001", "0.0002"} <= whole, "what a narrow column cuts can be read"
    names = [run["name"] for run in json.loads(page.scripts[0])["runs"]]
    assert names == [str(first), str(second)], "equal names are told apart by their folders"


def test_metrics_of_labels_are_totals_and_curves(tmp_path: Path):
    tokens, labels = make_run(tmp_path / "tokens"), make_run(tmp_path / "labels")
    tracker = JsonlTracker(labels / "metrics.jsonl")
    tracker.log({"step": 40, "valid_loss": 0.5, "valid_accuracy": 0.75, "valid_macro_f1": 0.5, "valid_seconds": 1.0})
    tracker.close("done")
    totals = {label: (value, note) for label, value, note in summary(load_run(labels))}
    assert (totals["Accuracy"], totals["Macro F1"]) == (("75.00%", "validation"), ("50.00%", "validation"))
    assert totals["Validation loss"] == ("0.5000", "per label")
    page = Elements(render([load_run(tokens), load_run(labels)]))
    assert "Accuracy" in page.text and "Entity F1" not in page.text
    curves = [run["curves"]["valid_accuracy"] for run in chart_data([load_run(tokens), load_run(labels)])["runs"]]
    assert curves == [[[], []], [[40], [0.75]]]


def test_a_resumed_run_with_values_that_are_not_finite(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=40)
    tracker = JsonlTracker(run / "metrics.jsonl", resume_step=20)
    tracker.log({"step": 21, "loss": math.nan, "grad_norm": math.inf, "tokens": 2100, "tokens_per_second": 100.0})
    tracker.close("failed")
    record = load_run(run)
    data = chart_data([record])["runs"][0]
    assert data["resumes"] == [20]
    assert data["curves"]["loss"][0][-1] == 21
    assert data["curves"]["loss"][1][-1] is None
    assert {label: note for label, _, note in summary(record)}["Restarts"] == "from step 20"
    render([record])


def add_history(run: Path, cause: str = "ValueError: no") -> None:
    """Events and times: 40 steps of a second each, of which 5 were done twice after a restart that took 10 seconds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    begun = 1_700_000_000.0
    first = [{**row, "time": begun + row["step"], "step_seconds": 1.0} for row in rows if row["step"] <= 25]
    rest = [{**row, "time": begun + 15 + row["step"], "step_seconds": 1.0} for row in rows if row["step"] > 20]
    rest[0]["resumed_from"] = 20
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*first, *rest]))
    events = [
        (0, {"event": "started", "step": 0, "workers": 4}),
        (26, {"event": "restarting", "rank": 3, "host": "n1", "cause": cause, "step": 25, "saved_step": 20}),
        (35, {"event": "resized", "from_workers": 4, "to_workers": 2, "step": 20}),
        (35, {"event": "started", "step": 20, "workers": 2}),
        (40, {"event": "something_new", "fact": 7}),
    ]
    with (run / "audit.jsonl").open("w") as file:
        for seconds, event in events:
            moment = datetime.fromtimestamp(begun + seconds, UTC).isoformat(timespec="milliseconds")
            file.write(json.dumps({"time": moment, **event}) + "\n")


def test_the_page_tells_how_much_of_the_data_is_used(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert "Tokens in no sample" not in render([load_run(run)])
    source = {"split": "train", "path": f"data/{HOSTILE}", "weight": 1, "epochs": 5.333}
    data = [{**source, "tokens": 1010, "samples": 15.0, "unused_tokens": 49}]
    record(run, "started", step=0, workers=1, data=data)
    page = Elements(render([load_run(run)]))
    assert f"data/{HOSTILE}train1,0101549 (4.9%)none5.33" in page.text
    assert "img" not in [tag for tag, _ in page.tags]


def test_the_page_tells_what_happened_and_where_the_time_went(tmp_path: Path):
    run = make_run(tmp_path / "run")
    add_history(run, cause=HOSTILE)
    record = load_run(run)
    cells = {label: (value, note) for label, value, note in summary(record)}
    assert cells["Effective time"] == ("72.7%", "of 0:00:55")
    assert cells["Restarts"] == ("1", "from step 20")
    assert cells["Lost steps"] == ("5", "done, and left behind")
    assert cells["Changes of size"][0] == "1"
    page = Elements(render([record]))
    assert "Slow ranks" not in page.text, "there were none"
    for part in (
        "started on 4 ranks, after step 0",
        f"rank 3 on n1, at step 25: {HOSTILE}. Started again after step 20",
        "from 4 ranks to 2, after step 20",
        "fact 7",
        "2023-11-14 22:13:46+0:00:26",
        "steps that count 72.7%0:00:40",
        "lost steps 9.1%5.0 s",
    ):
        assert part in page.text, part
    assert "img" not in [tag for tag, _ in page.tags]
    other = make_run(tmp_path / "other")
    compared = Elements(render([record, load_run(other)])).text
    assert "72.7%–" in compared.replace("\n", ""), "a run without times has no share"
    assert "5 events" in compared


def test_settings_are_shown_as_they_are_written():
    tree = {"data": {"train": [{"path": "a b", "weight": 1}], "valid": []}, "optim": {"betas": [0.9, 0.95]}, "x": None}
    assert flat({**tree, "on": True}) == {
        "data.train.0.path": "a b",
        "data.train.0.weight": "1",
        "data.valid": "[]",
        "optim.betas": "[0.9, 0.95]",
        "x": "null",
        "on": "true",
    }


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"workers": 1, "step": 0}, "started on 1 rank, after step 0"),
        ({"workers": 1024, "step": 7}, "started on 1,024 ranks, after step 7"),
        ({"step": 7}, "step 7"),
        ({"workers": "many", "step": 7}, "workers many, step 7"),
    ],
)
def test_a_start_in_words(facts: dict, said: str):
    assert sentence({"time": "-", "event": "started", **facts}) == said


def test_the_last_events_are_shown(tmp_path: Path):
    run = make_run(tmp_path / "run")
    event = {"time": "2026-01-01T00:00:00.000+00:00", "event": "save_failed", "error": "full"}
    lines = [json.dumps({**event, "step": step}) for step in range(MOST_EVENTS + 7)]
    (run / "audit.jsonl").write_text("\n".join(lines) + "\n")
    text = Elements(render([load_run(run)])).text
    assert "7 earlier events are in audit.jsonl" in text
    assert "checkpoint of step 6: full" not in text
    assert "checkpoint of step 7: full" in text and f"checkpoint of step {MOST_EVENTS + 6}: full" in text


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    page = Elements(render([load_run(tmp_path)]))
    assert "Training loss–" in page.text
    assert json.loads(page.scripts[0])["runs"][0]["curves"]["loss"] == [[], []]


def test_long_curves_are_thinned_and_keep_their_spikes():
    steps = list(range(1, 100_001))
    values = [1.0 + 0.001 * math.sin(step) for step in steps]
    values[54_321], values[77_777] = 9.0, math.nan
    thin_steps, thin_values = thinned((steps, values))
    assert len(thin_steps) <= 2000
    assert thin_steps == sorted(set(thin_steps))
    assert (thin_steps[0], thin_steps[-1]) == (1, 100_000)
    assert 9.0 in thin_values
    assert any(math.isnan(value) for value in thin_values)
    assert thinned((steps[:2000], values[:2000])) == (steps[:2000], values[:2000])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.sets(st.integers(0, 299)))
def test_a_smoothed_curve_lies_between_the_extremes(values: list[float], holes: set[int]):
    known = [value for index, value in enumerate(values) if index not in holes]
    result = smoothed([math.nan if index in holes else value for index, value in enumerate(values)])
    assert len(result) == len(values)
    for value in result:
        assert math.isnan(value) or min(known) - 1e-6 <= value <= max(known) + 1e-6


def test_the_command_writes_into_the_run_folder_and_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make_run(tmp_path / "run")
    report([run])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_path_that_is_no_run_folder_is_refused_with_what_to_do(tmp_path: Path, make):
    path = tmp_path / "nothing"
    make(path)
    with pytest.raises(ConfigError, match=r"not a run folder.*llmtrain train") as caught:
        report([path])
    assert caught.value.exit_code == 2
    assert not (path / "report.html").exists()

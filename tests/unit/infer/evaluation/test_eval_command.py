"""`llmtrain eval` on a folder: a table, JSON, samples in a file from which it goes on, and what is refused."""

import json
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.files import open_to_go_on
from llmtrain.infer.evaluation import run
from tests.support.evaluated_run import write_lines
from tests.support.hf_folders import write_bert, write_gpt2, write_t5

TASKS = """tasks:
  - {name: pick, kind: choices, data: DATA, prompt: 'Q: {q}', choices: ['{c}'], answer: '{a}'}
  - {name: gap, kind: cloze, data: DATA, prompt: 'Q: {q}', answer: '{c.0}'}
  - {name: say, kind: qa, data: DATA, prompt: 'Q: {q}', answer: '{c}', max_tokens: 6}
"""
PERPLEXITY = "  - {name: text, kind: perplexity, data: DATA, prompt: '{q}', max_length: 8}\n"
ROWS = [{"q": f"the fox {number} jumps", "c": ["over it", "a dog"], "a": number % 2} for number in range(5)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for write in (write_gpt2, write_t5, write_bert):
        write(folder / write.__name__.removeprefix("write_"))
    data = write_lines(folder / "data.jsonl", ROWS)
    (folder / "tasks.yaml").write_text(TASKS.replace("DATA", str(data)), "utf-8")
    (folder / "more.yaml").write_text(f"tasks:\n{PERPLEXITY.replace('DATA', str(data))}", "utf-8")
    return folder


def evaluated(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, arguments), "--device", "cpu"])
    return int(ended.value.code or 0)


def test_an_evaluation_answers_on_stdout_and_goes_on_from_its_file(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out, tasks = tmp_path / "out.jsonl", [folders / "tasks.yaml", folders / "more.yaml"]
    assert evaluated(folders / "gpt2", "--tasks", *tasks, "--json", "--out", out) == 0
    first = json.loads(capsys.readouterr().out)["tasks"]
    assert {name: said["samples"] for name, said in first.items()} == {"pick": 5, "gap": 5, "say": 5, "text": 5}
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 20
    # Killed in the middle of a line: what is whole is kept, and the rest is found again.
    out.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    assert evaluated(folders / "gpt2", "--tasks", *tasks, "--json", "--out", out) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == first
    assert out.read_bytes().splitlines(keepends=True) == lines

    monkeypatch.setattr(run, "_score", None)  # nothing is computed again
    monkeypatch.setattr(run, "_answer", None)
    assert evaluated(folders / "gpt2", "--tasks", *tasks, "--limit", "3", "--out", out) == 0
    table = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["task", "samples", "metric", "value", "standard error"]
    assert table[1][:3] == ["pick", "3", "accuracy"]


def test_a_file_of_another_model_or_of_something_else_is_left_alone(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.jsonl"
    assert evaluated(folders / "gpt2", "--tasks", folders / "tasks.yaml", "--limit", "1", "--out", out) == 0
    before = out.read_bytes()
    assert evaluated(folders / "t5", "--tasks", folders / "tasks.yaml", "--out", out) == 2
    assert f"--out {out}:1: holds samples of the task pick with another model" in capsys.readouterr().err
    assert out.read_bytes() == before
    out.write_text('{"no": "row"}\n', "utf-8")
    assert evaluated(folders / "gpt2", "--tasks", folders / "tasks.yaml", "--out", out) == 2
    assert f"{out}:1: is no line of an evaluation" in capsys.readouterr().err
    assert out.read_text("utf-8") == '{"no": "row"}\n'


def test_a_file_has_one_writer_and_its_folder_is_made(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "out.jsonl"
    asked = (folders / "gpt2", "--tasks", folders / "tasks.yaml", "--limit", "1", "--out", out)
    assert evaluated(*asked) == 0
    with open_to_go_on(out):
        assert evaluated(*asked) == 2
    assert f"--out {out}: cannot be written: another process is writing it" in capsys.readouterr().err


def test_an_encoder_decoder_reads_prompts_and_says_how_likely_answers_are(
    folders: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluated(folders / "t5", "--tasks", folders / "tasks.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["pick"]["samples"] == 5
    assert evaluated(folders / "t5", "--tasks", folders / "more.yaml") == 2
    assert "tasks text: kind = perplexity has no prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        ("bert", ["--tasks", "tasks.yaml"], "model.family = encoder"),
        ("gpt2", [], "--tasks: is required"),
        ("gpt2", ["--tasks", "none.yaml"], "none.yaml: no such file"),
        ("gpt2", ["--tasks", "tasks.yaml", "--include-path", "x"], "goes with names of lm-eval's tasks"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    folders: Path, capsys: pytest.CaptureFixture[str], model: str, arguments: list[str], expected: str
):
    named = [str(folders / name) if name.endswith(".yaml") else name for name in arguments]
    assert evaluated(folders / model, *named) == 2
    assert expected in capsys.readouterr().err


def test_faulty_samples_of_all_tasks_are_told_at_once(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = write_lines(tmp_path / "wrong.jsonl", [{"q": "a"}])
    for name in ("pick", "gap"):
        (tmp_path / f"{name}.yaml").write_text(
            f"tasks:\n  - {{name: {name}, kind: cloze, data: {wrong}, prompt: '{{q}}', answer: '{{c}}'}}\n", "utf-8"
        )
    assert evaluated(folders / "gpt2", "--tasks", tmp_path / "pick.yaml", tmp_path / "gap.yaml") == 3
    told = capsys.readouterr().err
    assert f"{wrong}:1: " in told and "(task pick)" in told and "(task gap)" in told


def test_told_to_stop_it_says_how_to_go_on(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_answer", stopped)
    assert evaluated(folders / "gpt2", "--tasks", folders / "tasks.yaml", "--out", tmp_path / "out.jsonl") == 143
    assert f"what was measured is in {tmp_path}/out.jsonl: the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "expected"), [("max_length: 65", "more than the 64 positions"), ("max_tokens: 64", "leaves no room")]
)
def test_lengths_beyond_the_model_are_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str, expected: str
):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text((folders / "tasks.yaml").read_text("utf-8").replace("max_tokens: 6", changed), "utf-8")
    assert evaluated(folders / "gpt2", "--tasks", tasks) == 2
    assert expected in capsys.readouterr().err

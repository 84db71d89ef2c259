"""`llmtrain generate --prompts`: answers in order, as one at a time, gone on with where the writing stopped."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmtrain.cli.app import app
from llmtrain.infer.batching.batch import ContinuousBatch
from tests.support.hf_folders import write_bert, write_llama


def _call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_llama(place / "hf")
    assert _call("import", place / "hf", place / "run").exit_code == 0
    return place / "run"


LINES = [
    {"prompt": "the fox", "id": number, "max_tokens": 3 + number % 7, "seed": number % 2} for number in range(24)
] + [{"prompt": "the lazy dog", "temperature": 0, "stop": " "}, {"prompt": "the", "top_k": 1, "note": "中"}]


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def generated(run: Path, prompts: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    result = _call("generate", run, "--prompts", prompts, "--out", out, *more)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "" and f"wrote {out}: {len(LINES)} answers" in result.stderr
    return answers(out)


def test_answers_come_in_order_and_are_those_of_one_at_a_time(run: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path / "prompts.jsonl", LINES)
    together = generated(run, prompts, tmp_path / "eight.jsonl", "--slots", "8", "--max-tokens", "9")
    assert together == generated(run, prompts, tmp_path / "one.jsonl", "--slots", "1", "--max-tokens", "9")
    assert together == generated(run, prompts, tmp_path / "exact.jsonl", "--exact", "--max-tokens", "9")
    for line, answer in zip(LINES, together, strict=True):
        assert line.items() <= answer.items()
        assert answer["ending"] in ("stop", "length") and answer["new_tokens"] <= answer.get("max_tokens", 9)
    texts = [answer["text"] for answer in together if answer.get("seed") == 0 and answer["new_tokens"] > 2]
    assert len(set(texts)) > 3, "equal prompts of one seed have answers of their own"
    alone = _call("generate", run, "--prompt", "the lazy dog", "--temperature", "0", "--stop", " ", "--max-tokens", "9")
    assert alone.stdout == f"{together[24]['text']}\n" and " " not in together[24]["text"]


def test_what_was_written_is_gone_on_with(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = written(tmp_path / "prompts.jsonl", LINES)
    expected = generated(run, prompts, tmp_path / "whole.jsonl")
    out, unfinished = tmp_path / "out.jsonl", tmp_path / "out.jsonl.unfinished"
    steps, step = [], ContinuousBatch.step

    def interrupted(self: ContinuousBatch) -> Any:
        steps.append(1)
        if len(steps) > 14:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(ContinuousBatch, "step", interrupted)
        stopped = _call("generate", run, "--prompts", prompts, "--out", out)
    assert stopped.exit_code == 143 and not out.exists()
    before = unfinished.read_bytes()
    count = before.count(b"\n") - 1
    assert f"{count} of {len(LINES)} answers are in {unfinished}: the same command goes on" in stopped.stderr
    assert 0 < count < len(LINES)
    unfinished.write_bytes(before + b'{"prompt": "the f')  # a crash amid a line
    changed = _call("generate", run, "--prompts", prompts, "--out", out, "--temperature", "0.5")
    assert changed.exit_code == 2 and "answers of other temperature" in changed.stderr
    result = _call("generate", run, "--prompts", prompts, "--out", out)
    assert f"{count} answer" in result.stderr and f"of {len(LINES)} are there already" in result.stderr
    assert answers(out) == expected and not unfinished.exists()
    assert _call("generate", run, "--prompts", prompts, "--out", out).exit_code == 2, "it exists"
    assert _call("generate", run, "--prompts", prompts, "--out", out, "--overwrite").exit_code == 0
    assert answers(out) == expected


def test_a_file_has_one_writer(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, out = written(tmp_path / "prompts.jsonl", LINES), tmp_path / "out.jsonl"
    others, step = list[Any](), ContinuousBatch.step

    def with_another(self: ContinuousBatch) -> Any:
        if not others:
            others.append(_call("generate", run, "--prompts", prompts, "--out", out))
        return step(self)

    monkeypatch.setattr(ContinuousBatch, "step", with_another)
    assert len({answer["id"] for answer in generated(run, prompts, out) if "id" in answer}) == 24
    assert others[0].exit_code == 2 and "another process is writing it" in others[0].stderr


def test_answers_only_replace_a_file(run: Path, tmp_path: Path) -> None:
    prompts, link = written(tmp_path / "prompts.jsonl", LINES), tmp_path / "link"
    os.mkfifo(tmp_path / "pipe")
    link.symlink_to("target.jsonl")
    for out, told in (
        (tmp_path / "pipe", "it is no regular file"),
        (prompts, "is the file of prompts"),
        (Path("/proc/answers.jsonl"), "cannot be written"),
    ):
        result = _call("generate", run, "--prompts", prompts, "--out", out, "--overwrite")
        assert result.exit_code == 2 and told in result.stderr, result.stderr
    assert prompts.read_text().count("\n") == len(LINES) and (tmp_path / "pipe").is_fifo()
    for _ in range(2):
        generated(run, prompts, link, "--overwrite")
        assert link.is_symlink() and len(answers(tmp_path / "target.jsonl")) == len(LINES)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "is no JSON"),
        ("[1]", "either prompt"),
        ({"prompt": "a", "messages": []}, "either prompt"),
        ({"prompt": 3}, "prompt: must be a text"),
        ({"prompt": "a", "text": "b"}, "text: is a key of the answer"),
        ({"prompt": "a", "top_k": 1.5}, "top_k: must be a whole number"),
        ({"prompt": "a", "temperature": True}, "temperature: must be a number"),
        ({"prompt": "a", "temperature": -1}, "must be 0 (greedy)"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: 0"),
        ({"prompt": "a", "stop": [""]}, "stop: must be"),
        ({"prompt": "the " * 9000}, "model.max_seq_len"),
        ('{"prompt": "a", "id": "\\ud800"}', "is no JSON"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": []}, "messages: must be a list of at least one"),
        ('{"prompt": "a", "id": NaN}', "is no JSON"),
        ('{"prompt": "a", "id": 1e400}', "is no JSON"),
        ({"prompt": "a", "temperature": 1e9}, "to 100"),
    ],
    ids=range(17),
)
def test_bad_lines_are_told_before_anything_is_written(run: Path, tmp_path: Path, line: Any, told: str) -> None:
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": "good"}, line])
    result = _call("generate", run, "--prompts", prompts, "--out", tmp_path / "out")
    assert result.exit_code == 3 and f"{prompts}:2: " in result.stderr and told in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_options_that_do_not_go_together(run: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path / "prompts.jsonl", LINES)
    for more in (
        ["--prompts", prompts],
        ["--prompts", prompts, "--prompt", "a", "--out", "x"],
        ["--prompt", "a", "--exact"],
        ["--prompts", prompts, "--out", "x", "--chat"],
        ["--prompts", tmp_path / "nowhere", "--out", tmp_path / "x"],
        ["--prompt", "a", "--stop", ""],
        ["--prompt", "a", "--temperature", "inf"],
        [],
    ):
        result = _call("generate", run, *more)
        assert result.exit_code == 2 and result.stderr, more


@pytest.mark.parametrize(
    ("content", "told"),
    [("[1]", "has no list of messages"), ('{"messages": [', "no JSON that can be read"), (None, "no such file")],
)
def test_files_of_messages_that_are_none(run: Path, tmp_path: Path, content: str | None, told: str) -> None:
    said = tmp_path / "said.json"
    if content is not None:
        said.write_text(content)
    result = _call("generate", run, "--chat", "--messages", said, "--prompt", "a")
    assert result.exit_code in (2, 3) and f"--messages {said}: " in result.stderr and told in result.stderr
    assert '{"messages": [{"role": "user", "content": "Hello"}, ...]}' in result.stderr


def test_an_encoder_takes_no_options_of_texts(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    for option, value in (("--temperature", "0.5"), ("--max-tokens", "3"), ("--stop", "x"), ("--seed", "0")):
        result = _call("generate", bert, "--prompt", "a [MASK]", option, value)
        assert result.exit_code == 2 and f"{option}: an encoder fills masks" in result.stderr
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": "a [MASK]", "min_p": 0.1}])
    result = _call("generate", bert, "--prompts", prompts, "--out", tmp_path / "out")
    assert result.exit_code == 3 and f"{prompts}:1: min_p: an encoder fills masks" in result.stderr

"""`llmtrain checkpoint` as a user and as a script sees it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.cli.checkpoint import app
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.values.fragment import Box, Fragment
from tests.unit.checkpoint.saved import cut, save, state_fragments


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and stdout; errors that `main` turns into messages are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for step in (5, 10):
        save(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def test_list(run_folder: Path) -> None:
    (run_folder / "checkpoints" / "step-00000005" / "state.json").unlink()
    code, text = run("list", run_folder)
    rows = [line.split("\t") for line in text.splitlines()]
    assert code == 0
    assert [(row[0], row[4]) for row in rows] == [("step", "state"), ("5", "damaged"), ("10", "ok")]
    entries = json.loads(run("list", run_folder, "--json")[1])
    assert [(entry["step"], entry["num_tensors"]) for entry in entries] == [(5, 0), (10, 5)]
    assert "is missing" in entries[0]["problem"]


def test_inspect(run_folder: Path) -> None:
    path = run_folder / "checkpoints" / "step-00000010"
    code, text = run("inspect", path)
    assert code == 0
    assert "parameters   16" in text
    assert '{"layout": {"dp": 1}}' in text
    assert "decoder.layers.0.mlp.up\tF32\t[5, 3]\texp_avg, exp_avg_sq, master" in text
    facts = json.loads(run("inspect", run_folder, "--json")[1])
    assert (facts["step"], facts["parameters"], facts["state"]["train"]["step"]) == (10, 16, 7)
    assert facts["size_bytes"] == sum(
        file.stat().st_size for file in path.iterdir() if not file.name.startswith("manifest.")
    )


def test_inspect_counts_no_rows_that_pad_the_vocabulary(tmp_path: Path) -> None:
    """Of 128 rows in the tensors, 100 are tokens."""
    names = {"embeddings.word.weight": (128, 4), "head.weight": (128, 4), "mlm.bias": (128,), "decoder.a": (128, 4)}
    fragments = [
        Fragment.whole(name, kind, torch.zeros(shape))
        for name, shape in names.items()
        for kind in ("master", "exp_avg")
    ]
    path = save(
        tmp_path,
        1,
        fragments,
        config_text="model: {vocab_size: 100, family: encoder, head: mlm, tie_embeddings: false}\n",
    )
    facts = json.loads(run("inspect", path, "--json")[1])
    assert (facts["parameters"], facts["padding"]) == (2 * 400 + 100 + 512, 2 * 28 * 4 + 28)
    assert "parameters   1,412\n" in run("inspect", path)[1]


def test_verify_says_what_was_checked(run_folder: Path) -> None:
    code, text = run("verify", run_folder)
    assert code == 0
    assert [line.split(": ")[1][:11] for line in text.splitlines()] == ["ok, 3 files", "ok, 3 files"]
    assert run("verify", run_folder / "checkpoints" / "step-00000005")[0] == 0


def test_verify_lists_every_problem_of_every_checkpoint(run_folder: Path) -> None:
    first, second = (run_folder / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    (first / "state.json").unlink()
    (first / "extra").write_text("")
    content = bytearray((second / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (second / "rank-00000.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        run("verify", run_folder)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert all(words in message for words in ("state.json: is missing", "extra: is not listed", "sha256 is", "2 of 2"))
    result = CliRunner().invoke(app, ["verify", str(run_folder), "--json"])
    assert [len(entry["problems"]) for entry in json.loads(result.stdout)] == [2, 1]
    assert isinstance(result.exception, CheckpointError)


def test_diff_sees_one_changed_bit_and_no_layout(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    halves = [Box((0, 0), (4, 3)), Box((0, 3), (4, 3))]
    changed = tensor.clone()
    changed[1, 1] += 0.5
    cases = {1: cut("w", "master", tensor, [Box.whole((4, 6))]), 2: cut("w", "master", tensor, halves)}
    cases |= {3: cut("w", "master", changed, halves), 4: state_fragments()}
    paths = {}
    for step, fragments in cases.items():
        writing = start_checkpoint(tmp_path, step)
        parts = [write_rank_files(writing, rank, [fragment]) for rank, fragment in enumerate(fragments)]
        paths[step] = publish(writing, parts, Contents(step, {}, "", {}), lambda: None)
    assert run("diff", paths[1], paths[2]) == (0, "1 of 1 tensors are equal bit by bit\n")
    code, text = run("diff", paths[1], paths[3])
    assert code == 1
    assert "w\tmaster\tdifferent\t0.5" in text
    code, text = run("diff", paths[1], paths[4], "--json")
    assert code == 1
    assert {row["result"] for row in json.loads(text)} == {"only in A", "only in B"}


def test_paths_that_hold_no_checkpoint_are_usage_errors(tmp_path: Path) -> None:
    for verb in ("list", "inspect", "verify"):
        for path, words in [(tmp_path / "missing", "is not a folder"), (tmp_path, "holds no checkpoint")]:
            with pytest.raises(ConfigError, match=words):
                run(verb, path)

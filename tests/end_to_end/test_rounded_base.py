"""A finetuning beside a base in whole numbers, through the command: trained, resumed, used and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmtrain.cli.app import app
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.runs.metrics_file import read_rows
from tests.support.command import llmtrain
from tests.support.evaluated_run import TEXTS, trained_run, write_lines
from tests.support.readers import require_onnx
from tests.support.servers import served

QUANTIZE: dict[str, Any] = {"scheme": "w4a16", "group": 16}
TASKS = "tasks:\n  - {name: text, kind: perplexity, data: DATA, prompt: '{text}', max_length: 40}\n"
ASKED = ("--prompt", "the fox sleeps", "--temperature", "0", "--max-tokens", "24", "--device", "cpu")
MEGATRON = ("engine.name=megatron", "engine.zero_stage=1", "launch.num_workers=2", "parallel.tensor=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 40 steps, and `run.yaml`, which trains a LoRA of 6 steps on it, rounded; `runs/tuned` has done so."""
    folder = tmp_path_factory.mktemp("rounded")
    base = trained_run(folder, train={"steps": 40}, checkpoint={"every_steps": 40})
    keys = {"train.steps": 6, "checkpoint.every_steps": 2, "optim.decay_steps": 6, "optim.lr": 5e-3, "name": "tuned"}
    lora = {"base": str(base.run_dir), "method": "lora", "lora": {"rank": 4}}
    (folder / "run.yaml").write_text(to_yaml(base.with_keys({**keys, "finetune": lora, "quantize": QUANTIZE})), "utf-8")
    write_lines(folder / "texts.jsonl", TEXTS)
    (folder / "tasks.yaml").write_text(TASKS.replace("DATA", "texts.jsonl"), "utf-8")
    command(folder, "train", "run.yaml")
    return folder


def command(folder: Path, *arguments: str) -> str:
    done = llmtrain(*arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "runs" / name / "metrics.jsonl")]


def measured(folder: Path, *model: str) -> float:
    """The perplexity of some texts, by `llmtrain eval`."""
    told = json.loads(command(folder, "eval", *model, "--tasks", "tasks.yaml", "--device", "cpu", "--json"))
    return told["tasks"]["text"]["metrics"]["byte_perplexity"]


def test_it_goes_on_in_another_layout_and_is_used(folder: Path) -> None:
    command(folder, "train", "run.yaml", "name=again", "train.steps=2")
    command(folder, "train", "run.yaml", "name=again", *MEGATRON)
    assert losses(folder, "again") == pytest.approx(losses(folder, "tuned"), rel=1e-5)
    assert command(folder, "generate", "runs/tuned", *ASKED).strip()


@pytest.mark.whole_grid
def test_interrupted_it_continues_bit_for_bit(folder: Path) -> None:
    for steps in (2, 4, 6):
        command(folder, "train", "run.yaml", "name=parts", f"train.steps={steps}")
    assert losses(folder, "parts") == losses(folder, "tuned")


@pytest.mark.whole_grid
def test_evaluations_and_ranks_see_the_rounded_base(folder: Path) -> None:
    told = json.loads(command(folder, "export", "runs/tuned", "merged", "--to", "hf", "--json"))
    assert "the base is the one that was trained on: rounded to w4a16" in told["notes"]
    found = measured(folder, "runs/tuned")
    assert found == pytest.approx(measured(folder, "merged"), rel=1e-5)
    assert found == pytest.approx(measured(folder, "runs/tuned", "parallel.tensor=2"), rel=1e-5)
    text = command(folder, "generate", "runs/tuned", *ASKED)
    assert command(folder, "generate", "merged", *ASKED) == text
    assert command(folder, "generate", "runs/tuned", *ASKED, "parallel.pipeline=2") == text


@pytest.mark.whole_grid
@pytest.mark.parametrize("options", [(), ("--replicas", "2")], ids=["alone", "replicas"])
def test_it_is_served(folder: Path, options: tuple[str, ...]) -> None:
    text = command(folder, "generate", "runs/tuned", *ASKED)
    with served(folder / "runs" / "tuned", *options) as server:
        asked = {"model": "tuned", "prompt": "the fox sleeps", "temperature": 0, "max_tokens": 24}
        answer = server.post("/completions", asked)
    assert answer.status_code == 200, answer.text
    assert text.strip().endswith(answer.json()["choices"][0]["text"].strip())


@pytest.mark.whole_grid
def test_the_updates_alone_belong_on_a_base_that_is_rounded_alike(folder: Path) -> None:
    told = json.loads(command(folder, "export", "runs/tuned", "updates", "--to", "peft", "--json"))
    assert any("rounded to w4a16: it belongs on one that is rounded alike" in note for note in told["notes"])
    rounding = ("--scheme", "w4a16", "--group", "16", "--dtype", "float32", "--max-perplexity-increase", "100")
    command(folder, "compress", "runs/small", "base-w4", *rounding, "--samples", "8")
    found = measured(folder, "updates", "--base", "base-w4")
    assert found == pytest.approx(measured(folder, "runs/tuned"), rel=1e-5)
    assert found != pytest.approx(measured(folder, "updates", "--base", "runs/small"), rel=5e-5)


def test_a_base_that_was_compressed_before_stays_what_it_is(folder: Path) -> None:
    """Its numbers are not rounded again, by training or by `compress`."""
    rounding = ("--scheme", "w4a16", "--group", "16", "--max-perplexity-increase", "100", "--samples", "8")
    command(folder, "compress", "runs/small", "w4", *rounding)
    command(folder, "import", "w4", "runs/w4")
    expected = measured(folder, "w4")
    command(folder, "compress", "runs/w4", "w4-again", *rounding, "--evaluate", "texts.jsonl")
    assert measured(folder, "w4-again") == expected != measured(folder, "runs/small")
    command(folder, "train", "run.yaml", "name=on-w4", "finetune.base=runs/w4", *MEGATRON)
    command(folder, "train", "run.yaml", "name=beside", "finetune.base=runs/w4", "quantize=null")
    assert losses(folder, "on-w4") == pytest.approx(losses(folder, "beside"), rel=1e-5)
    command(folder, "export", "runs/on-w4", "on-w4", "--to", "peft")
    assert measured(folder, "on-w4", "--base", "w4") == pytest.approx(measured(folder, "runs/on-w4"), rel=1e-6)


@pytest.mark.whole_grid
@pytest.mark.parametrize("form", ["gguf", "onnx", "torch-export"])
def test_every_other_format_proves_what_it_holds(folder: Path, form: str) -> None:
    if form == "onnx":
        require_onnx()  # for this process, so the command runs in it
    done = CliRunner().invoke(
        app, ["export", str(folder / "runs" / "tuned"), str(folder / form), "--to", form, "--json"]
    )
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert "the base is the one that was trained on: rounded to w4a16" in told["notes"]
    assert told.get("perplexity_increase", 0) < 1e-3


@pytest.mark.whole_grid
def test_merged_it_is_compressed_as_any_model(folder: Path) -> None:
    bound = ("--max-perplexity-increase", "10", "--samples", "8")
    done = llmtrain("compress", "runs/tuned", "small", *bound, folder=folder)
    assert done.returncode == 2 and "--scheme: is needed" in done.stderr
    told = json.loads(command(folder, "compress", "runs/tuned", "small", "--scheme", "w8a16", *bound, "--json"))
    assert told["perplexity_after"] == pytest.approx(told["perplexity_before"], rel=0.05)

"""`finetune` through the command: a base, what is added to it, what is saved, what continues, what comes of it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.config.parameters import declare_parameters
from llmtrain.config.reading.load import load_config
from llmtrain.infer.model import load_model
from llmtrain.runs.metrics_file import read_rows
from llmtrain.values.batch import ModelInputs
from llmtrain.values.fragment import Box
from tests.end_to_end.conftest import CONFIG
from tests.support.command import llmtrain

KEYS = ("evaluate.every_steps=0", "data.valid=[]", "checkpoint.every_steps=2", "checkpoint.keep=5", "optim.lr=1e-2")
LORA = ("finetune={base: runs/tiny, method: lora, lora: {rank: 4, dropout: 0.1}}", "optim.decay_steps=6")
SHORT = ("optim.decay_steps=6", "data.seq_len=48")
MEGATRON = ("engine.name=megatron", "engine.zero_stage=1", "launch.num_workers=2", "parallel.tensor=2")


def train(workspace: Path, *options: str, code: int = 0) -> str:
    done = llmtrain("train", "run.yaml", *KEYS, *options, folder=workspace)
    assert done.returncode == code, done.stderr
    return done.stderr


def checkpoint(workspace: Path, name: str, step: int) -> CheckpointReader:
    return open_checkpoint(workspace / "runs" / name / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of 4 steps, and one of 6 steps that trains an update of its weights."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "data").symlink_to(shards / "data")
    (folder / "run.yaml").write_text(CONFIG, "utf-8")
    train(folder, "train.steps=4")
    train(folder, *LORA, "name=lora", "train.steps=6")
    return folder


def losses(workspace: Path, name: str) -> list[float]:
    rows = read_rows(workspace / "runs" / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_it_begins_at_the_base_and_saves_what_is_trained_alone(tuned: Path) -> None:
    base, saved = checkpoint(tuned, "tiny", 4), checkpoint(tuned, "lora", 6)
    config = load_config(tuned / "runs" / "lora" / "config.yaml", []).config
    declared = declare_parameters(config.model, config.finetune)
    added = {name for name in declared if name not in config.frozen}
    assert {info.name for info in saved.tensors()} == added
    assert all("lora_" in name for name in added)
    # Weight, and two moments of it, in fp32.
    data = sum(info.size_bytes for info in saved.tensors())
    assert data == 12 * sum(Box.whole(declared[name].shape).num_elements for name in added)
    assert saved.about["base"]["path"] == str(base.path.absolute())
    first = losses(tuned, "lora")[0]
    assert first < losses(tuned, "tiny")[0] - 0.1, "it begins with the base's weights, and at its own first sample"


def test_an_interrupted_run_continues_bit_for_bit_and_in_another_layout(tuned: Path) -> None:
    for steps in (2, 6):
        train(tuned, *LORA, "name=again", f"train.steps={steps}")
    assert losses(tuned, "again") == losses(tuned, "lora")
    train(tuned, *LORA, "name=again", "train.steps=8", *MEGATRON)
    shutil.copytree(tuned / "runs" / "lora", tuned / "runs" / "whole")
    train(tuned, *LORA, "name=whole", "train.steps=8")
    assert losses(tuned, "again") == pytest.approx(losses(tuned, "whole"), rel=1e-5)


@torch.no_grad()
def test_the_merged_export_gives_the_logits_of_the_update(tuned: Path) -> None:
    done = llmtrain("export", "runs/lora", "merged", "--to", "hf", folder=tuned)
    assert done.returncode == 0, done.stderr
    tokens = torch.arange(3, 35)[None]
    inputs = ModelInputs(tokens, torch.arange(32)[None])
    found = []
    for path in ("runs/lora", "merged", "runs/tiny"):
        model = load_model(tuned / path, torch.device("cpu")).model
        found.append(model.logits(model(inputs)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-2, "the update changes what the base says"


def test_what_was_trained_is_used_with_its_base(tuned: Path) -> None:
    done = llmtrain("generate", "runs/lora", "--prompt", "a", "--max-tokens", "3", folder=tuned)
    assert done.returncode == 0, done.stderr
    done = llmtrain("checkpoint", "verify", "runs/lora/checkpoints/step-00000006", "--json", folder=tuned)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "section",
    [
        "{base: runs/tiny, method: adapter, adapter: {size: 8, placement: both}}",
        pytest.param(
            "{base: runs/tiny, method: prompt, prompt: {tokens: 3, init: text, text: a word}}",
            marks=pytest.mark.whole_grid,
        ),
        pytest.param("{base: runs/tiny}", marks=pytest.mark.whole_grid),
    ],
)
def test_other_methods_train_continue_and_generate(tuned: Path, section: str) -> None:
    name = f"other{len(section)}"
    for steps in (2, 4):
        train(tuned, f"finetune={section}", f"name={name}", f"train.steps={steps}", *SHORT)
    first = losses(tuned, name)
    assert len(first) == 4
    shutil.rmtree(tuned / "runs" / name / "checkpoints" / "step-00000004")
    train(tuned, f"finetune={section}", f"name={name}", "train.steps=4", *SHORT)
    assert losses(tuned, name) == first, "it continues at step 2, at which the other stopped"
    done = llmtrain("generate", f"runs/{name}", "--prompt", "a", "--max-tokens", "3", folder=tuned)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["finetune={method: lora}"], "finetune.method = lora"),
        (["finetune={method: lora, base: nowhere}"], "finetune.base = nowhere"),
        (["finetune={method: lora, base: runs/lora}"], "Train it on with the same section"),
        (["finetune={method: lora, base: runs/tiny}", "model.num_layers=3"], "model.num_layers"),
    ],
)
def test_what_cannot_begin_is_explained(tuned: Path, options: list[str], expected: str) -> None:
    said = train(tuned, "name=wrong", "train.steps=2", *options, code=2)
    assert expected in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("finetune.lora.rank=8", "finetune.lora.rank"),
        ("finetune.lora.alpha=16", "finetune.lora.alpha"),
        ("finetune.method=full", "finetune.method"),
        ("finetune.lora.targets=[attention]", "finetune.lora.targets"),
        ("finetune.base=runs/lora", "rests on"),
    ],
)
def test_a_run_does_not_change_what_it_trains(tuned: Path, option: str, expected: str) -> None:
    said = train(tuned, *LORA, "name=lora", "train.steps=8", option, code=2)
    assert expected in said


def test_an_import_with_an_adapter_is_not_continued_without_it(tuned: Path) -> None:
    folder = tuned / "runs" / "imported"
    shutil.copytree(tuned / "runs" / "lora", folder)
    newest = folder / "checkpoints" / "step-00000006"
    manifest = json.loads((newest / "manifest.json").read_text("utf-8"))
    manifest["about"]["imported"] = "Llama"
    (newest / "state.json").write_text("{}", "utf-8")
    state = (newest / "state.json").read_bytes()
    manifest["files"]["state.json"] = {
        **manifest["files"]["state.json"], "size_bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()
    }  # fmt: skip
    content = json.dumps(manifest).encode()
    (newest / "manifest.json").write_bytes(content)
    line = f"{hashlib.sha256(content).hexdigest()}  manifest.json\n"
    (newest / "manifest.json.sha256").write_text(line, "utf-8")
    said = train(tuned, "name=plain", "train.steps=2", "checkpoint.resume=runs/imported", code=2)
    assert "checkpoint.resume" in said
    assert "has a lora beside its weights, which would be lost" in said


def test_a_base_that_has_changed_is_noticed(tuned: Path) -> None:
    folder = tuned / "runs" / "moved"
    shutil.copytree(tuned / "runs" / "lora", folder)
    manifest = folder / "checkpoints" / "step-00000006" / "manifest.json"
    base = Path(json.loads(manifest.read_text("utf-8"))["about"]["base"]["path"])
    aside = base.with_name("aside")
    base.rename(aside)
    try:
        said = train(tuned, *LORA, "name=moved", "train.steps=8", code=3)
        assert str(base) in said
    finally:
        aside.rename(base)


def test_a_base_that_was_moved_is_named_anew(tuned: Path) -> None:
    """The same by its hash: the run goes on as if it lay where it was, and rests on the new place from then on."""
    runs = tuned / "runs"
    shutil.copytree(runs / "lora", runs / "followed")
    train(tuned, *LORA, "name=followed", "train.steps=8")
    (runs / "tiny").rename(runs / "elsewhere")
    try:
        shutil.copytree(runs / "lora", runs / "other")
        shutil.rmtree(runs / "other" / "checkpoints" / "step-00000006")
        options = (*LORA, "name=other", "train.steps=8", "finetune.base=runs/elsewhere")
        for ranks in ((), MEGATRON):
            said = train(tuned, *options, *ranks)
            assert "lies in runs/elsewhere/checkpoints/step-00000004 now: it is the same, by its hash" in said
            rows = read_rows(runs / "other" / "metrics.jsonl")
            expected = losses(tuned, "followed")
            assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5 if ranks else 0)
            newest = checkpoint(tuned, "other", 8)
            assert newest.about["base"]["path"] == str(runs / "elsewhere" / "checkpoints" / "step-00000004")
            shutil.rmtree(newest.path)
            shutil.rmtree(runs / "other" / "checkpoints" / "step-00000006")
        wrong = train(tuned, *LORA, "name=other", "train.steps=8", "finetune.base=runs/lora", code=2)
        assert "finetune.base = runs/lora" in wrong and "is not among its checkpoints" in wrong
    finally:
        (runs / "elsewhere").rename(runs / "tiny")

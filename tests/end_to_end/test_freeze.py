"""`optim.freeze` through the command: what is saved, what continues, and what happens where the base is not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.config.parameters import FrozenNames, declare_parameters
from llmtrain.config.reading.load import load_config
from llmtrain.runs.metrics_file import read_rows
from llmtrain.values.fragment import Box
from tests.end_to_end.conftest import CONFIG
from tests.support.command import llmtrain

PATTERNS = ("embeddings.*", "decoder.layers.0.*")
FREEZE = f"optim.freeze=[{', '.join(PATTERNS)}]"
KEYS = ("evaluate.every_steps=0", "data.valid=[]", "checkpoint.every_steps=2", "checkpoint.keep=5")
TUNED = ("checkpoint.resume=runs/tiny", FREEZE)


def train(workspace: Path, *options: str, code: int = 0) -> str:
    done = llmtrain("train", "run.yaml", *KEYS, *options, folder=workspace)
    assert done.returncode == code, done.stderr
    return done.stderr


def last(workspace: Path, name: str, step: int) -> CheckpointReader:
    return open_checkpoint(workspace / "runs" / name / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of 4 steps, and one that begins there and trains half of it up to step 8."""
    folder = tmp_path_factory.mktemp("freeze")
    (folder / "data").symlink_to(shards / "data")
    (folder / "run.yaml").write_text(CONFIG, "utf-8")
    train(folder, "train.steps=4")
    train(folder, *TUNED, "name=tuned", "train.steps=8")
    return folder


def test_what_is_frozen_is_not_written_again_and_stays_what_it_was(tuned: Path) -> None:
    base, trained = last(tuned, "tiny", 4), last(tuned, "tuned", 8)
    model = load_config(tuned / "runs" / "tuned" / "config.yaml", []).config.model
    stored = {info.name for info in trained.tensors()}
    for name, parameter in declare_parameters(model).items():
        box = Box.whole(parameter.shape)
        equal = torch.equal(trained.read(name, "master", box), base.read(name, "master", box))
        assert (name not in stored) == (name in FrozenNames(PATTERNS)) == equal, name
    assert trained.about["base"]["path"] == str(base.path.absolute())
    assert trained.size_bytes < base.size_bytes


def test_an_interrupted_run_continues_bit_for_bit_and_in_another_layout(tuned: Path) -> None:
    for steps in (6, 8):
        train(tuned, *TUNED, "name=again", f"train.steps={steps}", "train.tokens=null", "optim.decay_steps=8")
    train(tuned, *TUNED, "name=whole", "train.steps=8", "optim.decay_steps=8")
    again, whole = (read_rows(tuned / "runs" / name / "metrics.jsonl") for name in ("again", "whole"))
    assert [row["step"] for row in again] == [row["step"] for row in whole] == list(range(5, 9))
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    megatron = ("engine.name=megatron", "engine.zero_stage=1", "launch.num_workers=2", "parallel.tensor=2")
    train(tuned, *TUNED, "name=again", "train.steps=10", "optim.decay_steps=8", *megatron)
    train(tuned, *TUNED, "name=whole", "train.steps=10", "optim.decay_steps=8")
    again, whole = (read_rows(tuned / "runs" / name / "metrics.jsonl") for name in ("again", "whole"))
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    assert last(tuned, "again", 10).about["base"] == last(tuned, "whole", 10).about["base"]


def test_what_is_trained_on_top_is_used_with_its_base(tuned: Path) -> None:
    done = llmtrain("generate", "runs/tuned", "--prompt", "a", "--max-tokens", "3", folder=tuned)
    assert done.returncode == 0, done.stderr
    done = llmtrain("checkpoint", "verify", "runs/tuned/checkpoints/step-00000008", "--json", folder=tuned)
    assert done.returncode == 0, done.stderr


def test_other_parameters_than_before_are_refused(tuned: Path) -> None:
    said = train(tuned, "name=tuned", "train.steps=12", "optim.freeze=[embeddings.*]", code=2)
    assert "optim.freeze" in said
    assert 'was trained with ["embeddings.*", "decoder.layers.0.*"]. Set it back.' in said
    said = train(tuned, "checkpoint.resume=runs/tuned", "name=more", "train.steps=12", code=2)
    assert "begin a new run that has this one as its finetune.base" in said


def test_a_run_from_nothing_has_nothing_to_keep(tuned: Path) -> None:
    said = train(tuned, "name=fresh", FREEZE, code=2)
    assert "optim.freeze = embeddings.*, decoder.layers.0.* (command line): has no weights to keep" in said
    assert "fits no parameter of the model. Try embeddings.word.weight" in train(
        tuned, *TUNED, "name=fresh", "optim.freeze=[embedings.*]", code=2
    )


def test_another_base_and_none_are_told(tuned: Path) -> None:
    base, kept = tuned / "runs" / "tiny" / "checkpoints" / "step-00000004", tuned / "kept"
    base.rename(kept)
    said = train(tuned, *TUNED, "name=tuned", "train.steps=12", code=3)
    assert f"{base}: no such checkpoint" in said and "has its frozen weights there. Put that checkpoint back" in said
    shutil.copytree(kept, base)
    manifest = json.loads((base / "manifest.json").read_text())
    (base / "manifest.json").write_text(json.dumps(manifest))
    said = train(tuned, *TUNED, "name=tuned", "train.steps=12", code=3)
    assert "it is another checkpoint" in said
    shutil.rmtree(base)
    kept.rename(base)

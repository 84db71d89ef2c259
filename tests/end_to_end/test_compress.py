"""`compress` through the command: a trained run, a quantized or pruned folder, and what other verbs make of it."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmtrain.checkpoint.find import open_newest
from llmtrain.checkpoint.saved_run import saved_architecture
from llmtrain.cli.app import app
from llmtrain.compress.source import open_source
from llmtrain.config.parameters import pruned_linears
from llmtrain.config.reading.load import load_config
from llmtrain.infer.model import checkpoint_tensors
from llmtrain.infer.packed.products import sums_are_exact
from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS, llmtrain
from tests.support.evaluated_run import trained_run
from tests.support.readers import COMPRESSED_TENSORS, use_compressed_tensors
from tests.support.small_runs import train_here

FEW = ("--samples", "16")
UP = "decoder.layers.0.mlp.up.weight"
ROUND = ("--scheme", "w4a16", "--group", "0", "--max-perplexity-increase", "10", *FEW)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows its text by heart: only then do errors of weights matter."""
    folder = tmp_path_factory.mktemp("compress")
    trained_run(folder, train={"steps": 150}, checkpoint={"every_steps": 150})
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has layers to leave out: two learn so simple a text nearly as well as one."""
    folder = tmp_path_factory.mktemp("deep")
    trained_run(folder, model={"num_layers": 4}, train={"steps": 150}, checkpoint={"every_steps": 150})
    return folder


def compress(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the command, where compressed-tensors can be imported."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(COMPRESSED_TENSORS)}
    done = subprocess.run(
        [COMMAND, "compress", *arguments, "--json"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def here(*arguments: str, code: int = 0) -> str:
    """Run the command in this process, which has its imports done; what it says, or its JSON."""
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else " ".join(done.output.split())


def test_gptq_is_nearer_than_rounding_and_other_verbs_take_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compressed_tensors()
    monkeypatch.chdir(trained)
    chosen = compress(trained, "runs/small", "gptq", *ROUND, "--method", "gptq")
    rounded = json.loads(here("compress", "runs/small", "rtn", *ROUND, "--json"))
    assert chosen["perplexity_before"] == rounded["perplexity_before"] < chosen["perplexity_after"]
    assert chosen["perplexity_after"] < rounded["perplexity_after"]
    assert chosen["max_logit_difference"] <= 1e-4 and chosen["logit_positions_compared"] > 100

    here("import", "gptq", "imported")
    greedy = ("--prompt", "the ", "--temperature", "0", "--max-tokens", "12")
    done = llmtrain("generate", "gptq", *greedy, folder=trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout == here("generate", "imported", *greedy), "an import holds what the folder holds"
    assert "4-bit weights with a scale for each output" in done.stderr
    assert "kernels: 14 of 14 matrices dequantized: too small to be faster" in done.stderr
    assert "is the model that is to be compressed" in here("compress", "gptq", "gptq", *ROUND, "--overwrite", code=2)
    assert "is quantized already" in here("compress", "gptq", "again", *ROUND, "--evaluate", "valid", code=2)


def test_every_verb_says_how_matrices_are_multiplied(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not sums_are_exact():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.chdir(trained)
    caplog.set_level("INFO")
    with monkeypatch.context() as without:
        without.setattr("llmtrain.interop.compressed.writing.find_spec", lambda name: None)
        said = here("compress", "runs/small", "w8", "--scheme", "w8a16", *FEW)
    unread = "compared in transformers: compressed-tensors is not installed here. pip install compressed-tensors"
    assert unread in " ".join(said.split())
    greedy = ("--prompt", "the ", "--temperature", "0", "--max-tokens", "12")

    def told(how: str, *arguments: str) -> str:
        caplog.clear()
        answer = here(*arguments, "--kernels", how)
        said = "dequantized: so it was asked for" if how == "plain" else "multiplied as 8-bit numbers with exact sums"
        assert f"kernels: 14 of 14 matrices {said}" in caplog.text
        return answer

    assert told("plain", "generate", "w8", *greedy) == told("packed", "generate", "w8", *greedy) != ""
    Path("task.jsonl").write_text(json.dumps({"text": "def the(self): return self"}) + "\n")
    Path("task.yaml").write_text("tasks:\n  - {name: held-out, kind: perplexity, data: task.jsonl, prompt: '{text}'}\n")
    plain, packed = (
        json.loads(told(how, "eval", "w8", "--tasks", "task.yaml", "--json"))["tasks"]["held-out"]["metrics"]
        for how in ("plain", "packed")
    )
    assert plain == pytest.approx(packed, rel=1e-5) and plain != packed
    asked = (*greedy, "--kernels", "packed")
    assert "no matrix of the model is in whole numbers" in here("generate", "runs/small", *asked, code=2)
    ranks = here("generate", "w8", "parallel.tensor=2", *asked, code=2)
    assert "--kernels packed: the kernels multiply whole matrices" in ranks


@pytest.mark.parametrize(
    "asked", [("--scheme", "w4a16", "--group", "0"), ("--prune", "heads")], ids=["quantized", "pruned"]
)
def test_above_the_bound_nothing_is_left(
    trained: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...]
) -> None:
    monkeypatch.chdir(trained)
    before = sorted(path.name for path in trained.iterdir())
    said = here("compress", "runs/small", "out", *asked, *FEW, "--max-perplexity-increase", "0", code=1)
    assert "the perplexity would be" in said and "Traceback" not in said
    assert sorted(path.name for path in trained.iterdir()) == before


RECOVERY = """
base: [llmtrain:finetune/recover.yaml, {pruned}/config.yaml]
name: {pruned}-again
data: {{train: [{{path: train}}], valid: [{{path: valid}}], seq_len: 48}}
train: {{steps: 40, global_batch_size: 4, micro_batch_size: 2}}
finetune: {{base: {pruned}}}
{teacher}
optim: {{lr: 2e-3, min_lr: 2e-3}}
checkpoint: {{every_steps: 40}}
evaluate: {{every_steps: 0}}
observe: {{wandb: off, tensorboard: false}}
launch: {{device: cpu, threads_per_worker: 1}}
"""
"""The shipped preset, with the learning rate of so small a model."""


TAUGHT = "distill: {teacher: runs/small}"


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_newest(folder)
    model = saved_architecture(checkpoint)
    read = checkpoint_tensors(checkpoint, model, torch.float32)
    return {weight.name: read(weight.name) == 0 for _, weight in pruned_linears(model, ("attention", "mlp"))}


@pytest.mark.parametrize(
    ("kind", "options", "teacher"),
    [
        ("2:4", (), ""),
        pytest.param("ffn", ("--method", "wanda", "--sparsity", "0.75"), TAUGHT, marks=pytest.mark.whole_grid),
        pytest.param("heads", ("--sparsity", "0.75"), TAUGHT, marks=pytest.mark.whole_grid),
        pytest.param("layers", ("--method", "wanda", "--sparsity", "0.75"), "", marks=pytest.mark.whole_grid),
        pytest.param(
            "weights",
            ("--method", "wanda", "--sparsity", "0.7", "--keep", "*.attention.q"),
            "",
            marks=pytest.mark.whole_grid,
        ),
    ],
)
def test_a_pruned_model_recovers_with_the_preset_and_exports(
    kind: str, options: tuple[str, ...], teacher: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(request.getfixturevalue("deep" if kind == "layers" else "trained"))
    name = f"pruned-{kind.replace(':', '-')}"
    done = json.loads(here("compress", "runs/small", name, "--prune", kind, *options, *FEW, "--json"))
    assert done["perplexity_after"] > 1.1 * done["perplexity_before"], "it has lost something"
    Path(f"{name}.yaml").write_text(RECOVERY.format(pruned=name, teacher=teacher), "utf-8")
    config = load_config(Path(f"{name}.yaml"), []).config
    assert train_here(config) == 0
    again = json.loads(here("compress", f"runs/{name}-again", f"{name}-twice", "--prune", "ffn", *FEW, "--json"))
    assert again["perplexity_before"] < 0.5 * (done["perplexity_before"] + done["perplexity_after"])
    before, after = zeros_of(Path(name)), zeros_of(config.run_dir)
    assert all(torch.equal(zeros, after[weight]) for weight, zeros in before.items())
    assert sum(int(zeros.sum()) for zeros in after.values()) == round(
        done["share_of_zeros"] * sum(zeros.numel() for zeros in after.values())
    )
    told = json.loads(here("export", f"runs/{name}-again", f"{name}-hf", "--json"))
    assert told["max_logit_difference"] <= 1e-4 and told["family"].lower() == "llama"
    assert f"| Pruned before this training | {kind} by " in Path(f"{name}-hf/README.md").read_text("utf-8")


def test_a_run_for_whole_numbers_is_pruned_and_then_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained_run(tmp_path, train={"precision": "bf16"}, quantize={"scheme": "w8a16"})
    whole = ("--samples", "1000")  # all that there are: a folder has no seed that chooses some
    done = json.loads(here("compress", "runs/small", "pruned", "--prune", "ffn", *whole, "--json"))
    masters, left = (open_source(Path(place), None).read(UP) for place in ("runs/small", "pruned"))
    assert {tuple(row) for row in left.tolist()} < {tuple(row) for row in masters.tolist()}, "not rounded to bf16"

    again = ("compress", "pruned", "small", "--evaluate", "valid", *whole)
    assert "--scheme: is needed: pruned" in here(*again, code=2)
    small = json.loads(here(*again, "--scheme", "w8a16", "--json"))
    assert small["perplexity_before"] == pytest.approx(done["perplexity_after"], rel=1e-6)
    card = Path("small/README.md").read_text("utf-8")
    assert "| Pruned | ffn by magnitude; perplexity " in card and "| Quantized | w8a16 by rtn: " in card


@pytest.mark.whole_grid
def test_killed_it_leaves_no_name(trained: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "compress", "runs/small", "killed", "--scheme", "w8a16", *FEW],
        cwd=trained, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not list(trained.glob(".writing-killed-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (trained / "killed").exists() and os.WIFSIGNALED(-process.returncode)


@pytest.mark.whole_grid
def test_an_export_is_compressed_with_a_text(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    here("export", "runs/small", "plain")
    small = ("compress", "plain", "small", "--scheme", "w8a16", *FEW)
    assert "--evaluate: is needed" in here(*small, code=2)
    (trained / "short.txt").write_text("def", "utf-8")
    assert "has no whole sample of 48 tokens" in here(*small, "--evaluate", "short.txt", code=3)
    done = json.loads(here(*small, "--evaluate", "valid", "--json"))
    assert done["perplexity_after"] < 1.02 * done["perplexity_before"]

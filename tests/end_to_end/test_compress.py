"""`compress` through the command: a trained run, a quantized folder, and what every other verb makes of it."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS, llmtrain
from tests.support.evaluated_run import trained_run
from tests.support.readers import COMPRESSED_TENSORS, use_compressed_tensors

FEW = ("--samples", "16", "--proof-memory", "1GB")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows its text by heart: only then do errors of weights matter."""
    folder = tmp_path_factory.mktemp("compress")
    trained_run(folder, train={"steps": 150}, checkpoint={"every_steps": 150})
    return folder


def compress(folder: Path, *arguments: str, code: int = 0, judged: bool = False) -> tuple[dict, str]:
    """Run the command; with `judged`, where compressed-tensors can be imported."""
    environment = {**ENVIRONMENT, **({"PYTHONPATH": str(COMPRESSED_TENSORS)} if judged else {})}
    done = subprocess.run(
        [COMMAND, "compress", *arguments, *FEW, "--json"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else {}, done.stderr


def test_gptq_is_nearer_than_rounding_and_all_verbs_take_it(trained: Path) -> None:
    use_compressed_tensors()
    options = ("--scheme", "w4a16", "--group", "0", "--max-perplexity-increase", "10")
    rounded, _ = compress(trained, "runs/small", "rtn", *options)
    chosen, said = compress(trained, "runs/small", "gptq", *options, "--method", "gptq", judged=True)
    assert chosen["perplexity_before"] == rounded["perplexity_before"] < chosen["perplexity_after"]
    assert chosen["perplexity_after"] < rounded["perplexity_after"]
    assert chosen["max_logit_difference"] <= 1e-4 and chosen["logit_positions_compared"] > 100
    assert "max_logit_difference" not in rounded
    assert any("not compared in transformers" in note for note in rounded["notes"])

    texts = [
        llmtrain("generate", place, "--prompt", "the ", "--temperature", "0", "--max-tokens", "12", folder=trained)
        for place in ("gptq", "imported")
        if place == "gptq" or llmtrain("import", "gptq", "imported", folder=trained).returncode == 0
    ]
    assert all(done.returncode == 0 for done in texts), [done.stderr for done in texts]
    assert texts[0].stdout == texts[1].stdout, "an import holds what the folder holds"
    assert "4-bit weights with a scale for each output, dequantized" in texts[0].stderr

    _, said = compress(trained, "gptq", "again", *options, "--evaluate", "valid", code=2)
    assert "is quantized already" in said


def test_above_the_bound_nothing_is_left(trained: Path) -> None:
    before = sorted(path.name for path in trained.iterdir())
    bound = ("--max-perplexity-increase", "0")
    _, said = compress(trained, "runs/small", "out", "--scheme", "w4a16", "--group", "0", *bound, code=1)
    assert "the perplexity would be" in said and "Traceback" not in said
    assert sorted(path.name for path in trained.iterdir()) == before


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
def test_an_export_is_compressed_with_a_text(trained: Path) -> None:
    assert llmtrain("export", "runs/small", "plain", folder=trained).returncode == 0
    _, said = compress(trained, "plain", "small", "--scheme", "w8a16", code=2)
    assert "--evaluate: is needed" in said
    (trained / "short.txt").write_text("def", "utf-8")
    _, said = compress(trained, "plain", "small", "--scheme", "w8a16", "--evaluate", "short.txt", code=3)
    assert "has no whole sample of 48 tokens" in said
    done, _ = compress(trained, "plain", "small", "--scheme", "w8a16", "--evaluate", "valid")
    assert done["perplexity_after"] < 1.02 * done["perplexity_before"]

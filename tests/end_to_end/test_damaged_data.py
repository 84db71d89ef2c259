"""Damaged shards that are skipped, and data behind a URL, through the command."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from llmtrain.data.order import ContinuousOrder
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.storage.skipped import LEDGER_NAME
from llmtrain.files import parse_line
from tests.end_to_end.test_damage import flip
from tests.support.command import llmtrain
from tests.support.http_folder import serve

SEQ_LEN, STEPS, BATCH = 64, 40, 16
SKIP = ("data.train.0.path=pieces/train", "data.on_corrupt=skip")


@pytest.fixture
def pieces(workspace: Path, shards: Path) -> Path:
    """The workspace, with its training text in many small shards."""
    text = Path(sysconfig.get_path("stdlib")) / "email"
    line = ("data", "shards", f"{text}/*.py", "pieces", "--tokenizer", shards / "tokenizer.model")
    done = llmtrain(*line, "--shard-tokens", "10000", "--valid-fraction", "0.2", folder=workspace)
    assert done.returncode == 0, done.stderr
    return workspace


def losses(run: Path) -> dict[int, float]:
    """By step, the last row of a step; evaluation's under the negative number."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            found[row["step"]] = row["loss"]
        elif "valid_loss" in row:
            found[-row["step"]] = row["valid_loss"]
    return found


def test_a_run_goes_on_without_a_damaged_shard_and_resumes_alike(pieces: Path) -> None:
    manifest = read_manifest(pieces / "pieces/train")
    damaged = pieces / "pieces/train" / manifest.shards[1].file
    expected, actual = flip(damaged, damaged.stat().st_size // 2)
    share = manifest.shards[1].stream_tokens / manifest.stream_tokens

    refused = llmtrain("train", "run.yaml", *SKIP, "name=refused", f"data.max_skipped={share / 2}", folder=pieces)
    assert refused.returncode == 3 and "Traceback" not in refused.stderr
    assert damaged.name in refused.stderr and "data.max_skipped" in refused.stderr

    command = ("train", "run.yaml", *SKIP, "data.max_skipped=0.9")
    done = llmtrain(*command, folder=pieces)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: skipping") == 1
    run = pieces / "runs/tiny"
    (row,) = map(parse_line, (run / LEDGER_NAME).read_bytes().splitlines())
    assert row == {
        "path": f"pieces/train/{damaged.name}", "sha256": expected, "actual": actual, "reason": "sha256",
        "samples": -(-manifest.shards[1].stream_tokens // SEQ_LEN) + 1,
    }  # fmt: skip
    first = losses(run)
    assert_counted(pieces, run, damaged.name)

    flip(damaged, damaged.stat().st_size // 2)  # whole again: the ledger decides
    back = "checkpoint.resume=runs/tiny/checkpoints/step-00000020"
    again = llmtrain(*command, back, folder=pieces)
    assert again.returncode == 0, again.stderr
    assert losses(run) == first and len((run / LEDGER_NAME).read_text().splitlines()) == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["step"] == 30 and "loss" in row for row in rows) == 2  # it did run twice

    (run / LEDGER_NAME).unlink()
    other = llmtrain(*command, back, folder=pieces)
    assert other.returncode == 0, other.stderr
    assert losses(run) != first


def assert_counted(pieces: Path, run: Path, shard: str) -> None:
    """The run has taken every sample of its stream, and the tokens of all but those with any of the shard."""
    shards = read_manifest(pieces / "pieces/train").shards
    order = ContinuousOrder([entry.stream_tokens for entry in shards], SEQ_LEN, 1234, 0, 8)
    needed = [{shards[part.shard].file for part in order.parts(order.place(n))} for n in range(STEPS * BATCH)]
    kept = sum(shard not in files for files in needed)
    state = json.loads((run / f"checkpoints/step-{STEPS:08d}/state.json").read_text())["train"]
    assert 0 < kept < STEPS * BATCH
    assert (state["samples"], state["tokens"]) == (STEPS * BATCH, kept * SEQ_LEN)


@pytest.mark.whole_grid
def test_training_from_a_server_is_training_from_a_folder(pieces: Path) -> None:
    shutil.copy((pieces / "data").resolve().parent / "tokenizer.model", pieces / "pieces/tokenizer.model")
    local = llmtrain("train", "run.yaml", SKIP[0], "name=local", folder=pieces)
    assert local.returncode == 0, local.stderr
    entry = read_manifest(pieces / "pieces/train").shards[0]
    with serve(pieces / "pieces") as server:
        server.faults = {entry.file: ["503", "cut"], entry.index_file: ["500"], "manifest.json": ["503"]}
        command = ("train", "run.yaml", f"data.train.0.path={server.url}/train", "data.cache_dir=cache")
        remote = llmtrain(*command, "name=remote", folder=pieces)
        assert remote.returncode == 0, remote.stderr
        assert server.requests[entry.file] == 3
        again = llmtrain(*command, "name=again", "launch.num_workers=2", folder=pieces)
        assert again.returncode == 0, again.stderr
        assert server.requests[entry.file] == 3  # from the cache
        missing = llmtrain("train", "run.yaml", f"data.train.0.path={server.url}/gone", folder=pieces)
        assert missing.returncode == 2 and f"data.train.0.path = {server.url}/gone" in missing.stderr
        shown = llmtrain("data", "inspect", f"{server.url}/train", folder=pieces)
        assert shown.returncode == 2 and "no URLs" in shown.stderr
    assert losses(pieces / "runs/remote") == losses(pieces / "runs/local")
    assert losses(pieces / "runs/again").keys() == losses(pieces / "runs/local").keys()

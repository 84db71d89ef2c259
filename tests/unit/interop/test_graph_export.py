"""`llmtrain export --to onnx` and `--to torch-export`, and the folder without llmtrain."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.model import ModelConfig, MoeConfig
from llmtrain.errors import ExportError
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.model import find_checkpoint_model
from llmtrain.infer.text_model import TextModel
from llmtrain.interop import installation
from llmtrain.interop.graphs import folder as graph_folder
from llmtrain.interop.graphs.ports import Graph
from llmtrain.interop.proof import HARD_TEXTS, real_texts
from tests.support.command import COMMAND, ENVIRONMENT
from tests.support.readers import ONNX, require_onnx
from tests.unit.infer.graphs.models import KINDS
from tests.unit.interop.models import LLAMA, MIXTRAL
from tests.unit.interop.test_command import USAGE, _call, _json, _run_folder

SCRIPT = Path(__file__).parents[3] / "docs" / "examples" / "run_onnx.py"
TEXT = "def abc(he"


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [real_texts()[3][:3000], *HARD_TEXTS]
    monkeypatch.setattr(graph_folder, "real_texts", lambda: texts)


def short(config: ModelConfig) -> ModelConfig:
    """With as few layers as show every kind of them: a trace takes seconds for each."""
    layers = 2 if config.moe is not None and config.moe.every_n_layers > 1 else 1
    changed: dict[str, Any] = {"num_layers": layers}
    return config.with_keys(changed | ({"num_encoder_layers": layers} if config.family == "encoder_decoder" else {}))


def run_without_us(folder: Path, text: str) -> dict[str, Any]:
    """What docs/run_onnx.py prints, in a process that has neither llmtrain nor PyTorch."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not {'torch', 'llmtrain', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(SCRIPT), str(folder), text], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ONNX)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def products(folder: Path) -> tuple[int, int]:
    """How many products with a matrix have it in whole numbers, and how many not."""
    import onnx  # pyright: ignore[reportMissingImports]

    rounded = exact = 0
    for path in folder.glob("*.onnx"):
        graph = onnx.load(str(path)).graph
        weights = {weight.name for weight in graph.initializer}
        rounded += sum(node.op_type == "MatMulNBits" for node in graph.node)
        exact += sum(node.op_type in ("MatMul", "Gemm") and not weights.isdisjoint(node.input) for node in graph.node)
    return rounded, exact


def answered(run: Path) -> list[int]:
    """As `llmtrain generate` goes on with the text."""
    model = TextModel(find_checkpoint_model(run).read(torch.device("cpu")))
    return list(iter_tokens(model.model, model.request(model.continuation(TEXT), 32, Sampling(0.0))))


def test_a_decoder_in_onnxruntime(small_tokenizer, tmp_path):
    """The command, its record, no name of this machine in any file, and the script of the docs."""
    require_onnx()
    run, out = _run_folder(tmp_path / "run", short(LLAMA), small_tokenizer.path), tmp_path / "out"
    told = _json("export", run, out, "--to", "onnx")
    assert told["max_logit_difference"] <= 1e-4 and told["greedy_tokens_equal"] == 32
    assert told["best_equal"] == told["logit_positions_compared"] > 300
    assert {path.name for path in out.iterdir()} >= {"model.onnx", "onnx.json", "tokenizer.json", "README.md"}
    record = json.loads((out / "onnx.json").read_text("utf-8"))
    (graph,) = record["graphs"]
    assert graph["files"] == {"model.onnx": hashes(out)["model.onnx"]}
    assert [port["name"] for port in graph["inputs"]] == [
        "input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert graph["inputs"][1]["dims"] == ["batch", "total"] and graph["outputs"][1]["name"] == "present.0.key"
    assert record["proved"]["shapes"] == [[1, 7], [3, 1], [2, 12], [1, 1], [4, 64]]
    places = (str(tmp_path).encode(), str(SCRIPT.parents[1]).encode(), sys.prefix.encode())
    assert [path.name for path in out.iterdir() for place in places if place in path.read_bytes()] == []
    assert run_without_us(out, TEXT)["ids"] == answered(run)


def test_users_faults(small_tokenizer, tmp_path, monkeypatch):
    """What has no graph is refused by name, and nothing is written."""
    require_onnx()
    run = _run_folder(tmp_path / "run", short(LLAMA), small_tokenizer.path)
    choice = MIXTRAL.with_keys({"moe": MoeConfig(router="expert_choice", num_experts=4)})
    refused = _run_folder(tmp_path / "refused", choice, small_tokenizer.path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    out = tmp_path / "out"
    cases = [
        ((refused, out, "--to", "onnx"), "moe.router = expert_choice"),
        ((run, out, "--to", "onnx", "--dtype", "bfloat16"), "must be float32, float16, int8 or int4 with --to onnx"),
        ((run, out, "--to", "torch-export", "--dtype", "int8"), "must be float32, bfloat16 or float16"),
        ((run, out, "--dtype", "int4"), "must be float32, bfloat16 or float16"),
        ((run, tmp_path / "used", "--to", "onnx"), "exists already"),
        ((run, tmp_path / "used", "--to", "onnx", "--overwrite"), "has no onnx.json"),
        ((run, out, "--to", "onnx", "--tokenizer", tmp_path / "none.model"), "none.model"),
    ]
    for arguments, word in cases:
        result = _call("export", *arguments)
        assert (result.exit_code, result.stdout) == (USAGE, ""), (arguments, result.stderr)
        assert word in result.stderr and "Traceback" not in result.stderr, (arguments, result.stderr)
    monkeypatch.setattr(installation, "ONNX_PACKAGES", ("onnx", "onnx_that_is_not_there"))
    result = _call("export", run, out, "--to", "onnx")
    assert result.exit_code == USAGE and "pip install 'llmtrain[onnx]'" in result.stderr
    assert not out.exists() and not list(tmp_path.glob(".writing*"))


def test_a_file_that_onnxruntime_does_not_load(tmp_path):
    require_onnx()
    from llmtrain.interop.onnx_folder.sessions import OnnxSessions

    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a no graph")
    with pytest.raises(ExportError, match=r"onnxruntime .* does not load model\.onnx: .*Try another version"):
        OnnxSessions(tmp_path, [Graph("model", torch.nn.Identity(), (), ())])


@pytest.mark.whole_grid
def test_weights_beside_the_file(small_tokenizer, tmp_path, monkeypatch):
    """As those of models above 2 GB, in fp32 and rounded."""
    require_onnx()
    from llmtrain.interop.onnx_folder import writing

    run = _run_folder(tmp_path / "run", short(LLAMA), small_tokenizer.path)
    whole = _json("export", run, tmp_path / "whole", "--to", "onnx", "--dtype", "int8")
    assert {path.suffix for path in (tmp_path / "whole").iterdir()} == {".onnx", ".json", ".md"}
    monkeypatch.setattr(writing, "LARGEST_FILE", 10_000)
    for dtype in ("int8", "float32"):
        out = tmp_path / dtype
        told = _json("export", run, out, "--to", "onnx", "--dtype", dtype)
        files = json.loads((out / "onnx.json").read_text("utf-8"))["graphs"][0]["files"]
        assert files.keys() == {"model.onnx", "model.onnx.data"} and files.items() <= hashes(out).items()
        assert dtype != "int8" or told["max_logit_difference"] == whole["max_logit_difference"]
    assert run_without_us(out, TEXT)["ids"] == answered(run)


@pytest.mark.whole_grid
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_in_onnxruntime(name, small_tokenizer, tmp_path):
    require_onnx()
    run, out = _run_folder(tmp_path / "run", short(KINDS[name]), small_tokenizer.path), tmp_path / "out"
    told = _json("export", run, out, "--to", "onnx")
    writes = KINDS[name].family != "encoder" and not KINDS[name].predicts_labels
    assert told["max_logit_difference"] <= 1e-4 and told["greedy_tokens_equal"] == (32 if writes else 0)
    text = TEXT if writes or KINDS[name].predicts_labels else f"{TEXT}<mask>"
    said = run_without_us(out, text)
    if writes:
        assert said["ids"] == answered(run)
    else:
        assert said.keys() <= {"labels", "fillings", "start_logits", "end_logits"} and all(said.values())


@pytest.mark.whole_grid
@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "t5", "linear"])
@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_rounded_weights(name, precision, small_tokenizer, tmp_path):
    """They are near, and the same bytes when they are written again; a bound that they break leaves nothing."""
    require_onnx()
    run, out = _run_folder(tmp_path / "run", short(KINDS[name]), small_tokenizer.path), tmp_path / "out"
    told = _json("export", run, out, "--to", "onnx", "--dtype", precision, "--max-perplexity-increase", "0.5")
    bound = {"float16": 1e-4, "int8": 5e-3, "int4": 0.5}[precision]
    assert 0 < told["perplexity_increase"] < bound
    result = _call(
        "export", run, tmp_path / "no", "--to", "onnx", "--dtype", precision, "--max-perplexity-increase", "1e-12"
    )
    assert result.exit_code == 1 and "--max-perplexity-increase" in result.stderr and not (tmp_path / "no").exists()
    if precision != "float16":
        rounded, exact = products(out)
        assert rounded > 4 and exact == (1 if name == "mixtral" else 0), "a router's product alone stays exact"
    _json("export", run, tmp_path / "out2", "--to", "onnx", "--dtype", precision, "--max-perplexity-increase", "0.5")
    assert hashes(tmp_path / "out2") == hashes(out)


@pytest.mark.whole_grid
def test_the_same_bytes_twice(small_tokenizer, tmp_path):
    """In processes whose sets have other orders, and under names of folders that differ."""
    require_onnx()
    run = _run_folder(tmp_path / "run", short(LLAMA), small_tokenizer.path)
    for number in (1, 2):
        subprocess.run(
            [COMMAND, "export", str(run), str(tmp_path / f"out{number}"), "--to", "onnx"],
            env={**ENVIRONMENT, "PYTHONPATH": str(ONNX), "PYTHONHASHSEED": str(number)}, check=True, timeout=500,
        )  # fmt: skip
    assert hashes(tmp_path / "out1") == hashes(tmp_path / "out2")


@pytest.mark.whole_grid
@pytest.mark.parametrize("name", ["llama", "alibi", "bigbird", "linear", "mixtral", "bert", "bert answers", "t5"])
def test_programs_of_torch_export(name, small_tokenizer, tmp_path):
    """Read again, in a process without llmtrain too; nothing in them names this machine."""
    run, out = _run_folder(tmp_path / "run", short(KINDS[name]), small_tokenizer.path), tmp_path / "out"
    told = _json("export", run, out, "--to", "torch-export")
    assert told["max_logit_difference"] <= 1e-4
    assert {path.suffix for path in out.iterdir()} == {".pt2", ".json", ".md"}
    places = (str(tmp_path).encode(), str(SCRIPT.parents[1]).encode())
    assert [path.name for path in out.iterdir() for place in places if place in path.read_bytes()] == []
    _json("export", run, tmp_path / "again", "--to", "torch-export")
    assert hashes(tmp_path / "again") == hashes(out)

"""`llmtrain export` and `llmtrain import` as a user calls them, in this process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmtrain.checkpoint.fragments import Fragment
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.cli.app import app
from llmtrain.config.load import load_config
from llmtrain.config.model import ModelConfig
from llmtrain.config.rendering import to_yaml
from llmtrain.infer.model import find_checkpoint, load_checkpoint
from tests.support.samples import tiny_run
from tests.unit.interop.models import GPT2, LLAMA, SCALING, logits, random_model

CPU = torch.device("cpu")
DAMAGED, USAGE = 3, 2


def _run_folder(path: Path, config: ModelConfig, tokenizer: Path) -> Path:
    """A run with one checkpoint of a random model."""
    contents = Contents(
        40, {"train": {"step": 40, "samples": 160, "tokens": 5120}, "engine": {}}, to_yaml(tiny_run(config)), {}
    )
    unfinished = start_checkpoint(path / "checkpoints", 40)
    parameters = random_model(config).named_parameters()
    part = write_rank_files(unfinished, 0, [Fragment.whole(name, "master", p.detach()) for name, p in parameters])
    publish(unfinished, [part], contents, lambda: None)
    shutil.copyfile(tokenizer, path / tokenizer.name)
    return path


def _call(*arguments: str | Path):
    return CliRunner().invoke(app, [*map(str, arguments)])


def _json(*arguments: str | Path) -> dict:
    result = _call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "config", [GPT2, LLAMA.model_copy(update={"rope_scaling": SCALING})], ids=["gpt2", "llama scaled"]
)
def test_export_import_and_export_again(config, small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", config, small_tokenizer.path)
    told = _json("export", run, tmp_path / "hf", "--to", "hf", "--max-shard-size", "100KB")
    assert told["max_logit_difference"] <= 1e-4 and told["greedy_tokens_equal"] == 32
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert "| Training steps | 40 |" in card and "| Training tokens | 5,120 |" in card and str(tmp_path) not in card

    told = _json("import", tmp_path / "hf", tmp_path / "back")
    original, back = load_checkpoint(run, CPU), load_checkpoint(tmp_path / "back", CPU)
    assert Path(told["checkpoint"]) == find_checkpoint(tmp_path / "back").path
    assert all(
        torch.equal(one, other) for one, other in zip(original.model.parameters(), back.model.parameters(), strict=True)
    )
    assert open_checkpoint(Path(told["checkpoint"])).state == {}
    text = "def export(self):\n\treturn '<s>'"
    assert back.tokenizer().encode(text) == original.tokenizer().encode(text)
    assert back.tokenizer().eos_id == original.tokenizer().eos_id

    _json("export", told["checkpoint"], tmp_path / "again")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again", local_files_only=True, dtype=torch.float32)
    tokens_BS = torch.randint(307, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (theirs(tokens_BS).logits - logits(original.model, tokens_BS)).abs().max() <= 1e-4


def test_an_imported_config_is_a_base_for_a_run(small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", GPT2, small_tokenizer.path)
    _json("export", run, tmp_path / "hf")
    _json("import", tmp_path / "hf", tmp_path / "imported")
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: imported/config.yaml\nname: more\ndata: {train: [{path: shards}], seq_len: 64}\ntrain: {steps: 5}\n"
    )
    loaded = load_config(file).config.model
    assert loaded.ffn_size == GPT2.ffn_size and loaded.norm_eps == GPT2.norm_eps and loaded.dropout == GPT2.dropout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(dtype, small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", LLAMA, small_tokenizer.path)
    told = _json("export", run, tmp_path / "hf", "--dtype", dtype)
    assert told["max_logit_difference"] <= 1e-4
    sizes = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert sizes < 0.6 * sum(path.stat().st_size for path in run.glob("checkpoints/*/*.safetensors"))


def test_lines_for_people(small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", LLAMA, small_tokenizer.path)
    result = _call("export", run, tmp_path / "hf")
    assert result.exit_code == 0
    assert f"folder: {tmp_path / 'hf'}" in result.stdout and "greedy tokens equal: 32" in result.stdout


def test_users_faults_end_with_a_message_and_their_exit_code(small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", LLAMA, small_tokenizer.path)
    unfit = LLAMA.model_copy(update={"position": "sinusoidal", "activation": "reglu"})
    foreign = _run_folder(tmp_path / "foreign", unfit, small_tokenizer.path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    alone = tmp_path / "alone"
    shutil.copytree(run / "checkpoints", alone / "checkpoints")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    out = tmp_path / "out"
    cases = [
        (("export", tmp_path / "nowhere", out), "nowhere"),
        (("export", run, out, "--max-shard-size", "many"), "--max-shard-size"),
        (("export", run, tmp_path / "used"), "exists already"),
        (("export", foreign, out), "position = sinusoidal"),
        (("export", alone, out), "--tokenizer"),
        (("import", tmp_path / "nowhere", out), "config.json"),
        (("import", pickled, out), "pickles"),
        (("import", pickled, tmp_path / "used"), "exists already"),
    ]
    for arguments, word in cases:
        result = _call(*arguments)
        assert (result.exit_code, result.stdout) == (USAGE, ""), arguments
        assert word in result.stderr and "Traceback" not in result.stderr
    assert not out.exists() and not list(tmp_path.glob(".writing*"))


def test_damage_has_its_exit_code(small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", LLAMA, small_tokenizer.path)
    _json("export", run, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    result = _call("import", tmp_path / "hf", tmp_path / "out")
    assert result.exit_code == DAMAGED and "model.safetensors" in result.stderr
    file = next(run.glob("checkpoints/*/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    result = _call("export", run, tmp_path / "out")
    assert result.exit_code == DAMAGED and not (tmp_path / "out").exists()

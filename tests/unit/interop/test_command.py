"""`llmtrain export`, `llmtrain import` and `llmtrain generate` as a user calls them, in this process."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from tokenizers import AddedToken, Tokenizer, processors
from typer.testing import CliRunner

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.cli.app import app
from llmtrain.config.model import ModelConfig, MoeConfig
from llmtrain.config.reading.load import load_config
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.infer.model import find_checkpoint_model, logits_of
from llmtrain.interop.proof import load_theirs, their_inputs
from llmtrain.interop.text.tokenizer_json import convert
from llmtrain.values.fragment import Box, Fragment
from tests.support.samples import tiny_run
from tests.unit.interop.models import (
    BERT,
    GPT2,
    LLAMA,
    MIXTRAL,
    SCALING,
    SWITCH,
    T5,
    random_example,
    random_model,
)

CPU = torch.device("cpu")
DAMAGED, USAGE = 3, 2


def _fragments(model: torch.nn.Module) -> Iterator[Fragment]:
    """Every matrix in two pieces and stacked experts one by one, as ranks of some layout would save them."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        size = 1 if tensor.dim() == 3 else max(1, len(tensor) // 2)
        for start, piece in zip(range(0, len(tensor), size), tensor.split(size), strict=True):
            box = Box((start, *[0] * (tensor.dim() - 1)), tuple(piece.shape))
            yield Fragment(name, "master", tuple(tensor.shape), box, piece)


def _run_folder(path: Path, config: ModelConfig, tokenizer: Path, data: dict[str, Any] | None = None) -> Path:
    """A run with one checkpoint of a random model, whose tensors lie in pieces."""
    run = tiny_run(config)
    run = run.with_keys({"data": run.data.with_keys(data or {})})
    state = {"train": {"step": 40, "samples": 160, "tokens": 5120}, "engine": {}}
    unfinished = start_checkpoint(path / "checkpoints", 40)
    part = write_rank_files(unfinished, 0, _fragments(random_model(config)))
    publish(unfinished, [part], Contents(40, state, to_yaml(run), {}), lambda: None)
    shutil.copyfile(tokenizer, path / tokenizer.name)
    return path


def _call(*arguments: str | Path):
    return CliRunner().invoke(app, [*map(str, arguments)])


def _json(*arguments: str | Path) -> dict:
    result = _call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "config",
    [LLAMA.with_keys({"rope_scaling": SCALING}), MIXTRAL, BERT, SWITCH],
    ids=["llama scaled", "mixtral", "bert", "switch"],
)
def test_export_import_and_export_again(config, small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", config, small_tokenizer.path)
    told = _json("export", run, tmp_path / "hf", "--to", "hf", "--max-shard-size", "100KB")
    assert told["max_logit_difference"] <= 1e-4 and told["greedy_tokens_equal"] > 20
    assert told["proof"] == "the whole model"
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert "| Training steps | 40 |" in card and "| Training tokens | 5,120 |" in card and str(tmp_path) not in card

    told = _json("import", tmp_path / "hf", tmp_path / "back")
    original, back = find_checkpoint_model(run).read(CPU), find_checkpoint_model(tmp_path / "back").read(CPU)
    beside = (tmp_path / "hf" / "tokenizer.model").exists()
    assert told["notes"] == (["not kept: tokenizer.model"] if beside else [])
    assert Path(told["checkpoint"]) == find_checkpoint(tmp_path / "back").path
    assert all(
        torch.equal(one, other) for one, other in zip(original.model.parameters(), back.model.parameters(), strict=True)
    )
    assert open_checkpoint(Path(told["checkpoint"])).state == {}
    text = "def export(self):\n\treturn '<s>'"
    assert back.tokenizer().encode(text) == original.tokenizer().encode(text)
    assert back.tokenizer().eos_id == original.tokenizer().eos_id

    told = _json("export", told["checkpoint"], tmp_path / "again", "--proof", "layers")
    assert told["proof"] != "the whole model"
    theirs, example = load_theirs(tmp_path / "again", config), random_example(config)
    with torch.no_grad():
        apart_BS = (theirs(**their_inputs(example)).logits - logits_of(original.model, example)).abs().amax(-1)
    assert float((apart_BS if example.valid_BS is None else apart_BS[example.valid_BS]).max()) <= 1e-4


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


def _t5_folder(path: Path, tokenizer: Path) -> Path:
    """An export of a T5 whose tokenizer.json has its sentinels in falling order, as T5's own has."""
    converted = convert(tokenizer)
    first = converted.get_vocab_size(with_added_tokens=True)
    names = [f"<extra_id_{number}>" for number in reversed(range(3))]
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    converted.save(str(path / "tokenizer.json"))
    config = T5.with_keys({"vocab_size": first + 3})
    _run_folder(path / "run", config, path / "tokenizer.json")
    _json("export", path / "run", path / "hf")
    return path / "hf"


def test_an_imported_config_says_what_to_train_on_and_with_which_special_tokens(small_tokenizer, tmp_path):
    first = small_tokenizer.vocab_size
    _json("import", _t5_folder(tmp_path, small_tokenizer.path), tmp_path / "t5")
    data = YAML(typ="safe", pure=True).load(tmp_path / "t5" / "config.yaml")["data"]
    assert data["objective"] == "span_corruption"
    assert data["special_tokens"] == {"pad": 0, "sentinels": [first + 2, first + 1, first]}
    file = tmp_path / "run.yaml"
    file.write_text("base: t5/config.yaml\nname: more\ndata: {train: [{path: x}], seq_len: 32}\ntrain: {steps: 5}\n")
    assert load_config(file).config.data.special_tokens.sentinels == (first + 2, first + 1, first)
    _json("export", _run_folder(tmp_path / "run-bert", BERT, small_tokenizer.path), tmp_path / "hf-bert")
    _json("import", tmp_path / "hf-bert", tmp_path / "bert")
    data = YAML(typ="safe", pure=True).load(tmp_path / "bert" / "config.yaml")["data"]
    assert data["objective"] == "masked" and data["special_tokens"]["mask"] == small_tokenizer.mask_id


def test_an_encoder_decoder_answers_a_prompt_with_sentinels(small_tokenizer, tmp_path):
    told = _json("import", _t5_folder(tmp_path, small_tokenizer.path), tmp_path / "t5")
    for source in (tmp_path / "hf", tmp_path / "t5", told["checkpoint"]):
        result = _call("generate", source, "--prompt", "a <extra_id_0> b", "--temperature", "0", "--max-tokens", "5")
        assert result.exit_code == 0, result.stderr


def test_an_encoder_fills_masks(small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", BERT, small_tokenizer.path)
    result = _call("generate", run, "--prompt", "a <mask> b<mask>", "--top-k", "3")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("<mask>")] == ["<mask> 1", "<mask> 2"] and len(lines) == 8
    chances = [float(line.split()[0]) for line in lines[1:4]]
    assert chances == sorted(chances, reverse=True) and all(0 < chance < 1 for chance in chances)
    result = _call("generate", run, "--prompt", "a b")
    assert result.exit_code == USAGE and "Put <mask> where" in result.stderr


def test_a_text_for_berts_tokenizer_is_put_between_its_special_tokens(small_tokenizer, tmp_path):
    from llmtrain.interop.text.special_tokens import named_tokens

    converted: Tokenizer = convert(small_tokenizer.path)
    ids = [("<cls>", converted.token_to_id("<cls>")), ("<sep>", converted.token_to_id("<sep>"))]
    converted.post_processor = processors.TemplateProcessing("<cls> $A <sep>", special_tokens=ids)
    converted.save(str(tmp_path / "tokenizer.json"))
    named = named_tokens(load_tokenizer(tmp_path / "tokenizer.json"))
    assert named.around == ((ids[0][1],), (ids[1][1],))
    assert named_tokens(small_tokenizer).around == ((), ())


def test_biases_of_routers_are_read_and_have_no_place_in_an_export(small_tokenizer, tmp_path):
    config = MIXTRAL.with_keys({"moe": MoeConfig(num_experts=5, top_k=2, bias_update_rate=0.5)})
    model, path = random_model(config), tmp_path / "run"
    steps_E = torch.tensor([3.0, -2.0, 0.0, 0.0, 1.0])
    biases = [Fragment.whole(f"decoder.layers.{n}.moe.router.bias", "buffer", steps_E * n) for n in range(2)]
    unfinished = start_checkpoint(path / "checkpoints", 1)
    part = write_rank_files(unfinished, 0, [*_fragments(model), *biases])
    publish(unfinished, [part], Contents(1, {}, to_yaml(tiny_run(config)), {}), lambda: None)
    shutil.copyfile(small_tokenizer.path, path / "tokenizer.model")
    loaded = find_checkpoint_model(path).read(CPU).model
    assert loaded.decoder is not None and loaded.decoder.layers["1"].moe is not None
    assert loaded.decoder.layers["1"].moe.router.bias_E.tolist() == [1.5, -1.0, 0.0, 0.0, 0.5]
    example = random_example(config)
    assert not torch.equal(logits_of(loaded, example), logits_of(model, example)), "other experts are chosen"
    result = _call("export", path, tmp_path / "out")
    assert result.exit_code == USAGE and "moe.bias_update_rate = 0.5, Mixtral has 0.0" in result.stderr


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
    unfit = LLAMA.with_keys({"position": "sinusoidal", "activation": "reglu"})
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
        (("export", run, out, "--proof-memory", "0"), "--proof-memory"),
        (("export", run, out, "--family", "gpt2"), "position = rope, GPT-2 has learned"),
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

"""An export reloads in transformers with the same logits; what is not the same model is caught."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.errors import ConfigError, ExportError
from llmtrain.interop import gpt2
from llmtrain.interop.hf import FAMILIES
from llmtrain.interop.hf_export import INDEX, WEIGHTS, ExportSettings, write_export
from llmtrain.interop.name_table import Shape
from tests.unit.interop.models import GPT2, LLAMA, MODELS, logits, random_model, weights_of


@pytest.mark.parametrize("name", MODELS)
def test_reloads_with_equal_logits_and_greedy_tokens(name, small_tokenizer, tmp_path):
    config = MODELS[name]
    model = random_model(config)
    out = tmp_path / "out"
    proof = write_export(out, config, weights_of(model), small_tokenizer, ExportSettings())
    assert proof.max_difference <= 1e-4 and proof.num_greedy_tokens == 32
    theirs = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype=torch.float32)
    assert sum(tensor.numel() for tensor in theirs.parameters()) < sum(
        tensor.numel() for tensor in model.parameters()
    ), "the rows that pad 307 to 384 are not exported"
    tokens_BS = torch.randint(307, (3, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (theirs(tokens_BS).logits - logits(model, tokens_BS)).abs().max() <= 1e-4
    prompt_BS = tokens_BS[:1, :20]
    generated_BS = theirs.generate(prompt_BS, do_sample=False, max_new_tokens=32, eos_token_id=-1, pad_token_id=0)
    expected_BS = prompt_BS
    for _ in range(32):
        expected_BS = torch.cat((expected_BS, logits(model, expected_BS)[:, -1:].argmax(-1)), dim=1)
    assert generated_BS.tolist() == expected_BS.tolist()


def test_the_folder_is_complete_and_names_no_path(small_tokenizer, tmp_path):
    out = tmp_path / "tiny"
    facts = {"Training steps": "40"}
    write_export(out, LLAMA, weights_of(random_model(LLAMA)), small_tokenizer, ExportSettings(facts=facts))
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    card = (out / "README.md").read_text("utf-8")
    assert "| Training steps | 40 |" in card and "32 greedy tokens are equal" in card
    for path in out.glob("*.[jm]*"):
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"], "the temporary folder is gone"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "whoever may read one file may read all"
    assert AutoTokenizer.from_pretrained(out, local_files_only=True).eos_token_id == small_tokenizer.eos_id


def test_the_lines_of_the_model_card_run(small_tokenizer, tmp_path, monkeypatch, capsys):
    write_export(tmp_path / "tiny", LLAMA, weights_of(random_model(LLAMA)), small_tokenizer, ExportSettings())
    card = (tmp_path / "tiny" / "README.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], {})  # noqa: S102 (our own lines, shown to users)
    assert capsys.readouterr().out.startswith("def mai")


def test_shards_and_their_index(small_tokenizer, tmp_path):
    model = random_model(LLAMA)
    out = tmp_path / "out"
    write_export(out, LLAMA, weights_of(model), small_tokenizer, ExportSettings(max_shard_bytes=60_000))
    assert not (out / WEIGHTS).exists()
    index = json.loads((out / INDEX).read_text("utf-8"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 60_000 or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_proved_on_the_rounded_weights(dtype, small_tokenizer, tmp_path):
    model = random_model(GPT2)
    settings = ExportSettings(dtype=dtype)
    with pytest.raises(ExportError, match="other logits"):
        write_export(tmp_path / "unrounded", GPT2, weights_of(model), small_tokenizer, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    write_export(tmp_path / "out", GPT2, weights_of(model), small_tokenizer, settings)
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as opened:
        assert {str(opened.get_tensor(name).dtype) for name in opened.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["dtype"] == dtype


def _swapped(model, one: str, other: str):
    tensors = dict(model.named_parameters())
    return {one: tensors[other], other: tensors[one]}


def _layer(name: str) -> str:
    return f"decoder.layers.1.{name}.weight"


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("fault", ["k and v swapped", "a matrix transposed", "a layer swapped", "a norm left at one"])
def test_a_wrong_tensor_is_caught_and_nothing_is_left(config, fault, small_tokenizer, tmp_path):
    model = random_model(config)
    tensors = dict(model.named_parameters())
    changed = {
        "k and v swapped": _swapped(model, _layer("attention.k"), _layer("attention.v")),
        "a matrix transposed": {_layer("attention.out"): tensors[_layer("attention.out")].T},
        "a layer swapped": _swapped(model, _layer("mlp.up"), "decoder.layers.0.mlp.up.weight"),
        "a norm left at one": {_layer("mlp_norm"): torch.ones(48)},
    }[fault]
    with pytest.raises(ExportError, match="other logits"):
        write_export(tmp_path / "out", config, weights_of(model, changed), small_tokenizer, ExportSettings())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["mlp.up", "mlp.down", "attention.out"])
def test_a_missing_transpose_in_the_table_is_caught(module, small_tokenizer, tmp_path, monkeypatch):
    square = GPT2.model_copy(update={"ffn_hidden_size": 48})
    table = [replace(row, shape=Shape.SAME) if str(row.ours).endswith(module) else row for row in gpt2.TABLE]
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], table=table))
    with pytest.raises(ExportError, match="other logits"):
        write_export(tmp_path / "out", square, weights_of(random_model(square)), small_tokenizer, ExportSettings())
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_caught(small_tokenizer, tmp_path):
    small = LLAMA.model_copy(update={"vocab_size": 200})
    with pytest.raises(ExportError, match="another tokenizer"):
        write_export(tmp_path / "out", small, weights_of(random_model(small)), small_tokenizer, ExportSettings())


def test_an_earlier_export_is_replaced_only_when_asked_and_only_by_a_proved_one(small_tokenizer, tmp_path):
    first, second = random_model(GPT2, seed=1), random_model(GPT2, seed=2)
    out, again = tmp_path / "out", ExportSettings(overwrite=True)
    write_export(out, GPT2, weights_of(first), small_tokenizer, ExportSettings())
    before = (out / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        write_export(out, GPT2, weights_of(second), small_tokenizer, ExportSettings())
    wrong = _swapped(second, _layer("attention.k"), _layer("attention.v"))
    with pytest.raises(ExportError, match="other logits"):
        write_export(out, GPT2, weights_of(second, wrong), small_tokenizer, again)
    assert (out / WEIGHTS).read_bytes() == before
    write_export(out, GPT2, weights_of(second), small_tokenizer, again)
    assert (out / WEIGHTS).read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match="is no export"):
        write_export(out, GPT2, weights_of(second), small_tokenizer, again)


def test_a_folder_that_exists_is_not_touched(small_tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        write_export(tmp_path / "out", GPT2, weights_of(random_model(GPT2)), small_tokenizer, ExportSettings())
    assert (tmp_path / "out" / "precious").read_text() == "x"

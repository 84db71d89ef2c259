"""An export reloads in transformers with the same logits; what is not the same model is caught."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.config.parameters import num_parameters
from llmtrain.data.tokenizer import HuggingFaceTokenizer
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.model import logits_of
from llmtrain.interop import hf_export
from llmtrain.interop.families import gpt2
from llmtrain.interop.folder_files import INDEX, WEIGHTS
from llmtrain.interop.hf import FAMILIES, family_for
from llmtrain.interop.hf_export import ExportSettings, write_export
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.name_table import Shape
from llmtrain.interop.proof import load_theirs, their_inputs
from llmtrain.interop.text.special_tokens import named_tokens
from tests.unit.interop.models import (
    BERT,
    GPT2,
    LLAMA,
    MIXTRAL,
    MODELS,
    SWITCH,
    T5,
    T5_V11,
    model_for,
    random_example,
    random_export,
    random_model,
    weights_of,
)


@pytest.mark.parametrize("name", MODELS)
def test_reloads_with_equal_logits_and_comes_back_bit_for_bit(name, small_tokenizer, tmp_path):
    config = MODELS[name]
    model = random_model(config)
    out = tmp_path / "out"
    proof = write_export(out, model_for(config, small_tokenizer), weights_of(model), ExportSettings(proof="full")).proof
    assert proof.max_difference <= 1e-4 and proof.num_parts == 1
    assert proof.num_greedy_tokens == 32 if config.family != "encoder" else proof.num_greedy_tokens > 20
    theirs = load_theirs(out, config)
    assert theirs.num_parameters() >= num_parameters(config), "no rows that pad 307 to 384"
    example = random_example(config)
    with torch.no_grad():
        apart_BS = (theirs(**their_inputs(example)).logits - logits_of(model, example)).abs().amax(-1)
    assert float((apart_BS if example.valid_BS is None else apart_BS[example.valid_BS]).max()) <= 1e-4

    folder = open_hf_folder(out)
    assert folder.notes == [] and folder.family is family_for(config)
    for key, parameter in model.named_parameters():
        assert torch.equal(folder.tensor(key), parameter), key


@pytest.mark.parametrize("config", [LLAMA, BERT, T5_V11, SWITCH, MIXTRAL], ids=lambda config: config.family)
def test_layers_are_proved_some_at_a_time(config, small_tokenizer, tmp_path):
    settings = ExportSettings(proof_bytes=1, max_shard_bytes=100_000)
    proof = write_export(tmp_path / "out", *random_export(config, small_tokenizer), settings).proof
    period = config.moe.every_n_layers if config.moe else 1
    assert proof.num_parts == max(config.encoder_layers, config.decoder_layers) // period
    assert proof.max_difference <= 1e-4 and proof.num_greedy_tokens > 20 * proof.num_parts
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"in {proof.num_parts} parts" in card and not (tmp_path / "out" / "part").exists()


def test_the_folder_is_complete_and_names_no_path(small_tokenizer, tmp_path):
    out = tmp_path / "tiny"
    facts = {"Training steps": "40"}
    write_export(out, model_for(LLAMA, small_tokenizer, facts=facts), weights_of(random_model(LLAMA)), ExportSettings())
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "README.md",
        "llmtrain.json",
    }
    card = (out / "README.md").read_text("utf-8")
    assert "| Training steps | 40 |" in card and "32 greedy tokens are equal" in card
    for path in out.glob("*.[jm]*"):
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"], "the temporary folder is gone"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "whoever may read one file may read all"
    assert AutoTokenizer.from_pretrained(out, local_files_only=True).eos_token_id == small_tokenizer.eos_id


@pytest.mark.parametrize(("config", "start"), [(LLAMA, "def mai"), (BERT, ""), (T5, "<pad>")])
def test_the_lines_of_the_model_card_run(config, start, small_tokenizer, tmp_path, monkeypatch, capsys):
    first = small_tokenizer.vocab_size
    wider = config.with_keys({"vocab_size": first + 3})
    tokens = named_tokens(small_tokenizer, {"special_tokens": {"sentinels": [first, first + 1]}})
    trained = model_for(wider, small_tokenizer, tokens=tokens)
    write_export(tmp_path / "tiny", trained, weights_of(random_model(wider)), ExportSettings())
    card = (tmp_path / "tiny" / "README.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], {})  # noqa: S102 (our own lines, shown to users)
    assert capsys.readouterr().out.startswith(start)


def test_special_tokens_above_the_tokenizers_have_names_in_the_export(small_tokenizer, tmp_path):
    first = small_tokenizer.vocab_size
    config = T5.with_keys({"vocab_size": first + 100})
    named = named_tokens(small_tokenizer, {"special_tokens": {"sentinels": list(range(first, first + 100))}})
    trained = model_for(config, small_tokenizer, tokens=named)
    write_export(tmp_path / "out", trained, weights_of(random_model(config)), ExportSettings())
    exported = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert exported.encode("a<extra_id_0>b<extra_id_99>") == [
        *small_tokenizer.encode("a"), first, *small_tokenizer.encode("b"), first + 99, small_tokenizer.eos_id,
    ]  # fmt: skip
    gap = named_tokens(small_tokenizer, {"special_tokens": {"sentinels": [first + 1]}})
    with pytest.raises(ExportError, match=f"<extra_id_0> has the id {first + 1}"):
        wrong = model_for(config, small_tokenizer, tokens=gap)
        write_export(tmp_path / "gap", wrong, weights_of(random_model(config)), ExportSettings())


def test_berts_own_kind_of_tokenizer_is_exported(tmp_path):
    """WordPiece and lower case."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained = tokenizers.BertWordPieceTokenizer()
    trained.train_from_iterator(["some words and letters = ( ) abc", *"abcdefghijklmnopqrstuvwxyz"], vocab_size=200)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    config = BERT.with_keys({"vocab_size": tokenizer.vocab_size})
    write_export(tmp_path / "out", *random_export(config, tokenizer), ExportSettings())
    exported = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    roles = (exported.pad_token, exported.unk_token, exported.cls_token, exported.sep_token, exported.mask_token)
    assert roles == tuple(special)
    assert exported.encode("Words [MASK]") == [*tokenizer.encode("words"), tokenizer.mask_id]


def test_only_tokens_of_training_can_be_spelled(small_tokenizer, tmp_path):
    """A mask in an encoder's text; in a decoder's, none that it never saw, and no beginning of text anywhere."""
    for config, spelled in ((BERT, True), (LLAMA, False), (T5, False)):
        out = tmp_path / config.family
        write_export(out, *random_export(config, small_tokenizer), ExportSettings())
        exported = AutoTokenizer.from_pretrained(out, local_files_only=True)
        assert exported.mask_token_id == (small_tokenizer.mask_id if spelled else None)
        assert (small_tokenizer.mask_id in exported.encode("a <mask> b")) is spelled
        begin = [] if config.family == "encoder_decoder" else small_tokenizer.encode("<s><cls><sep>")
        assert exported.encode("<s><cls><sep>")[: len(begin)] == begin
        assert exported.bos_token_id == (small_tokenizer.eos_id if config is LLAMA else None)
        assert exported.encode("</s>")[0] == small_tokenizer.eos_id, "chat templates spell tokens"
        exported.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
        assert exported.convert_tokens_to_ids("<|im_start|>") in exported.encode("<|im_start|>user")


def test_shards_and_their_index(small_tokenizer, tmp_path):
    model = random_model(LLAMA)
    out = tmp_path / "out"
    write_export(out, model_for(LLAMA, small_tokenizer), weights_of(model), ExportSettings(max_shard_bytes=60_000))
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
        write_export(tmp_path / "unrounded", model_for(GPT2, small_tokenizer), weights_of(model), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    write_export(tmp_path / "out", model_for(GPT2, small_tokenizer), weights_of(model), settings)
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as opened:
        assert {str(opened.get_tensor(name).dtype) for name in opened.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["dtype"] == dtype


def _with_rows_swapped(monkeypatch: pytest.MonkeyPatch, kind: str, one: str, other: str) -> None:
    """Break a family's table: two of our modules change places."""
    family = FAMILIES[kind]
    rows = family.tables[0]
    (first,) = (row for row in rows if row.ours == one)
    (second,) = (row for row in rows if row.ours == other)
    swapped = {first: replace(first, ours=second.ours), second: replace(second, ours=first.ours)}
    table = tuple(swapped.get(row, row) for row in rows)
    monkeypatch.setitem(FAMILIES, kind, replace(family, tables=(table, *family.tables[1:])))


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("llama", "decoder.layers.{n}.attention.k", "decoder.layers.{n}.attention.v"),
        ("gpt2", "decoder.layers.{n}.attention_norm", "decoder.layers.{n}.mlp_norm"),
        ("qwen3", "decoder.layers.{n}.attention.q_norm", "decoder.layers.{n}.attention.k_norm"),
        ("mixtral", "decoder.layers.{n}.moe.experts.gate", "decoder.layers.{n}.moe.experts.up"),
        ("bert", "encoder.layers.{n}.attention_norm", "encoder.layers.{n}.mlp_norm"),
        ("t5", "encoder.position_bias", "decoder.position_bias"),
        ("t5 v1.1", "decoder.layers.{n}.cross_attention.k", "decoder.layers.{n}.cross_attention.v"),
        ("switch_transformers", "decoder.layers.{n}.cross_attention_norm", "decoder.layers.{n}.attention_norm"),
    ],
)
def test_a_table_with_two_rows_swapped_is_caught(name, one, other, small_tokenizer, tmp_path, monkeypatch):
    config = MODELS[name]
    if name == "t5 v1.1":
        family = FAMILIES["t5"]
        monkeypatch.setitem(FAMILIES, "t5", replace(family, tables=family.tables[::-1]))
    _with_rows_swapped(monkeypatch, name.split(" ")[0], one, other)
    for proof in ("full", "layers"):
        settings = ExportSettings(proof=proof)
        with pytest.raises(ExportError, match="other logits"):
            write_export(tmp_path / "out", *random_export(config, small_tokenizer), settings)
    assert list(tmp_path.iterdir()) == []


Change = Callable[[str, Tensor], Tensor]


def _write_other_tensors(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    original = hf_export.iter_theirs
    changed = lambda *args: ((name, change(name, tensor)) for name, tensor in original(*args))  # noqa: E731
    monkeypatch.setattr(hf_export, "iter_theirs", changed)


@pytest.mark.parametrize("proof", ["full", "layers"])
@pytest.mark.parametrize(
    ("name", "fault", "change"),
    [
        ("gpt2", "h.1.ln_2.weight", torch.ones_like),
        ("llama", "layers.1.self_attn.o_proj.weight", lambda tensor: tensor.T.contiguous()),
        ("mixtral", "layers.1.block_sparse_moe.experts.3.w2.weight", lambda tensor: -tensor),
        ("bert", "cls.predictions.bias", torch.zeros_like),
        ("switch_transformers", "encoder.block.3.layer.1.mlp.experts.expert_4.wi.weight", torch.zeros_like),
    ],
)
def test_one_wrong_tensor_is_caught_and_nothing_is_left(
    name, fault, change, proof, small_tokenizer, tmp_path, monkeypatch
):
    config, changed = MODELS[name], []

    def broken(key: str, tensor: Tensor) -> Tensor:
        changed.extend([key] * key.endswith(fault))
        return change(tensor) if key.endswith(fault) else tensor

    _write_other_tensors(monkeypatch, broken)
    settings = ExportSettings(proof=proof)
    with pytest.raises(ExportError, match="other logits"):
        write_export(tmp_path / "out", *random_export(config, small_tokenizer), settings)
    assert len(changed) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["mlp.up", "mlp.down", "attention.out"])
def test_a_missing_transpose_in_the_table_is_caught(module, small_tokenizer, tmp_path, monkeypatch):
    square = GPT2.with_keys({"ffn_hidden_size": 48})
    table = tuple(replace(row, shape=Shape.SAME) if str(row.ours).endswith(module) else row for row in gpt2.TABLE)
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], tables=(table,)))
    with pytest.raises(ExportError, match="other logits"):
        write_export(tmp_path / "out", *random_export(square, small_tokenizer), ExportSettings())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_unknown_tensor_is_caught(small_tokenizer, tmp_path, monkeypatch):
    original = hf_export.iter_theirs
    left_out = lambda *args: (pair for pair in original(*args) if "layers.1.mlp.up" not in pair[0])  # noqa: E731
    monkeypatch.setattr(hf_export, "iter_theirs", left_out)
    with pytest.raises(ExportError, match=r"missing_keys.*layers\.1\.mlp\.up_proj"):
        write_export(tmp_path / "out", *random_export(LLAMA, small_tokenizer), ExportSettings())


def test_a_tokenizer_of_another_model_is_caught(small_tokenizer, tmp_path):
    small = LLAMA.with_keys({"vocab_size": 200})
    with pytest.raises(ExportError, match="another tokenizer"):
        write_export(tmp_path / "out", *random_export(small, small_tokenizer), ExportSettings())


def test_settings_of_training_alone_are_told(small_tokenizer, tmp_path):
    config = LLAMA.with_keys({"dropout": 0.2})
    export = write_export(tmp_path / "out", *random_export(config, small_tokenizer), ExportSettings())
    assert export.notes == ["model.dropout = 0.2, Llama has 0.0"]
    assert "- model.dropout = 0.2" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_earlier_export_is_replaced_only_when_asked_and_only_by_a_proved_one(small_tokenizer, tmp_path, monkeypatch):
    first, second = random_model(GPT2, seed=1), random_model(GPT2, seed=2)
    out, again = tmp_path / "out", ExportSettings(overwrite=True)
    write_export(out, model_for(GPT2, small_tokenizer), weights_of(first), ExportSettings())
    before = (out / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        write_export(out, model_for(GPT2, small_tokenizer), weights_of(second), ExportSettings())
    with monkeypatch.context() as broken:
        _write_other_tensors(broken, lambda name, tensor: -tensor if name.endswith("ln_f.weight") else tensor)
        with pytest.raises(ExportError, match="other logits"):
            write_export(out, model_for(GPT2, small_tokenizer), weights_of(second), again)
    assert (out / WEIGHTS).read_bytes() == before
    write_export(out, model_for(GPT2, small_tokenizer), weights_of(second), again)
    assert (out / WEIGHTS).read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "llmtrain.json").rename(out / "notes.json")
    with pytest.raises(ConfigError, match="is no export to hf of llmtrain's"):
        write_export(out, model_for(GPT2, small_tokenizer), weights_of(second), again)
    (out / "notes.json").rename(out / "llmtrain.json")
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match="is no export to hf"):
        write_export(out, model_for(GPT2, small_tokenizer), weights_of(second), again)


def test_a_folder_that_exists_is_not_touched(small_tokenizer, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        write_export(tmp_path / "out", *random_export(GPT2, small_tokenizer), ExportSettings())
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_the_export_is_what_the_class_of_the_family_loads(small_tokenizer, tmp_path):
    """A model that two families express is written as the one that is asked for."""
    settings = ExportSettings(family="mistral")
    write_export(tmp_path / "out", *random_export(LLAMA, small_tokenizer), settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(loaded).__name__ == "MistralForCausalLM"

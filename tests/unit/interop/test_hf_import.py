"""Models that transformers wrote give the same logits here; damaged and foreign folders are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from llmtrain.errors import ConfigError, DataError
from llmtrain.infer.model import build_trained
from llmtrain.interop.hf_export import INDEX, WEIGHTS
from llmtrain.interop.hf_import import open_hf_folder
from tests.unit.interop.models import logits

_GPT2 = {"vocab_size": 307, "n_positions": 48, "n_embd": 40, "n_layer": 2, "n_head": 4}
_LLAMA = {
    "vocab_size": 307,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**_GPT2),
    "gpt2 untied": GPT2Config(**_GPT2, tie_word_embeddings=False, n_inner=56),
    "llama": LlamaConfig(**_LLAMA),
    "llama tied": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama scaled": LlamaConfig(**_LLAMA, rope_parameters=_SCALED),
    "llama head_dim and biases": LlamaConfig(**_LLAMA, head_dim=16, attention_bias=True, mlp_bias=True),
}


def _written(folder, config: PretrainedConfig, **options):
    """A random model of transformers, saved."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, **options)
    return model


def _assert_same_logits(folder, theirs) -> None:
    read = open_hf_folder(folder)
    ours = build_trained(read.model, read, torch.device("cpu"))
    tokens_BS = torch.randint(307, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (logits(ours, tokens_BS) - theirs(tokens_BS).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_gives_the_same_logits(name, tmp_path):
    _assert_same_logits(tmp_path, _written(tmp_path, CONFIGS[name]))


def test_reads_shards(tmp_path):
    theirs = _written(tmp_path, CONFIGS["llama"], max_shard_size="50KB")
    assert (tmp_path / INDEX).is_file()
    _assert_same_logits(tmp_path, theirs)


def test_reads_names_without_prefix_and_constants_of_old_versions(tmp_path):
    """As the first published GPT-2 is stored."""
    theirs = _written(tmp_path, CONFIGS["gpt2"])
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    save_file(tensors, tmp_path / WEIGHTS)
    _assert_same_logits(tmp_path, theirs)


def test_reads_lower_precision_as_fp32(tmp_path):
    _written(tmp_path, CONFIGS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32)
    _assert_same_logits(tmp_path, theirs)


def test_pickles_are_refused(tmp_path):
    _written(tmp_path, CONFIGS["gpt2"])
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*pickles.*save_pretrained"):
        open_hf_folder(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "integers"])
def test_weights_that_do_not_fit_are_refused(fault, tmp_path):
    _written(tmp_path, CONFIGS["llama"])
    tensors = load_file(tmp_path / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
        name = "model.layers.7.mlp.up_proj.weight"
    elif fault == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match=name):
        open_hf_folder(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    _written(tmp_path, CONFIGS["llama"])
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=WEIGHTS):
        open_hf_folder(tmp_path)


@pytest.mark.parametrize("weight_map", [{"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {}, ["x"], {"a": 3}])
def test_an_index_that_leaves_the_folder_is_refused(weight_map, tmp_path):
    _written(tmp_path, CONFIGS["llama"])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError, match="weight_map"):
        open_hf_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    _written(tmp_path, CONFIGS["llama"], max_shard_size="50KB")
    (tmp_path / "model-00001-of-00003.safetensors").unlink(missing_ok=True)
    first = min(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(DataError, match=first.name):
        open_hf_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"model_type": "mamba"}'])
def test_a_config_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((DataError, ConfigError), match=r"config\.json"):
        open_hf_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_hf_folder(tmp_path / "nowhere")

"""Configurations both ways, and refusals that say why."""

import pytest
from transformers import GPT2Config, LlamaConfig

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.interop.hf import SpecialTokens, family_for, hf_config, model_config, parse_config
from tests.unit.interop.models import GPT2, LLAMA, MODELS, SCALING

TOKENS = SpecialTokens(eos_id=3, bos_id=2, pad_id=0)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_through_json(name):
    model = MODELS[name]
    config = hf_config(model, TOKENS)
    assert config.model_type == name.split(" ")[0]
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (3, 2, 0)
    back = model_config(parse_config(config.to_dict(), "config.json"))
    # Sizes that followed from others are written out.
    explicit = {"num_kv_heads": model.kv_heads, "head_dim": model.head_size, "ffn_hidden_size": model.ffn_size}
    returned = {"num_kv_heads": back.kv_heads, "head_dim": back.head_size, "ffn_hidden_size": back.ffn_size}
    assert back.model_copy(update=returned) == model.model_copy(update=explicit)


def test_llama3_scaling_has_transformers_own_names():
    scaled = LLAMA.model_copy(update={"rope_scaling": SCALING, "rope_theta": 500.0})
    assert hf_config(scaled, TOKENS).rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }


def test_a_config_of_an_older_transformers_is_understood():
    old = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    }
    model = model_config(parse_config(old, "config.json"))
    assert model.rope_theta == 500000.0
    assert model.rope_scaling is not None and model.rope_scaling.original_max_seq_len == 1024


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "sinusoidal"}, ["position = sinusoidal"]),
        ({"activation": "reglu"}, ["activation = reglu"]),
        ({"norm_position": "post"}, ["norm_position = post"]),
        ({"position": "learned", "norm": "layernorm"}, ["position = learned", "norm = layernorm", "bias = false"]),
        ({"num_heads": 5, "head_dim": 8, "num_kv_heads": 5}, ["num_heads = 5"]),
    ],
)
def test_what_no_family_expresses_is_refused_with_every_reason(changes, words):
    model = LLAMA.model_copy(update=changes)
    with pytest.raises(ConfigError) as raised:
        family_for(model)
    for word in [*words, "GPT-2", "Llama"]:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(hidden_act="gelu", attention_bias=True), ["hidden_act gelu", "attention_bias and mlp_bias"]),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), ["linear"]),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True, activation_function="silu"), ["inverse_layer", "silu"]),
        (LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantization_config"]),
    ],
)
def test_what_we_cannot_express_is_refused_with_every_reason(config, words):
    with pytest.raises(ConfigError) as raised:
        model_config(config)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("content", [{}, {"model_type": "bert"}, {"model_type": "llama", "hidden_size": "wide"}])
def test_an_unknown_or_wrong_config_is_refused(content):
    with pytest.raises(ConfigError, match=r"config\.json"):
        parse_config(content, "config.json")


def test_published_configurations():
    """Sizes of GPT-2 and Llama as transformers' defaults have them."""
    gpt2, llama = model_config(GPT2Config()), model_config(LlamaConfig())
    assert (gpt2.num_layers, gpt2.hidden_size, gpt2.ffn_size, gpt2.max_seq_len) == (12, 768, 3072, 1024)
    assert (llama.num_layers, llama.hidden_size, llama.ffn_size, llama.norm_eps) == (32, 4096, 11008, 1e-6)
    assert isinstance(GPT2, ModelConfig) and family_for(gpt2).title == "GPT-2" and family_for(llama).title == "Llama"

"""Configurations both ways, and refusals that say why."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    SwitchTransformersConfig,
    T5Config,
)

from llmtrain.config.attention import ATTENTION_KINDS, AttentionConfig, RopeScaling
from llmtrain.config.model import ModelConfig, MoeConfig
from llmtrain.config.parameters import num_parameters
from llmtrain.config.reading.load import load_config
from llmtrain.errors import ConfigError
from llmtrain.interop.differences import effective_values
from llmtrain.interop.hf import (
    FAMILIES,
    family_for,
    hf_config,
    judged,
    model_config,
    not_taken_over,
    parse_config,
)
from llmtrain.interop.text.special_tokens import NamedTokens
from tests.configs.test_shipped_configs import MODELS as SHIPPED_MODELS
from tests.configs.test_shipped_configs import run_around
from tests.unit.interop.models import BERT, LLAMA, MIXTRAL, MODELS, SCALING, SWITCH, T5, T5_V11, scaled

TOKENS = NamedTokens(eos_id=3, bos_id=2, pad=("<pad>", 0))


def changed(model: ModelConfig, **changes: Any) -> ModelConfig:
    return model.with_keys(changes)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_through_json(name):
    model = MODELS[name]
    config: Any = hf_config(model, TOKENS)
    assert config.model_type == name.split(" ")[0]
    begin = 3 if model.family == "decoder" else None  # no training text had the beginning of text, 2
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (3, begin, 0)
    assert model.family != "encoder_decoder" or config.decoder_start_token_id == 0
    content = config.to_dict()
    back = model_config(parse_config(content, "config.json"))
    there, here = effective_values(back), effective_values(model)
    only_training = {"dropout", "attention_dropout", "moe.jitter", "moe.aux_loss_coeff", "moe.z_loss_coeff"}
    assert {key: value for key, value in there.items() if value != here[key]}.keys() <= only_training
    assert there.keys() == here.keys()
    assert not not_taken_over(content, config, back)


def test_llama3_scaling_has_transformers_own_names():
    model = changed(LLAMA, rope_scaling=SCALING, rope_theta=500.0)
    assert hf_config(model, TOKENS).rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }


def test_ntk_is_a_larger_base():
    config: Any = hf_config(scaled("ntk"), TOKENS)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(500.0 * 4 ** (12 / 10))}


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
    ("model", "words"),
    [
        (changed(LLAMA, position="sinusoidal"), ["position = sinusoidal, Llama has rope"]),
        (changed(LLAMA, activation="reglu"), ["activation = reglu, Llama has swiglu"]),
        (changed(LLAMA, norm_position="post"), ["norm_position = post, Llama has pre"]),
        (changed(LLAMA, position="learned", norm="layernorm"), ["position = learned", "norm = layernorm", "bias = "]),
        (changed(LLAMA, num_heads=5, head_dim=8, num_kv_heads=5, bias=True), ["num_heads = 5, in Llama"]),
        (changed(LLAMA, attention=AttentionConfig(kind="linear")), ["attention.kind = linear, Llama has full"]),
        (changed(LLAMA, attention=AttentionConfig(softcap=30.0)), ["attention.softcap = 30.0, Mistral has null"]),
        (changed(LLAMA, attention=AttentionConfig(sinks=True)), ["attention.sinks = true, Qwen3 has false"]),
        (changed(LLAMA, attention=AttentionConfig(scale=1.0)), ["attention.scale = 1.0, Llama has 0.288"]),
        (changed(LLAMA, scaled_head=True), ["scaled_head = true, Llama has false"]),
        (changed(LLAMA, qk_norm=True, bias=True), ["bias = true, Qwen3 has false"]),
        (changed(MIXTRAL, moe=MoeConfig(router="expert_choice")), ["moe.router = expert_choice, Mixtral has top_k"]),
        (changed(MIXTRAL, moe=MoeConfig(bias_update_rate=0.1)), ["moe.bias_update_rate = 0.1, Mixtral has 0.0"]),
        (changed(MIXTRAL, moe=MoeConfig(normalize_weights=False)), ["moe.normalize_weights = false"]),
        (changed(MIXTRAL, moe=MoeConfig(num_shared_experts=1)), ["moe.num_shared_experts = 1, Mixtral has 0"]),
        (changed(MIXTRAL, moe=MoeConfig(every_n_layers=2)), ["moe.every_n_layers = 2, Mixtral has 1"]),
        (changed(BERT, embedding_norm=False), ["embedding_norm = false, BERT has true"]),
        (changed(BERT, token_types=0), ["token_types = 0, BERT has 1"]),
        (changed(BERT, num_kv_heads=2), ["num_kv_heads = 2, BERT has 4"]),
        (changed(T5, attention=AttentionConfig()), ["attention.scale = 0.288", "T5 has 1.0"]),
        (changed(T5, tie_embeddings=False), ["scaled_head = true with model.tie_embeddings = false"]),
        (changed(T5_V11, activation="geglu", gelu_approximate="none"), ["activation = geglu, T5 has gelu"]),
        (changed(SWITCH, activation="geglu"), ["activation = geglu, Switch Transformers has gelu"]),
        (changed(SWITCH, moe=MoeConfig(top_k=2)), ["moe.router = top_k, Switch Transformers has switch"]),
        (changed(T5, moe=MoeConfig(router="switch", ffn_hidden_size=64)), ["moe.ffn_hidden_size = 64"]),
    ],
)
def test_what_no_family_expresses_is_refused_with_every_reason(model, words):
    with pytest.raises(ConfigError) as raised:
        family_for(model)
    for word in [*words, *(family.title for family in FAMILIES.values())]:
        assert word in str(raised.value)


@pytest.mark.parametrize("kind", [kind for kind in ATTENTION_KINDS if kind not in ("full", "sliding_window")])
def test_a_kind_that_no_family_has_is_a_reason_against_each(kind: str) -> None:
    with pytest.raises(ConfigError) as raised:
        family_for(
            changed(LLAMA, attention=AttentionConfig.model_validate({"kind": kind, **ATTENTION_KINDS[kind].small}))
        )
    for title in ("Llama", "Mistral", "Qwen3"):
        assert f"model.attention.kind = {kind}, {title} has full" in str(raised.value)


def test_a_kind_without_a_row_ends_an_export_with_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {kind: row for kind, row in ATTENTION_KINDS.items() if kind != "bigbird"}  # in its order afterwards
    monkeypatch.setattr("llmtrain.config.attention.ATTENTION_KINDS", left)
    with pytest.raises(ConfigError, match=r"model\.attention\.kind = bigbird: .*add its row"):
        family_for(changed(LLAMA, attention=AttentionConfig(kind="bigbird")))


@pytest.mark.parametrize(
    ("model", "notes"),
    [
        (changed(LLAMA, dropout=0.1), ["model.dropout = 0.1, Llama has 0.0"]),
        (changed(T5, dropout=0.1), ["model.attention_dropout = 0.0, T5 has 0.1"]),
        (
            changed(MIXTRAL, moe=MoeConfig(capacity_factor=1.25, z_loss_coeff=0.1)),
            ["model.moe.capacity_factor = 1.25, Mixtral has null", "model.moe.z_loss_coeff = 0.1, Mixtral has 0.0"],
        ),
    ],
)
def test_what_matters_in_training_alone_is_told(model, notes):
    assert judged(family_for(model), model) == ([], notes)


def test_a_family_can_be_asked_for():
    assert family_for(LLAMA).title == "Llama" and family_for(LLAMA, "mistral").title == "Mistral"
    with pytest.raises(ConfigError, match="qk_norm = false, Qwen3 has true"):
        family_for(LLAMA, "qwen3")
    with pytest.raises(ConfigError, match="--family llama4: must be one of gpt2, llama"):
        family_for(LLAMA, "llama4")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(hidden_act="gelu", attention_bias=True), ["hidden_act gelu", "attention_bias and mlp_bias"]),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), ["dynamic"]),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True, activation_function="silu"), ["inverse_layer", "silu"]),
        (LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantization_config"]),
        (Qwen3Config(use_sliding_window=True, max_window_layers=3), ["layer_types"]),
        (Qwen3Config(attention_bias=True), ["attention_bias"]),
        (BertConfig(position_embedding_type="relative_key", is_decoder=True), ["relative_key", "is_decoder"]),
        (T5Config(feed_forward_proj="gated-tanh"), ["feed_forward_proj gated-tanh"]),
        (SwitchTransformersConfig(router_bias=True, num_sparse_decoder_layers=6), ["router_bias", "sparse_step 4"]),
    ],
)
def test_what_we_cannot_express_is_refused_with_every_reason(config, words):
    with pytest.raises(ConfigError) as raised:
        model_config(config)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (GPT2Config(embd_pdrop=0.3), "embd_pdrop = 0.3"),
        (SwitchTransformersConfig(), "expert_capacity = 64"),
        (MixtralConfig(output_router_logits=True), "output_router_logits = True"),
    ],
)
def test_keys_that_are_not_taken_over_are_told(config, note):
    assert f"{note} is not taken over" in not_taken_over(config.to_dict(), config, model_config(config))


@pytest.mark.parametrize("content", [{}, {"model_type": "bloom"}, {"model_type": "llama", "hidden_size": "wide"}])
def test_an_unknown_or_wrong_config_is_refused(content):
    with pytest.raises(ConfigError, match=r"config\.json"):
        parse_config(content, "config.json")


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (GPT2Config(), 124.4),
        (LlamaConfig(), 6738.4),
        (MixtralConfig(), 46702.8),
        (Qwen3Config(num_hidden_layers=36, num_key_value_heads=8, intermediate_size=12288), 8190.7),
        (BertConfig(), 109.5),
        (T5Config(), 60.5),
        (T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_ff=1024, num_layers=8, num_heads=6), 77),
        (SwitchTransformersConfig(num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, d_ff=3072), 619.3),
    ],
)  # fmt: skip
def test_published_configurations_have_their_published_sizes(config, millions):
    """GPT-2, Llama 7B, Mixtral 8x7B, Qwen3 8B, BERT base (without pooler), T5 small, T5 v1.1 small, Switch base 8."""
    model = model_config(parse_config(config.to_dict() | {"tie_word_embeddings": _tied(config)}, "config.json"))
    assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)
    assert isinstance(model.rope_scaling, RopeScaling | None)


def _tied(config: Any) -> bool:
    return getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)


NOT_WRITTEN = {"switch-xxl-128": "its experts are gated, and transformers' class of Switch Transformers has none"}
"""Shipped architectures that no family expresses."""


@pytest.mark.parametrize("file", SHIPPED_MODELS, ids=lambda file: file.stem)
def test_shipped_architectures_can_be_exported(file: Path, tmp_path: Path) -> None:
    model = load_config(run_around(file, tmp_path)).config.model
    model = changed(model, vocab_size=model.vocab_size or 2048)
    if file.stem in NOT_WRITTEN:
        with pytest.raises(ConfigError, match="expresses this model"):
            family_for(model)
    else:
        assert judged(family_for(model), model)[0] == []


def test_a_width_that_no_layer_has_speaks_against_no_family() -> None:
    assert "ffn_hidden_size" not in effective_values(MIXTRAL)
    assert "ffn_hidden_size" in effective_values(LLAMA)
    assert "ffn_hidden_size" in effective_values(SWITCH), "every second layer has an MLP"
    narrow = changed(MIXTRAL, ffn_hidden_size=40, moe=MoeConfig(num_experts=5, top_k=2, ffn_hidden_size=24))
    assert family_for(narrow).title == "Mixtral"


@pytest.mark.parametrize(
    ("older", "named"),
    [
        ({"rope_theta": 1e4}, "rope_theta = 10000.0, but rope_parameters has 500000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.factor = 2.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type = 'yarn'"),
        ({"rope_theta": 5e5, "rope_scaling": None}, "rope_scaling.rope_type = 'default'"),
    ],
)
def test_a_folder_that_would_be_two_models_is_refused(older: dict[str, Any], named: str) -> None:
    newer = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    content = {"model_type": "llama", "rope_parameters": newer}
    parse_config({**content, "rope_theta": 5e5, "rope_scaling": newer}, "config.json")
    with pytest.raises(ConfigError, match=re.escape(named)):
        parse_config({**content, **older}, "config.json")

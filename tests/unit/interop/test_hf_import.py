"""Models that transformers wrote give the same logits, tokens and loss here; damaged folders are refused."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    SwitchTransformersConfig,
    T5Config,
)

from llmtrain.errors import ConfigError, DataError
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.model import build_trained, logits_of, segments_of
from llmtrain.interop.folder_files import INDEX, WEIGHTS
from llmtrain.interop.hf import FAMILIES
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.proof import AUTO_CLASSES, their_inputs
from llmtrain.models.head import Objective
from llmtrain.models.transformer import Transformer, counted_positions
from llmtrain.parallel.parts import VocabularyPart
from llmtrain.values.batch import IGNORED_LABEL, ModelInputs
from tests.unit.interop.models import random_example

_GPT2 = {"vocab_size": 307, "n_positions": 48, "n_embd": 40, "n_layer": 2, "n_head": 4}
_LLAMA: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
_BERT: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
_T5: dict[str, Any] = {
    "vocab_size": 307,
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 72,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 30,
    "n_positions": 48,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.3,
}
_SWITCH = {**_T5, "num_experts": 5, "expert_capacity": 48, "num_layers": 4, "num_decoder_layers": 4}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 300.0, "factor": 8.0, **more}


_ORIGINAL = {"original_max_position_embeddings": 16}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**_GPT2),
    "gpt2 untied": GPT2Config(**_GPT2, tie_word_embeddings=False, n_inner=56),
    "llama": LlamaConfig(**_LLAMA),
    "llama tied": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama scaled": LlamaConfig(
        **_LLAMA, rope_parameters=_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **_ORIGINAL)
    ),
    "llama linear": LlamaConfig(**_LLAMA, rope_parameters=_rope("linear")),
    "llama yarn": LlamaConfig(**_LLAMA, rope_parameters=_rope("yarn", **_ORIGINAL)),
    "llama yarn of DeepSeek": LlamaConfig(
        **_LLAMA, rope_parameters=_rope("yarn", mscale=0.7, mscale_all_dim=1.0, beta_fast=16.0, **_ORIGINAL)
    ),
    "llama head_dim and biases": LlamaConfig(**_LLAMA, head_dim=16, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_LLAMA, sliding_window=7),
    "mistral without a window": MistralConfig(**_LLAMA, sliding_window=None),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=16, tie_word_embeddings=True),
    "qwen3 window": Qwen3Config(**_LLAMA, head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "mixtral": MixtralConfig(**_LLAMA, num_local_experts=5, sliding_window=7),
    "mixtral top 3 tied": MixtralConfig(**_LLAMA, num_local_experts=5, num_experts_per_tok=3, tie_word_embeddings=True),
    "bert": BertConfig(**_BERT),
    "bert untied": BertConfig(**_BERT, tie_word_embeddings=False, hidden_act="gelu_new", type_vocab_size=1),
    "t5": T5Config(**_T5),
    "t5 v1.1": T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5 silu": T5Config(**_T5, feed_forward_proj="gated-silu"),
    "switch": SwitchTransformersConfig(**_SWITCH, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2),
    "switch untied": SwitchTransformersConfig(
        **_SWITCH, num_sparse_encoder_layers=4, num_sparse_decoder_layers=4, tie_word_embeddings=False
    ),
}


def _written(folder, config: PretrainedConfig, **options):
    """A random model of transformers, saved."""
    torch.manual_seed(3)
    model = AUTO_CLASSES[FAMILIES[config.model_type].stacks].from_config(config).eval()
    if config.model_type == "t5" and not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(307, 40) * 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if config.model_type == "switch_transformers" and not config.tie_word_embeddings:
        # llmtrain has one embedding for both stacks.
        model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight = [model.shared.weight] * 2
    if config.model_type == "bert" and not config.tie_word_embeddings:
        model.cls.predictions.bias.data.copy_(model.cls.predictions.decoder.bias)
    model.save_pretrained(folder, **options)
    return model


def _ours(folder) -> Transformer:
    read = open_hf_folder(folder)
    return build_trained(read.model, read, torch.device("cpu"))


@torch.no_grad()
def _assert_same_logits(folder, theirs) -> Transformer:
    ours = _ours(folder)
    example = random_example(ours.config)
    apart_BS = (logits_of(ours, example) - theirs(**their_inputs(example)).logits).abs().amax(-1)
    assert float((apart_BS if example.valid_BS is None else apart_BS[example.valid_BS]).max()) <= 1e-4
    return ours


@pytest.mark.parametrize("name", CONFIGS)
def test_gives_the_same_logits_and_greedy_tokens(name, tmp_path):
    theirs = _written(tmp_path, CONFIGS[name])
    ours = _assert_same_logits(tmp_path, theirs)
    if ours.config.family == "encoder":
        return
    prompt = [5, 17, 300, 41, 8]
    theirs.generation_config.eos_token_id = None
    generated = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0)[0].tolist()
    encodes = ours.config.family == "encoder_decoder"
    begin, source = ((0,), tuple(prompt)) if encodes else (tuple(prompt), ())
    ours_too = iter_tokens(ours, Request(begin, 24, Sampling(temperature=0), source=source))
    assert list(ours_too) == generated[len(begin) :]


def _loss(model: Transformer, inputs: ModelInputs, labels_BS: torch.Tensor) -> float:
    """The mean over the targets."""
    objective = Objective(1.0, 64, VocabularyPart(0, model.config.vocabulary))
    _, loss_sum = model.loss(model(inputs)[0], labels_BS, objective)
    return float(loss_sum) / int((labels_BS != IGNORED_LABEL).sum())


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["gpt2", "llama scaled", "mistral", "qwen3", "mixtral", "bert", "t5", "t5 v1.1", "switch"]
)
def test_the_loss_of_a_padded_batch_is_the_same(name, tmp_path):
    """Theirs shifts a decoder's labels itself; ours come shifted."""
    theirs = _written(tmp_path, CONFIGS[name])
    ours = _ours(tmp_path)
    example = random_example(ours.config)
    valid_BS = torch.arange(example.tokens_BS.shape[1]) < torch.tensor([20, 13, 6])[:, None]
    labels_BS = torch.roll(example.tokens_BS, -1, dims=1).masked_fill(~valid_BS, IGNORED_LABEL)
    inputs = ModelInputs(
        example.tokens_BS,
        counted_positions(example.tokens_BS),
        segments_of(valid_BS),
        encoder_tokens_BT=example.encoder_tokens_BT,
        encoder_segments_BT=segments_of(example.encoder_valid_BT),
    )
    given = their_inputs(example)
    given["decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask"] = valid_BS.long()
    their_labels = labels_BS
    if ours.config.family == "decoder":
        their_labels = torch.cat((example.tokens_BS[:, :1], labels_BS[:, :-1]), dim=1)
    loss = float(theirs(**given, labels=their_labels).loss)
    assert _loss(ours, inputs, labels_BS) == pytest.approx(loss, rel=1e-5)


def test_reads_shards(tmp_path):
    theirs = _written(tmp_path, CONFIGS["llama"], max_shard_size="50KB")
    assert (tmp_path / INDEX).is_file()
    _assert_same_logits(tmp_path, theirs)


def test_reads_stacked_experts_as_transformers_has_them_in_memory(tmp_path):
    theirs = _written(tmp_path, CONFIGS["mixtral"], save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / WEIGHTS)
    _assert_same_logits(tmp_path, theirs)


def test_reads_the_boxes_that_an_engine_asks_for(tmp_path):
    """Experts 1 to 3 and half of their rows, as a rank of expert and tensor parallel would."""
    from llmtrain.values.fragment import Box

    _written(tmp_path, CONFIGS["mixtral"])
    folder = open_hf_folder(tmp_path)
    name = "decoder.layers.1.moe.experts.up"
    part = folder.read(name, "master", Box((1, 36, 0), (3, 36, 40)))
    assert torch.equal(part, folder.tensor(name)[1:4, 36:]) and part.shape == (3, 36, 40)


def test_reads_what_a_model_for_pretraining_has_besides_and_old_names_of_norms(tmp_path):
    """As the first published BERT is stored."""
    theirs = BertForPreTraining(CONFIGS["bert"]).eval()
    theirs.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[old] = tensor
    tensors["bert.embeddings.position_ids"] = torch.arange(48)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    ours = _ours(tmp_path)
    example = random_example(ours.config)
    with torch.no_grad():
        expected = theirs(**their_inputs(example)).prediction_logits
        assert (logits_of(ours, example) - expected)[example.valid_BS].abs().max() <= 1e-4
    notes = open_hf_folder(tmp_path).notes
    assert [note.split(":")[0] for note in notes] == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    ]


def test_a_head_that_differs_is_not_tied_whatever_the_configuration_says(tmp_path):
    """As transformers loads it; so T5 v1.1 is stored by transformers itself."""
    theirs = _written(tmp_path, CONFIGS["t5 v1.1"])
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    folder = open_hf_folder(tmp_path)
    assert not folder.model.tie_embeddings and "lm_head.weight differs from shared.weight" in folder.notes[0]
    _assert_same_logits(tmp_path, theirs)


def test_copies_of_an_embedding_are_read_once_and_must_agree(tmp_path):
    theirs = _written(tmp_path, CONFIGS["t5"])
    tensors = load_file(tmp_path / WEIGHTS)
    shared = tensors.pop("shared.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    both = {"encoder.embed_tokens.weight": shared.clone(), "decoder.embed_tokens.weight": shared.clone()}
    save_file({**tensors, **both, "lm_head.weight": shared, unused: torch.ones(16, 4)}, tmp_path / WEIGHTS)
    ours = _assert_same_logits(tmp_path, theirs)
    assert ours.config.tie_embeddings and open_hf_folder(tmp_path).notes == [
        f"{unused}: not part of this model, left out"
    ]
    both["decoder.embed_tokens.weight"][3] += 1
    save_file({**tensors, **both}, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match=r"encoder\.embed_tokens\.weight and decoder\.embed_tokens\.weight differ"):
        open_hf_folder(tmp_path)


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

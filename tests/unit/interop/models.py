"""Tiny models of ours with random weights, as the families of Hugging Face know them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.attention import AttentionConfig, RopeScaling
from llmtrain.config.model import InitConfig, ModelConfig, MoeConfig
from llmtrain.infer.model import build_from, logits_of
from llmtrain.interop.examples import Example
from llmtrain.interop.exported_model import ExportedModel, TrainedWeights
from llmtrain.interop.text.special_tokens import named_tokens
from llmtrain.models.transformer import Transformer, build_model
from llmtrain.values.tokenizer import Tokenizer
from tests.support.weights import materialize

VOCAB_SIZE = 307
SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "num_heads": 4, "ffn_hidden_size": 80, "max_seq_len": 64,
    "vocab_size": VOCAB_SIZE,
}  # fmt: skip

GPT2 = ModelConfig(**SIZES, position="learned", norm="layernorm", activation="gelu", bias=True, dropout=0.1)
LLAMA = ModelConfig(**SIZES, num_kv_heads=2, tie_embeddings=False)
SCALING = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
WINDOW = AttentionConfig(kind="sliding_window", window=9)
QWEN3 = LLAMA.with_keys({"qk_norm": True, "head_dim": 16})
BERT = ModelConfig(
    **SIZES,
    family="encoder",
    position="learned",
    norm="layernorm",
    norm_position="post",
    norm_eps=1e-12,
    activation="gelu",
    gelu_approximate="none",
    bias=True,
    token_types=2,
    embedding_norm=True,
    head="mlm",
    dropout=0.1,
    attention_dropout=0.1,
)
T5 = ModelConfig(
    **SIZES,
    family="encoder_decoder",
    num_encoder_layers=3,
    position="t5_relative",
    relative_max_distance=40,
    relative_buckets=16,
    activation="relu",
    norm_eps=1e-6,
    scaled_head=True,
    attention=AttentionConfig(scale=1.0),
    init=InitConfig(scheme="t5", std=0.25, depth_scaled=False),
)
T5_V11 = T5.with_keys({"activation": "geglu", "scaled_head": False, "tie_embeddings": False, "head_dim": 16})
SWITCH = T5.with_keys(
    {
        "num_encoder_layers": 4,
        "moe": MoeConfig(router="switch", num_experts=5, top_k=1, every_n_layers=2, z_loss_coeff=0.002),
    }
)
MIXTRAL = LLAMA.with_keys({"moe": MoeConfig(num_experts=5, top_k=2)})


def scaled(kind: str, **changes: Any) -> ModelConfig:
    """LLAMA with stretched positions."""
    scaling = RopeScaling(kind=kind, factor=4.0, original_max_seq_len=16, **changes)  # type: ignore[arg-type]
    return LLAMA.with_keys({"rope_scaling": scaling, "rope_theta": 500.0})


MODELS = {
    "gpt2": GPT2,
    "gpt2 untied": GPT2.with_keys({"tie_embeddings": False}),
    "gpt2 exact gelu": GPT2.with_keys({"gelu_approximate": "none"}),
    "gpt2 relu": GPT2.with_keys({"activation": "relu"}),
    "llama": LLAMA,
    "llama tied": LLAMA.with_keys({"tie_embeddings": True}),
    "llama scaled": scaled("llama3"),
    "llama linear": scaled("linear"),
    "llama yarn": scaled("yarn"),
    "llama yarn with factor": scaled("yarn", attention_factor=1.3, beta_fast=16.0),
    "llama head_dim": LLAMA.with_keys({"head_dim": 20}),
    "llama biases": LLAMA.with_keys({"bias": True}),
    "llama one kv head": LLAMA.with_keys({"num_kv_heads": 1, "tie_embeddings": True}),
    "mistral": LLAMA.with_keys({"attention": WINDOW}),
    "mistral odd heads": LLAMA.with_keys({"num_heads": 5, "num_kv_heads": 5, "head_dim": 8}),
    "qwen3": QWEN3,
    "qwen3 tied window": QWEN3.with_keys({"tie_embeddings": True, "attention": WINDOW}),
    "mixtral": MIXTRAL,
    "mixtral tied window": MIXTRAL.with_keys({"tie_embeddings": True, "attention": WINDOW}),
    "bert": BERT,
    "bert untied": BERT.with_keys({"tie_embeddings": False, "token_types": 1}),
    "bert relu": BERT.with_keys({"activation": "relu"}),
    "t5": T5,
    "t5 gelu": T5.with_keys({"activation": "gelu"}),
    "t5 v1.1": T5_V11,
    "t5 tied without scale": T5_V11.with_keys({"tie_embeddings": True, "activation": "reglu"}),
    "switch_transformers": SWITCH,
    "switch_transformers untied every layer": SWITCH.with_keys(
        {
            "tie_embeddings": False,
            "scaled_head": False,
            "moe": MoeConfig(router="switch", num_experts=3, top_k=1, jitter=0.1),
        }
    ),
}
"""Names begin with transformers' model_type."""


def random_model(config: ModelConfig, seed: int = 1) -> Transformer:
    """Our model in evaluation mode; biases and norms are random too, and rows that pad the vocabulary zero."""
    model = build_model(config)
    materialize(model, seed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name in ("embeddings.word.weight", "head.weight", "mlm.bias"):
                parameter[: config.vocabulary] += 0.3 * noise[: config.vocabulary]
            elif parameter.dim() == 1:
                parameter.add_(noise, alpha=0.2)
            else:
                parameter.add_(noise, alpha=0.1)
    return model.eval()


def random_example(config: ModelConfig, batch: int = 3, seed: int = 5) -> Example:
    """Random tokens as a model of this family takes them, with padding at the ends where there is an encoder."""
    generator = torch.Generator().manual_seed(seed)
    length = config.max_seq_len

    def tokens(size: int) -> Tensor:
        return torch.randint(config.vocabulary, (batch, size), generator=generator)

    def valid(size: int) -> Tensor:
        return torch.arange(size) < torch.tensor([size - 5 * row for row in range(batch)])[:, None]

    if config.family == "decoder":
        return Example(tokens(length))
    if config.family == "encoder":
        return Example(tokens(length), valid(length))
    return Example(tokens(20), valid(20), tokens(length), valid(length))


@torch.no_grad()
def logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """Of a decoder."""
    return logits_of(model, Example(tokens_BS))


def model_for(config: ModelConfig, tokenizer: Tokenizer, **known: Any) -> ExportedModel:
    """What an export takes but for the weights; its special tokens are those of the tokenizer."""
    return ExportedModel(config, tokenizer, **{"tokens": named_tokens(tokenizer), **known})


def weights_of(model: Transformer) -> TrainedWeights:
    """The weights that an export takes."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def read(name: str, expert: int | None = None) -> Tensor:
        return own[name] if expert is None else own[name][expert]

    return TrainedWeights(read, lambda config, read_part: partial(logits_of, build_from(config, read_part)))


def random_export(config: ModelConfig, tokenizer: Tokenizer) -> tuple[ExportedModel, TrainedWeights]:
    """Of a random model what an export takes."""
    return model_for(config, tokenizer), weights_of(random_model(config))

"""Tiny decoders of ours with random weights, as the families of Hugging Face know them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig, RopeScaling
from llmtrain.interop.hf_export import TrainedWeights
from llmtrain.models.build import build_model, materialize
from llmtrain.models.transformer import Transformer

VOCAB_SIZE = 307
SIZES = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "ffn_hidden_size": 80, "max_seq_len": 64}

GPT2 = ModelConfig(
    **SIZES, vocab_size=VOCAB_SIZE, position="learned", norm="layernorm", activation="gelu", bias=True, dropout=0.1
)
LLAMA = ModelConfig(**SIZES, vocab_size=VOCAB_SIZE, num_kv_heads=2, tie_embeddings=False)
SCALING = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)

MODELS = {
    "gpt2": GPT2,
    "gpt2 untied": GPT2.model_copy(update={"tie_embeddings": False}),
    "gpt2 exact gelu": GPT2.model_copy(update={"gelu_approximate": "none"}),
    "gpt2 relu": GPT2.model_copy(update={"activation": "relu"}),
    "llama": LLAMA,
    "llama tied": LLAMA.model_copy(update={"tie_embeddings": True}),
    "llama scaled": LLAMA.model_copy(update={"rope_scaling": SCALING, "rope_theta": 500.0}),
    "llama head_dim": LLAMA.model_copy(update={"head_dim": 20}),
    "llama biases": LLAMA.model_copy(update={"bias": True}),
    "llama one kv head": LLAMA.model_copy(update={"num_kv_heads": 1, "tie_embeddings": True}),
}


def random_model(config: ModelConfig, seed: int = 1) -> Transformer:
    """Our model in evaluation mode; biases and norms are random too, and rows that pad the vocabulary zero."""
    model = build_model(config)
    materialize(model, seed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise, alpha=0.2)
            elif name in ("embeddings.word.weight", "head.weight"):
                parameter[: config.vocabulary] += 0.3 * noise[: config.vocabulary]
            else:
                parameter.add_(noise, alpha=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    positions_BS = torch.arange(tokens_BS.shape[1]).expand(tokens_BS.shape)
    return model.logits(model(tokens_BS, positions_BS))


def weights_of(model: Transformer, changed: Mapping[str, Tensor] | None = None) -> TrainedWeights:
    """What an export takes; `changed` tensors are exported in place of the model's."""
    tensors = {**dict(model.named_parameters()), **(changed or {})}
    return TrainedWeights(lambda name: tensors[name].detach(), lambda tokens_BS: logits(model, tokens_BS))

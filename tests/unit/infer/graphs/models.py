"""A tiny model of every kind that has graphs."""

from llmtrain.config.attention import AttentionConfig
from llmtrain.config.model import ModelConfig, MoeConfig
from tests.unit.interop.models import (
    BERT,
    GPT2,
    LLAMA,
    MIXTRAL,
    QWEN3,
    SWITCH,
    T5,
    T5_V11,
    WINDOW,
    scaled,
)


def with_attention(**keys: object) -> ModelConfig:
    return LLAMA.with_keys({"attention": AttentionConfig(**keys)})  # type: ignore[arg-type]


STRIDED = AttentionConfig(kind="strided", stride=4)
LABELS = {"labels": ("B-X", "I-X", "O")}
ALIBI = LLAMA.with_keys({"position": "alibi"})

KINDS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "qwen3": QWEN3,
    "llama yarn": scaled("yarn"),
    "sinusoidal": LLAMA.with_keys({"position": "sinusoidal"}),
    "no positions": LLAMA.with_keys({"position": "none"}),
    "alibi": ALIBI,
    "t5 positions": LLAMA.with_keys({"position": "t5_relative", "relative_max_distance": 20}),
    "window": LLAMA.with_keys({"attention": WINDOW}),
    "strided": LLAMA.with_keys({"attention": STRIDED}),
    "bigbird": with_attention(kind="bigbird", block_size=4, num_global=1, num_random=1),
    "longformer": with_attention(kind="longformer", window=5, num_global=2),
    "linear": with_attention(kind="linear"),
    "sinks and cap": with_attention(sinks=True, softcap=5.0),
    "alibi strided": ALIBI.with_keys({"attention": STRIDED}),
    "mixtral": MIXTRAL,
    "shared experts": MIXTRAL.with_keys({"moe": MoeConfig(num_experts=4, num_shared_experts=1, every_n_layers=2)}),
    "decoder classifier": LLAMA.with_keys({"head": "classifier", **LABELS}),
    "bert": BERT,
    "bert linear": BERT.with_keys({"attention": AttentionConfig(kind="linear"), "attention_dropout": 0.0}),
    "bert alibi": BERT.with_keys({"position": "alibi", "head": "linear"}),
    "bert window": BERT.with_keys({"attention": WINDOW}),
    "bert classifier": BERT.with_keys({"head": "classifier", **LABELS}),
    "bert tagger": BERT.with_keys({"head": "token_classifier", **LABELS}),
    "bert answers": BERT.with_keys({"head": "span"}),
    "t5": T5,
    # Unscaled, its random weights make scores so large that fp32 itself is 1e-4 from fp64, here and there.
    "t5 v1.1": T5_V11.with_keys({"attention": AttentionConfig(scale=0.25)}),
    "t5 linear": T5.with_keys({"position": "sinusoidal", "attention": AttentionConfig(kind="linear")}),
    "switch": SWITCH,
}

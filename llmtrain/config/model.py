"""Configuration of a model's architecture. Pure: imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import Count, Probability, Section

VOCAB_MULTIPLE = 128
"""Vocabularies are padded to this fixed multiple, whatever the layout, so that no shape depends on the layout."""


class AttentionConfig(Section):
    """Which positions attend to which."""

    kind: Literal["full"] = Field(default="full", description="full: every position attends to every earlier one.")


class InitConfig(Section):
    """How weights are drawn. Biases start at zero, norm weights at one."""

    scheme: Literal["normal", "small_normal", "xavier_normal", "xavier_uniform"] = Field(
        default="normal",
        description="normal: N(0, std). small_normal: N(0, 2 / (5 hidden_size)) as variance (Nguyen and Salazar 2019). "
        "xavier_*: variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010); embeddings stay normal.",
    )
    std: Annotated[float, Field(gt=0)] = Field(
        default=0.02, description="Standard deviation of the normal scheme and of embeddings."
    )
    depth_scaled: bool = Field(
        default=True,
        description="Divide the deviation of the projections that write to the residual by sqrt(2 num_layers).",
    )


class RopeScaling(Section):
    """Stretching of rotary positions beyond the length that they were trained at."""

    kind: Literal["llama3"] = Field(
        default="llama3", description="llama3: frequencies below a band are divided by the factor."
    )
    factor: Annotated[float, Field(ge=1)] = Field(default=8.0, description="How many times longer the context becomes.")
    low_freq_factor: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Frequencies with fewer turns in the original length are divided by the whole factor."
    )
    high_freq_factor: Annotated[float, Field(gt=0)] = Field(
        default=4.0, description="Frequencies with more turns in the original length stay; between the two it blends."
    )
    original_max_seq_len: Count = Field(default=8192, description="Length of the sequences before the stretching.")


class ModelConfig(Section):
    """A transformer's architecture. Sizes left out follow from the others as described."""

    family: Literal["decoder"] = Field(default="decoder", description="Which stack: a causal decoder.")
    num_layers: Count = Field(default=4, description="Number of transformer layers.")
    hidden_size: Count = Field(default=128, description="Width of the residual stream.")
    num_heads: Count = Field(default=4, description="Number of query heads.")
    num_kv_heads: Count | None = Field(default=None, description="Number of key and value heads; absent: num_heads.")
    head_dim: Count | None = Field(default=None, description="Size of one head; absent: hidden_size / num_heads.")
    ffn_hidden_size: Count | None = Field(
        default=None,
        description="Inner width of the MLP; absent: 4 hidden_size, or for gated activations 8/3 hidden_size "
        "rounded up to a multiple of 64.",
    )
    max_seq_len: Count = Field(default=1024, description="Longest sequence that the model accepts.")
    vocab_size: Count | None = Field(default=None, description="Number of tokens; absent: from the data's manifest.")
    tie_embeddings: bool = Field(default=True, description="Use the word embedding as the output head.")
    dropout: Probability = Field(
        default=0.0, description="Dropout on embeddings and on what each block adds to the residual."
    )
    attention_dropout: Probability = Field(
        default=0.0, description="Dropout on attention probabilities (explicit, slower kernel)."
    )
    position: Literal["rope", "learned", "sinusoidal", "none"] = Field(
        default="rope", description="Kind of position information."
    )
    rope_theta: Annotated[float, Field(gt=1)] = Field(default=10000.0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(default=None, description="Stretching of rotary positions; absent: none.")
    norm: Literal["rmsnorm", "layernorm"] = Field(default="rmsnorm", description="Kind of normalization.")
    norm_position: Literal["pre", "post"] = Field(
        default="pre", description="Before each block, or after its residual sum."
    )
    norm_eps: Annotated[float, Field(gt=0)] = Field(default=1e-5, description="Added to the variance.")
    activation: Literal["swiglu", "geglu", "reglu", "gelu", "relu"] = Field(
        default="swiglu", description="The MLP's activation."
    )
    gelu_approximate: Literal["tanh", "none"] = Field(
        default="tanh", description="tanh as in GPT-2, or the exact error function."
    )
    bias: bool = Field(default=False, description="Biases in the linear layers of attention and MLP.")
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    init: InitConfig = Field(default_factory=InitConfig)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections."""
        return self.activation in ("swiglu", "geglu", "reglu")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // 3 // 64) * 64 if self.gated else 4 * self.hidden_size

    @property
    def vocabulary(self) -> int:
        """The vocabulary size, once it is known. Raises ValueError before."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet: it comes from the data's manifest")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding: the vocabulary padded to a multiple of 128 in every layout."""
        return -(-self.vocabulary // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

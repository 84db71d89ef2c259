"""The section `model`: a model's architecture, experts included. Pure: imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.attention import AttentionConfig, RopeScaling
from llmtrain.config.section import (
    AsTuple,
    AsWhole,
    CountOrZero,
    Layers,
    Length,
    NotNegative,
    Probability,
    Section,
    Text,
    Width,
)

VOCAB_MULTIPLE = 128
"""Vocabularies are padded to this fixed multiple, whatever the layout, so that no shape depends on the layout."""

LABEL_HEADS = ("classifier", "token_classifier", "span")
"""The values of model.head that predict labels, not tokens."""

MOST_LABELS = 100_000


class InitConfig(Section):
    """How weights are drawn. Biases start at zero, norm weights at one."""

    scheme: Literal["normal", "small_normal", "xavier_normal", "xavier_uniform", "t5"] = Field(
        default="normal",
        description="normal: N(0, std). small_normal: N(0, 2 / (5 hidden_size)) as variance (Nguyen and Salazar 2019). "
        "xavier_*: variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010); embeddings stay normal. t5: variance 1 / "
        "fan_in, of queries 1 / (fan_in head_dim), whose scores are not scaled (Raffel et al. 2020).",
    )
    std: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=0.02, description="Standard deviation of the normal scheme and of embeddings."
    )
    depth_scaled: bool = Field(
        default=True,
        description="Divide the deviation of the projections that write to the residual by sqrt(2 num_layers).",
    )


class MoeConfig(Section):
    """Experts in place of the MLP of some layers. A router decides per token; experts have no biases."""

    num_experts: Annotated[int, Field(ge=2, le=2**16), AsWhole] = Field(default=8, description="Experts per layer.")
    top_k: Annotated[int, Field(ge=1, le=2**16), AsWhole] | None = Field(
        default=None, description="Experts that a token goes to; absent: 2, of a switch 1."
    )
    router: Literal["switch", "top_k", "expert_choice"] = Field(
        default="top_k",
        description="switch: the best expert, weighted by its probability (Fedus et al. 2021). top_k: the best top_k "
        "(Shazeer et al. 2017). expert_choice: each expert takes its best tokens (Zhou et al. 2022).",
    )
    capacity_factor: Annotated[float, Field(gt=0, le=2.0**16)] | None = Field(
        default=None,
        description="Tokens that an expert takes in training, as a multiple of an equal share of the micro-batch; "
        "the others pass by it. Absent: no token is dropped (expert_choice: 1). Evaluation drops none.",
    )
    normalize_weights: bool = Field(
        default=True, description="top_k: the weights of a token's experts sum to one (Mixtral)."
    )
    jitter: Probability = Field(
        default=0.0, description="The router's input is multiplied by uniform numbers within 1 +- jitter in training."
    )
    aux_loss_coeff: NotNegative = Field(
        default=0.01, description="Weight of the load-balancing loss (Fedus et al. 2021, eq. 4)."
    )
    z_loss_coeff: NotNegative = Field(
        default=0.0, description="Weight of the router's z-loss (Zoph et al. 2022, eq. 5)."
    )
    bias_update_rate: NotNegative = Field(
        default=0.0,
        description="top_k: each step, a bias that is added for the choice alone moves by this towards an equal load "
        "(Wang et al. 2024); 0: no bias.",
    )
    every_n_layers: Layers = Field(
        default=1, description="Layers 1, 1 + n, ... (counted from 0; with n = 1 all) have experts, the others an MLP."
    )
    num_shared_experts: Annotated[int, Field(ge=0, le=2**16), AsWhole] = Field(
        default=0, description="Experts that every token goes to besides (Dai et al. 2024)."
    )
    ffn_hidden_size: Width | None = Field(
        default=None, description="Inner width of an expert; absent: that of the model's MLP."
    )

    @property
    def choices(self) -> int:
        """Experts that a token goes to; with expert_choice on average."""
        return 1 if self.router == "switch" else self.top_k or 2


class ModelConfig(Section):
    """A transformer's architecture. Sizes left out follow from the others as described."""

    family: Literal["decoder", "encoder", "encoder_decoder"] = Field(
        default="decoder",
        description="decoder: a causal stack (GPT, Llama). encoder: one that sees both sides (BERT). encoder_decoder: "
        "both, the second attending to the first (T5).",
    )
    num_layers: Layers = Field(default=4, description="Layers of the stack; of an encoder_decoder, of its decoder.")
    num_encoder_layers: Layers | None = Field(
        default=None, description="encoder_decoder: layers of the encoder; absent: num_layers."
    )
    hidden_size: Width = Field(default=128, description="Width of the residual stream.")
    num_heads: Width = Field(default=4, description="Number of query heads.")
    num_kv_heads: Width | None = Field(default=None, description="Number of key and value heads; absent: num_heads.")
    head_dim: Width | None = Field(default=None, description="Size of one head; absent: hidden_size / num_heads.")
    ffn_hidden_size: Width | None = Field(
        default=None,
        description="Inner width of the MLP; absent: 4 hidden_size, or for gated activations 8/3 hidden_size "
        "rounded up to a multiple of 64.",
    )
    max_seq_len: Length = Field(default=1024, description="Longest sequence that the model accepts.")
    vocab_size: Annotated[int, Field(ge=1, le=2**30), AsWhole] | None = Field(
        default=None, description="Number of tokens; absent: from the data's manifest."
    )
    tie_embeddings: bool = Field(default=True, description="Use the word embedding as the output head.")
    dropout: Probability = Field(
        default=0.0, description="Dropout on embeddings and on what each block adds to the residual."
    )
    attention_dropout: Probability = Field(
        default=0.0, description="Dropout on attention probabilities (explicit, slower kernel)."
    )
    position: Literal["rope", "learned", "sinusoidal", "alibi", "t5_relative", "none"] = Field(
        default="rope",
        description="Kind of position information. alibi: scores fall with distance (Press et al. 2022). t5_relative: "
        "a learned score per head and distance, shared by the layers of a stack (Raffel et al. 2020).",
    )
    relative_buckets: Annotated[int, Field(ge=4, le=2**16, multiple_of=2)] = Field(
        default=32, description="t5_relative: classes of distances that are told apart."
    )
    relative_max_distance: Length = Field(default=128, description="t5_relative: distances from here on are one class.")
    token_types: CountOrZero = Field(
        default=0, description="Rows of a token-type embedding (BERT: 2); 0: there is none. Samples have type 0."
    )
    embedding_norm: bool = Field(default=False, description="A norm after the embeddings (BERT).")
    rope_theta: Annotated[float, Field(gt=1, le=1e18)] = Field(
        default=10000.0, description="Base of the rotary frequencies."
    )
    rope_scaling: RopeScaling | None = Field(default=None, description="Stretching of rotary positions; absent: none.")
    norm: Literal["rmsnorm", "layernorm"] = Field(default="rmsnorm", description="Kind of normalization.")
    norm_position: Literal["pre", "post"] = Field(
        default="pre", description="Before each block, or after its residual sum."
    )
    norm_eps: Annotated[float, Field(gt=0, le=1e6)] = Field(default=1e-5, description="Added to the variance.")
    activation: Literal["swiglu", "geglu", "reglu", "gelu", "relu"] = Field(
        default="swiglu", description="The MLP's activation."
    )
    gelu_approximate: Literal["tanh", "none"] = Field(
        default="tanh", description="tanh as in GPT-2, or the exact error function."
    )
    bias: bool = Field(default=False, description="Biases in the linear layers of attention and MLP.")
    qk_norm: bool = Field(default=False, description="An RMSNorm on each head's queries and keys (Qwen3).")
    head: Literal["linear", "mlm", "classifier", "token_classifier", "span"] = Field(
        default="linear",
        description="linear: one matrix, to the vocabulary. mlm: a dense layer, the activation and a norm before it, "
        "and a bias (BERT). In place of these, for labels: classifier: one of each sample, from its first token behind "
        "a dense layer and tanh (encoder; BERT's pooler) or from its last one (decoder). token_classifier: one of each "
        "word. span: where an answer begins and ends (encoder).",
    )
    num_labels: Annotated[int, Field(ge=2, le=MOST_LABELS), AsWhole] | None = Field(
        default=None, description="classifier, token_classifier: number of labels; absent: from the data's manifest."
    )
    labels: Annotated[Annotated[tuple[Text, ...], Field(min_length=2, max_length=MOST_LABELS)] | None, AsTuple] = Field(
        default=None, description="Their names, in the order of their numbers; absent: from the data's manifest."
    )
    head_dropout: Probability | None = Field(
        default=None,
        description="Dropout on the input of a classifier or token_classifier; absent: that of model.dropout, and 0 "
        "for a decoder's classifier.",
    )
    scaled_head: bool = Field(
        default=False, description="Multiply the head's input by hidden_size^-0.5, as T5 v1.0 does where it is tied."
    )
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    moe: MoeConfig | None = Field(default=None, description="Mixture of experts; absent: every layer has an MLP.")
    init: InitConfig = Field(default_factory=InitConfig)

    @property
    def gated(self) -> bool:
        """True where the MLP multiplies two projections."""
        return self.activation in ("swiglu", "geglu", "reglu")

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder, 0 without one."""
        match self.family:
            case "encoder":
                return self.num_layers
            case "encoder_decoder":
                return self.num_encoder_layers or self.num_layers
            case "decoder":
                return 0

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder, 0 without one."""
        return 0 if self.family == "encoder" else self.num_layers

    @property
    def total_layers(self) -> int:
        """Layers of all stacks, in the order in which data flows."""
        return self.encoder_layers + self.decoder_layers

    def has_experts(self, layer: int) -> bool:
        """True where layer number `layer` of its stack has experts in place of an MLP."""
        return self.moe is not None and layer % self.moe.every_n_layers == 1 % self.moe.every_n_layers

    @property
    def has_plain_mlp(self) -> bool:
        """True where some layer of some stack has an MLP without experts."""
        return not all(map(self.has_experts, (*range(self.encoder_layers), *range(self.decoder_layers))))

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

    @property
    def predicts_labels(self) -> bool:
        """True where the head is one for labels, and there is none for the vocabulary."""
        return self.head in LABEL_HEADS

    @property
    def ties_head(self) -> bool:
        """True where the word embedding is the head as well."""
        return self.tie_embeddings and not self.predicts_labels

    @property
    def is_sized(self) -> bool:
        """True where all is known that shapes follow from, and nothing is left to the data."""
        names_labels = self.head in ("classifier", "token_classifier")
        return self.vocab_size is not None and not (names_labels and self.num_labels is None and self.labels is None)

    def with_any_sizes(self) -> "ModelConfig":
        """The same with some size for what the data decides, for those who look at the names of parameters alone."""
        if self.is_sized:
            return self
        classifies = self.head in ("classifier", "token_classifier")
        labels = self.num_labels or (2 if classifies and self.labels is None else None)
        return self.with_keys({"vocab_size": self.vocab_size or 1, "num_labels": labels})

    @property
    def has_pooler(self) -> bool:
        return self.head == "classifier" and self.family == "encoder"

    @property
    def num_classes(self) -> int:
        """What a head for labels chooses from; of span the two ends. Raises ValueError before the labels are known."""
        if self.head == "span":
            return 2
        number = self.num_labels or len(self.labels or ())
        if not number:
            raise ValueError("model.num_labels is not known yet: it comes from the data's manifest")
        return number

    @property
    def head_rows(self) -> int:
        """Rows of the output matrix, those that pad the vocabulary included."""
        return self.num_classes if self.predicts_labels else self.padded_vocab_size

    @property
    def label_dropout(self) -> float:
        """Dropout before a head for labels."""
        if self.head_dropout is not None:
            return self.head_dropout
        return 0.0 if self.head == "span" or (self.head == "classifier" and self.family == "decoder") else self.dropout

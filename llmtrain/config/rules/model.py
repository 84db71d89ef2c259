"""Rules within a model: families, heads, experts, attention and positions. A key without effect is refused. Pure."""

from collections import Counter
from collections.abc import Iterator

from llmtrain.config.attention import KindSection, effective_keys, kind_of, kinds_of
from llmtrain.config.model import LABEL_HEADS, ModelConfig
from llmtrain.config.reading.rendering import shown
from llmtrain.config.reading.suggestions import either, nearest_divisors
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import Section
from llmtrain.errors import Problem

Found = Iterator[Problem]


def encoder_layers_need_two_stacks(config: RunConfig) -> Found:
    model = config.model
    if model.num_encoder_layers is not None and model.family != "encoder_decoder":
        message = (
            f"has no effect with model.family = {model.family}. Try null (model.num_layers counts its layers), or "
            "model.family=encoder_decoder."
        )
        yield Problem("model.num_encoder_layers", message, model.num_encoder_layers, uses=("model.family",))


def mlm_head_needs_encoder(config: RunConfig) -> Found:
    model = config.model
    if model.head == "mlm" and model.family != "encoder":
        message = f"is the head of encoders, and model.family = {model.family}. Try linear, or model.family=encoder."
        yield Problem("model.head", message, model.head, uses=("model.family",))


def label_heads_need_labels(config: RunConfig) -> Found:
    """A head for labels and the objective that has some come together."""
    model, objective = config.model, config.data.objective
    if model.predicts_labels == (objective == "labels"):
        return
    if model.predicts_labels:
        token_head = "mlm or linear" if model.family == "encoder" else "linear"
        message = f"predicts labels, and data.objective = {objective} has none. Try {token_head}, or "
        message += "data.objective=labels with what `llmtrain data labels` has written."
    elif heads_of(model):
        message = f"predicts tokens, and data.objective = labels wants labels. Try {either(heads_of(model))}."
    else:
        return  # a family that the objective does not train
    yield Problem("model.head", message, model.head, uses=("data.objective", "model.family"))


def heads_of(model: ModelConfig) -> tuple[str, ...]:
    """The heads for labels that a family can have."""
    return {"encoder": LABEL_HEADS, "decoder": ("classifier", "token_classifier")}.get(model.family, ())


def label_heads_fit_families(config: RunConfig) -> Found:
    model = config.model
    if not model.predicts_labels or model.head in heads_of(model):
        return
    if model.family == "encoder_decoder":
        message = "stands on one stack that has read the whole text, and an encoder_decoder reads it in two. Try "
        message += "model.family=encoder, or linear and labels as texts."
    else:
        message = "looks for an answer whose words know what follows them, and a decoder's do not. Try classifier or "
        message += "token_classifier, or model.family=encoder."
    yield Problem("model.head", message, model.head, uses=("model.family",))


def answers_have_no_prompt(config: RunConfig) -> Found:
    """Positions of answers count from the begin of a text, and a soft prompt moves it."""
    if config.model.head == "span" and config.prompt_tokens:
        message = "moves the text, and model.head = span looks for positions in it. Try lora, adapter or full."
        yield Problem("finetune.method", message, "prompt", uses=("model.head",))


def label_keys_are_used(config: RunConfig) -> Found:
    """Numbers and names of labels go with heads that have some; both at once must agree."""
    model = config.model
    classifies = model.head in ("classifier", "token_classifier")
    for key in ("num_labels", "labels", "head_dropout"):
        if getattr(model, key) is not None and not classifies:
            message = f"has no effect with model.head = {model.head}. Remove it, or set model.head to classifier or "
            message += "token_classifier."
            yield Problem(f"model.{key}", message, shown(key, getattr(model, key)), uses=("model.head",))
    if model.labels is None:
        return
    twice = [label for label, count in Counter(model.labels).items() if count > 1]
    if twice:
        message = f"has {twice[0]} twice. Each label must have one number."
        yield Problem("model.labels", message, shown("labels", list(model.labels)))
    if model.num_labels not in (None, len(model.labels)):
        message = f"must be the number of model.labels, {len(model.labels)}. Try {len(model.labels)} or null."
        yield Problem("model.num_labels", message, model.num_labels, uses=("model.labels",))


def head_is_scaled_where_tied(config: RunConfig) -> Found:
    model = config.model
    if model.scaled_head and model.predicts_labels:
        message = f"scales what meets a vocabulary, and model.head = {model.head}. Try false."
        yield Problem("model.scaled_head", message, "true", uses=("model.head",))
    elif model.scaled_head and not model.tie_embeddings:
        message = "makes up for embeddings that serve as the head: model.tie_embeddings = false. Try false."
        yield Problem("model.scaled_head", message, "true", uses=("model.tie_embeddings",))


def choices_fit_experts(config: RunConfig) -> Found:
    moe = config.model.moe
    if moe is None or moe.top_k is None:
        return
    if moe.router == "switch" and moe.top_k != 1:
        message = "a switch sends each token to one expert. Try 1 or null, or model.moe.router=top_k."
        yield Problem("model.moe.top_k", message, moe.top_k, uses=("model.moe.router",))
    elif moe.top_k > moe.num_experts:
        message = f"must be at most model.moe.num_experts = {moe.num_experts}. Try {min(2, moe.num_experts)}."
        yield Problem("model.moe.top_k", message, moe.top_k, uses=("model.moe.num_experts",))


def some_layer_has_experts(config: RunConfig) -> Found:
    model = config.model
    if model.moe is None:
        return
    most = max(model.encoder_layers, model.decoder_layers)
    if not any(model.has_experts(layer) for layer in range(most)):
        message = f"leaves no layer with experts: the first is layer 1, and the model has {most}. Try 1."
        key = "model.moe.every_n_layers"
        yield Problem(key, message, model.moe.every_n_layers, uses=("model.num_layers", "model.num_encoder_layers"))


def experts_choose_in_encoders(config: RunConfig) -> Found:
    """An expert that takes its best tokens compares each with those behind it: a causal stack would see its future."""
    model = config.model
    if model.moe is not None and model.moe.router == "expert_choice" and model.family != "encoder":
        message = (
            f"experts choose among all tokens, later ones too, which model.family = {model.family} must not see. "
            "Try top_k or switch, or model.family=encoder."
        )
        yield Problem("model.moe.router", message, model.moe.router, uses=("model.family",))


def bias_balances_top_k(config: RunConfig) -> Found:
    moe = config.model.moe
    if moe is not None and moe.bias_update_rate and moe.router != "top_k":
        message = f"goes with model.moe.router = top_k, not {moe.router}. Try 0, or model.moe.router=top_k."
        yield Problem("model.moe.bias_update_rate", message, moe.bias_update_rate, uses=("model.moe.router",))


def expert_ranks_divide_experts(config: RunConfig) -> Found:
    moe, expert = config.model.moe, config.parallel.expert
    if moe is None:
        if expert > 1:
            message = "the model has no experts to split. Try 1, or give it some with model.moe."
            yield Problem("parallel.expert", message, expert, uses=("model.moe",))
    elif moe.num_experts % expert:
        tries = either(nearest_divisors(moe.num_experts, expert))
        message = f"must divide model.moe.num_experts = {moe.num_experts}. Try {tries}."
        yield Problem("parallel.expert", message, expert, uses=("model.moe.num_experts",))


def tensor_divides_experts(config: RunConfig) -> Found:
    moe, tensor = config.model.moe, config.parallel.tensor
    if moe is not None and moe.ffn_hidden_size is not None and moe.ffn_hidden_size % tensor:
        tries = either(nearest_divisors(moe.ffn_hidden_size, tensor))
        message = f"must divide model.moe.ffn_hidden_size = {moe.ffn_hidden_size}. Try {tries}."
        yield Problem("parallel.tensor", message, tensor, uses=("model.moe.ffn_hidden_size",))


def is_set(section: Section, key: str) -> bool:
    """True where a key is away from its default."""
    return getattr(section, key) != type(section).model_fields[key].get_default()


def without_effect(section: KindSection) -> Found:
    """Keys of a section that its kind does not read."""
    path, kinds = kinds_of(section)
    effective = effective_keys(section)
    for key in type(section).model_fields:
        if key not in effective and is_set(section, key):
            default = shown("", type(section).model_fields[key].get_default())
            readers = either(name for name, kind in kinds.items() if key in kind.reads)
            message = f"has no effect with {path}.kind = {section.kind}. Try {default}, or {path}.kind={readers}."
            yield Problem(f"{path}.{key}", message, shown("", getattr(section, key)), uses=(f"{path}.kind",))


def attention_keys_have_an_effect(config: RunConfig) -> Found:
    yield from without_effect(config.model.attention)


def kinds_have_their_sizes(config: RunConfig) -> Found:
    attention = config.model.attention
    for key, suggested in kind_of(attention).required.items():
        if getattr(attention, key) is None:
            message = f"needs model.attention.{key}. Try model.attention.{key}={suggested(config.data.seq_len)}."
            yield Problem("model.attention.kind", message, attention.kind, uses=(f"model.attention.{key}",))


def linear_has_no_softmax(config: RunConfig) -> Found:
    """Sums of keys and values know no single scores."""
    model = config.model
    attention = model.attention
    if attention.kind != "linear":
        return
    kind, why = ("model.attention.kind",), "model.attention.kind = linear has no softmax"
    if attention.softcap is not None:
        message = f"{why} whose scores could be capped. Try null, or model.attention.kind=full."
        yield Problem("model.attention.softcap", message, shown("", attention.softcap), uses=kind)
    if attention.sinks:
        message = f"{why} that a sink could take part in. Try false, or model.attention.kind=full."
        yield Problem("model.attention.sinks", message, "true", uses=kind)
    if attention.scale is not None and model.family != "encoder_decoder":  # there, cross-attention has one
        message = f"{why} whose scores could be scaled. Try null, or model.attention.kind=full."
        yield Problem("model.attention.scale", message, shown("", attention.scale), uses=(*kind, "model.family"))
    if model.attention_dropout > 0:
        message = f"{why} whose probabilities could be dropped. Try 0, or model.dropout={model.attention_dropout:g}."
        yield Problem("model.attention_dropout", message, shown("", model.attention_dropout), uses=kind)
    if model.position in ("alibi", "t5_relative"):
        message = f"adds to scores, and {why}. Try rope or learned, or model.attention.kind=full."
        yield Problem("model.position", message, model.position, uses=kind)
    if config.data.objective == "prefix" and model.family == "decoder":
        message = (
            "sums keys in their order, and a prefix (data.objective = prefix) is seen from both sides. "
            "Try full, or data.objective=causal."
        )
        yield Problem("model.attention.kind", message, "linear", uses=("data.objective", "model.family"))


def relative_keys_need_relative_positions(config: RunConfig) -> Found:
    model = config.model
    keys = ("relative_buckets", "relative_max_distance")
    for key in keys:
        if model.position != "t5_relative" and is_set(model, key):
            default = shown("", ModelConfig.model_fields[key].get_default())
            message = (
                f"has no effect with model.position = {model.position}. Try {default}, or model.position=t5_relative."
            )
            yield Problem(f"model.{key}", message, getattr(model, key), uses=("model.position",))
    exact = model.relative_buckets // 2
    if model.position == "t5_relative" and model.relative_max_distance <= exact:
        message = (
            f"must be more than half of model.relative_buckets = {model.relative_buckets}, distances below which have "
            f"a class each. Try {8 * exact}."
        )
        yield Problem(
            "model.relative_max_distance", message, model.relative_max_distance, uses=("model.relative_buckets",)
        )


def reset_positions_need_positions(config: RunConfig) -> Found:
    """Scores by distance are the same wherever counting starts; across documents they would have to be another."""
    position = config.model.position
    data = config.data
    if not data.reset_positions or data.objective == "chat" or position not in ("alibi", "t5_relative", "none"):
        return
    uses: tuple[str, ...] = ("model.position",)
    if position == "none":
        message = "has no effect with model.position = none. Try false."
    elif not data.reset_attention:
        message = (
            f"has no effect with model.position = {position}, which knows distances alone. "
            "Try false, or data.reset_attention=true."
        )
        uses = ("model.position", "data.reset_attention")
    else:
        return
    yield Problem("data.reset_positions", message, "true", uses=uses)


def rope_scaling_keys_have_an_effect(config: RunConfig) -> Found:
    scaling = config.model.rope_scaling
    if scaling is None or config.model.position != "rope":
        return
    path = "model.rope_scaling"
    yield from without_effect(scaling)
    if scaling.kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        high = scaling.high_freq_factor
        message = f"must be less than {path}.high_freq_factor = {high:g}. Try {high / 4:g}."
        uses = (f"{path}.high_freq_factor",)
        yield Problem(f"{path}.low_freq_factor", message, scaling.low_freq_factor, uses=uses)
    if scaling.kind == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        message = f"must be less than {path}.beta_fast = {scaling.beta_fast:g}. Try {scaling.beta_fast / 32:g}."
        yield Problem(f"{path}.beta_slow", message, scaling.beta_slow, uses=(f"{path}.beta_fast",))


def ntk_needs_two_pairs(config: RunConfig) -> Found:
    """Its base grows by a power with head_dim - 2 in the denominator."""
    model = config.model
    if model.position != "rope" or model.rope_scaling is None or model.rope_scaling.kind != "ntk":
        return
    if model.head_size <= 2:
        message = f"needs heads of more than one pair, and these have {model.head_size}. Try linear."
        uses = ("model.head_dim", "model.hidden_size", "model.num_heads")
        yield Problem("model.rope_scaling.kind", message, "ntk", uses=uses)


MODEL_RULES = (
    encoder_layers_need_two_stacks,
    mlm_head_needs_encoder,
    label_heads_need_labels,
    label_heads_fit_families,
    answers_have_no_prompt,
    label_keys_are_used,
    head_is_scaled_where_tied,
    choices_fit_experts,
    some_layer_has_experts,
    experts_choose_in_encoders,
    bias_balances_top_k,
    expert_ranks_divide_experts,
    tensor_divides_experts,
    attention_keys_have_an_effect,
    kinds_have_their_sizes,
    linear_has_no_softmax,
    relative_keys_need_relative_positions,
    reset_positions_need_positions,
    rope_scaling_keys_have_an_effect,
    ntk_needs_two_pairs,
)

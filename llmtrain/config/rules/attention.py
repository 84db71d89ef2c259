"""Which keys of attention and positions belong to which kind: what would be ignored is refused. Pure."""

from collections.abc import Iterator

from llmtrain.config.attention import KindSection, effective_keys, kind_of, kinds_of
from llmtrain.config.model import ModelConfig
from llmtrain.config.reading.key_names import either, shown
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import Section
from llmtrain.errors import Problem

Found = Iterator[Problem]


def text(value: object) -> str:
    """A value as a user would write it."""
    return shown("", value)


def is_set(section: Section, key: str) -> bool:
    """Whether a key is away from its default."""
    return getattr(section, key) != type(section).model_fields[key].get_default()


def without_effect(section: KindSection) -> Found:
    """Keys of a section that its kind does not read."""
    path, kinds = kinds_of(section)
    effective = effective_keys(section)
    for key in type(section).model_fields:
        if key not in effective and is_set(section, key):
            default = text(type(section).model_fields[key].get_default())
            readers = either(name for name, kind in kinds.items() if key in kind.reads)
            message = f"has no effect with {path}.kind = {section.kind}. Try {default}, or {path}.kind={readers}."
            yield Problem(f"{path}.{key}", message, text(getattr(section, key)), uses=(f"{path}.kind",))


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
        yield Problem("model.attention.softcap", message, text(attention.softcap), uses=kind)
    if attention.sinks:
        message = f"{why} that a sink could take part in. Try false, or model.attention.kind=full."
        yield Problem("model.attention.sinks", message, "true", uses=kind)
    if attention.scale is not None and model.family != "encoder_decoder":  # there, cross-attention has one
        message = f"{why} whose scores could be scaled. Try null, or model.attention.kind=full."
        yield Problem("model.attention.scale", message, text(attention.scale), uses=(*kind, "model.family"))
    if model.attention_dropout > 0:
        message = f"{why} whose probabilities could be dropped. Try 0, or model.dropout={model.attention_dropout:g}."
        yield Problem("model.attention_dropout", message, text(model.attention_dropout), uses=kind)
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
            default = text(ModelConfig.model_fields[key].get_default())
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
    if not config.data.reset_positions or position not in ("alibi", "t5_relative", "none"):
        return
    uses: tuple[str, ...] = ("model.position",)
    if position == "none":
        message = "has no effect with model.position = none. Try false."
    elif not config.data.reset_attention:
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


ATTENTION_RULES = (
    attention_keys_have_an_effect,
    kinds_have_their_sizes,
    linear_has_no_softmax,
    relative_keys_need_relative_positions,
    reset_positions_need_positions,
    rope_scaling_keys_have_an_effect,
    ntk_needs_two_pairs,
)

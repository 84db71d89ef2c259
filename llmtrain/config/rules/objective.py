"""Objectives: the families that they train, the lengths that they make, and keys that have no effect. Pure."""

from collections.abc import Iterator
from functools import cache

from llmtrain.config.data import needed_tokens
from llmtrain.config.reading.rendering import shown
from llmtrain.config.reading.suggestions import either, nearest_multiples
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import Section
from llmtrain.config.sequence_lengths import Lengths, num_sentinels, num_spans
from llmtrain.errors import Problem

FAMILIES = {
    "causal": ("decoder",),
    "masked": ("encoder",),
    "span_corruption": ("encoder_decoder",),
    "ul2": ("encoder_decoder",),
    "prefix": ("decoder", "encoder_decoder"),
    "fim": ("decoder",),
    "chat": ("decoder",),
    "labels": ("encoder", "decoder"),
}
"""The families that can learn each objective."""

LENGTH_KEYS = ("model.family", "data.objective", "data.span_corruption", "data.ul2", "data.prefix")
"""The keys beside data.seq_len that the lengths of sequences follow from."""

FARTHEST = 1024
"""How far from a wrong data.seq_len a right one is looked for."""

Found = Iterator[Problem]


def objective_fits_family(config: RunConfig) -> Found:
    family, objective = config.model.family, config.data.objective
    if family not in FAMILIES[objective]:
        labels = config.model.predicts_labels  # for which there is one objective, with none of the other heads
        fitting = [name for name, families in FAMILIES.items() if family in families and (name == "labels") == labels]
        other = f"{either(fitting)}, or " if fitting else ""
        message = (
            f"trains model.family = {either(FAMILIES[objective])}, not {family}. Try {other}"
            f"model.family={FAMILIES[objective][0]}."
        )
        yield Problem("data.objective", message, objective, uses=("model.family",))


def other_objectives_are_silent(config: RunConfig) -> Found:
    """A key of an objective that is not in use would be ignored: whoever set it meant something else."""
    data = config.data
    for name in FAMILIES:
        section = getattr(data, name, None)
        if not isinstance(section, Section) or name == data.objective:
            continue
        for key, value in _changed(section):
            message = f"has no effect with data.objective = {data.objective}. Remove it, or set data.objective={name}."
            shown_value = shown(key, value.model_dump(mode="json") if isinstance(value, Section) else value)
            yield Problem(f"data.{name}.{key}", message, shown_value, uses=("data.objective",))
    needed = needed_tokens(config.model.family, data.objective)
    for key, value in _changed(data.special_tokens):
        if key not in needed:
            message = f"has no effect with data.objective = {data.objective}, which uses none. Remove it."
            yield Problem(f"data.special_tokens.{key}", message, shown(key, value), uses=("data.objective",))


def parts_of_objectives_are_used(config: RunConfig) -> Found:
    """Keys of an objective that rest on another key of it."""
    data = config.data
    if data.objective == "masked" and data.masked.unit != "span":
        for key, value in _changed(data.masked):
            if key in ("span_probability", "max_span"):
                message = f"has no effect with data.masked.unit = {data.masked.unit}. Remove it, or set unit to span."
                yield Problem(f"data.masked.{key}", message, value, uses=("data.masked.unit",))
    for number, denoiser in enumerate(data.ul2.denoisers if data.objective == "ul2" else ()):
        if denoiser.kind == "prefix" and "mean_length" in dict(_changed(denoiser)):
            key = f"data.ul2.denoisers.{number}"
            message = "has no effect with kind = prefix, which takes out one span of data.seq_len x density. Remove it."
            yield Problem(f"{key}.mean_length", message, denoiser.mean_length, uses=(f"{key}.kind",))


def shares_are_shares(config: RunConfig) -> Found:
    masked, prefix = config.data.masked, config.data.prefix
    if masked.mask_share + masked.random_share > 1:
        rest = round(1 - masked.mask_share, 6)
        message = f"with data.masked.mask_share = {masked.mask_share:g} must add to at most 1. Try {rest:g} or less."
        yield Problem("data.masked.random_share", message, masked.random_share, uses=("data.masked.mask_share",))
    if prefix.min_share > prefix.max_share:
        message = f"must be at most data.prefix.max_share = {prefix.max_share:g}. Try {prefix.max_share / 2:g}."
        yield Problem("data.prefix.min_share", message, prefix.min_share, uses=("data.prefix.max_share",))


def documents_are_told_apart(config: RunConfig) -> Found:
    """Positions and segments of documents go with those objectives that leave documents where they are."""
    if config.model.family != "encoder_decoder":
        return
    why = {
        "reset_attention": "a target's spans come from all documents of its sample, and attend to all of its input",
        "reset_positions": "positions of input and target are not those of the sample",
    }
    for key, reason in why.items():
        if getattr(config.data, key):
            message = f"does not go with model.family = encoder_decoder: {reason}. Try false."
            yield Problem(f"data.{key}", message, "true", uses=("model.family",))


def samples_can_be_split(config: RunConfig) -> Found:
    objective = config.data.objective
    if objective in ("span_corruption", "ul2", "prefix") and config.data.seq_len < 2:
        message = f"must be at least 2 with data.objective = {objective}, which splits samples. Try 512."
        yield Problem("data.seq_len", message, config.data.seq_len, uses=("data.objective",))


def samples_fit_model(config: RunConfig) -> Found:
    """The model accepts the sequences that come of a sample."""
    data, longest = config.data, config.model.max_seq_len
    needed = _longest(config.lengths)
    if needed <= longest:
        return
    if config.model.family != "encoder_decoder":
        most = longest - config.prompt_tokens
        behind = f" - finetune.prompt.tokens = {config.prompt_tokens}" if config.prompt_tokens else ""
        message = f"must be at most model.max_seq_len = {longest}{behind}. Try {most}, or model.max_seq_len={needed}."
        yield Problem("data.seq_len", message, data.seq_len, uses=("model.max_seq_len",))
        return
    fits = [seq_len for seq_len in range(2, data.seq_len) if _longest(_with_seq_len(config, seq_len)) <= longest]
    smaller = f"data.seq_len={fits[-1]}, or " if fits else ""
    message = (
        f"makes {_told(config.lengths)}, and model.max_seq_len = {longest}. Try {smaller}model.max_seq_len={needed}."
    )
    yield Problem("data.seq_len", message, data.seq_len, uses=("model.max_seq_len", *LENGTH_KEYS))


def axes_divide_sequences(config: RunConfig) -> Found:
    """Context parallel splits sequences, and sequence parallel what is left of them over the tensor ranks."""
    parallel, family, seq_len = config.parallel, config.model.family, config.data.seq_len
    parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
    lengths = config.lengths
    if not _undivided(lengths, parts):
        return
    axes = f"parallel.context = {parallel.context}"
    if parallel.sequence:
        axes = f"parallel.context x parallel.tensor = {parallel.context} x {parallel.tensor} = {parts}"
    uses = ("parallel.context", "parallel.tensor", "parallel.sequence", "model.max_seq_len", *LENGTH_KEYS)
    if family == "encoder_decoder":
        fitting = _nearest_divided(config, parts)
        message = f"makes {_told(lengths)}, which must be multiples of {axes}."
    else:
        fitting = [length for length in nearest_multiples(parts, seq_len) if length <= config.model.max_seq_len]
        message = f"must be a multiple of {axes}."
    advice = f"Try {either(fitting)}." if fitting else f"Try {axes.partition(' ')[0]}=1."
    yield Problem("data.seq_len", f"{message} {advice}", seq_len, uses=uses)


def sentinels_suffice(config: RunConfig) -> Found:
    special, data = config.data.special_tokens, config.data
    if special.sentinels is None or "sentinels" not in needed_tokens(config.model.family, data.objective):
        return
    key, sentinels, needed = "data.special_tokens.sentinels", special.sentinels, num_sentinels(data)
    uses = ("data.objective", "data.seq_len", "data.span_corruption", "data.ul2")
    if len(sentinels) < needed:
        message = (
            f"has {len(sentinels)} ids, and data.objective = {data.objective} uses {needed} with data.seq_len = "
            f"{data.seq_len}. Give more, null for new ones, or make samples shorter or spans longer."
        )
        yield Problem(key, message, shown(key, list(sentinels)), uses=uses)
    doubled = sorted({token for token in sentinels if sentinels.count(token) > 1})
    doubled += [token for token in (special.pad, special.mask) if token is not None and token in sentinels]
    if doubled:
        message = f"{either(doubled)} has another meaning already. Each id must have one."
        yield Problem(key, message, shown(key, list(sentinels)), uses=("data.special_tokens.pad",))


def modes_are_no_sentinels(config: RunConfig) -> Found:
    """A mode's token must not be one that stands for a span."""
    data = config.data
    if data.objective != "ul2":
        return
    most = max(num_spans(data.seq_len, denoiser) for denoiser in data.ul2.denoisers)
    for number, denoiser in enumerate(data.ul2.denoisers):
        if denoiser.mode_token is not None and denoiser.mode_token < most:
            message = (
                f"is the sentinel of a span as well: with data.seq_len = {data.seq_len} samples have up to {most}. "
                f"Try {most} or more, here and for the other modes, or a smaller data.seq_len."
            )
            key = f"data.ul2.denoisers.{number}.mode_token"
            yield Problem(key, message, denoiser.mode_token, uses=("data.objective", "data.seq_len"))


def _changed(section: Section) -> Iterator[tuple[str, object]]:
    """Keys that are not at their defaults. All of these sections' keys have one."""
    untouched = _defaults(type(section))
    if section == untouched:
        return
    for name, value in section:
        if value != getattr(untouched, name):
            yield name, value


@cache
def _defaults(section: type[Section]) -> Section:
    """A section that nobody has set anything in."""
    return section()


def _longest(lengths: Lengths) -> int:
    return max(lengths.main, lengths.encoder)


def _with_seq_len(config: RunConfig, seq_len: int) -> Lengths:
    return config.lengths_of(config.data.with_keys({"seq_len": seq_len}))


def _undivided(lengths: Lengths, parts: int) -> bool:
    return lengths.main % parts != 0 or lengths.encoder % parts != 0


def _nearest_divided(config: RunConfig, parts: int) -> list[int]:
    """The nearest data.seq_len on either side whose sequences are multiples of `parts` and fit the model."""
    here = config.data.seq_len
    found = []
    for side in (range(here - 1, max(1, here - FARTHEST), -1), range(here + 1, here + FARTHEST)):
        for seq_len in side:
            lengths = _with_seq_len(config, seq_len)
            if not _undivided(lengths, parts) and _longest(lengths) <= config.model.max_seq_len:
                found.append(seq_len)
                break
    return found


def _told(lengths: Lengths) -> str:
    return f"sequences of {lengths.encoder} tokens for the encoder and {lengths.main} for the decoder"


OBJECTIVE_RULES = (
    objective_fits_family,
    other_objectives_are_silent,
    parts_of_objectives_are_used,
    shares_are_shares,
    documents_are_told_apart,
    samples_can_be_split,
    samples_fit_model,
    sentinels_suffice,
    modes_are_no_sentinels,
)

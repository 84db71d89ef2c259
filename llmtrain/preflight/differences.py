"""The checkpoint that a run would continue, and every key in which the two differ. Imports no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.checkpoint.folders import (
    BASE,
    CONFIG,
    MANIFEST,
    TEACHER,
    checkpoints_at,
)
from llmtrain.checkpoint.origin import Origin, newest_origin
from llmtrain.config.data import USUAL_PACKING, DataConfig
from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters, parameter_shapes
from llmtrain.config.reading.rendering import shown
from llmtrain.config.schema import OptimConfig, RunConfig, TrainConfig
from llmtrain.data.storage.manifest import TOKENIZER_NAMES, Manifest, file_sha256
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.token_roles import SETTINGS_NAME, read_settings
from llmtrain.errors import CheckpointError
from llmtrain.preflight.beginning import begins_at_base, checkpoints_of, is_elsewhere
from llmtrain.preflight.data_identity import LIMITS, data_record, stream_keys, windows_of
from llmtrain.preflight.label_fit import with_labels

FREE_MODEL_KEYS = ("init",)
"""Weights are drawn at the first step only."""

HEAD_KEYS = ("num_heads", "num_kv_heads", "head_dim")
"""How heads lie in the tensors, whatever their shapes."""

SWAPPED_KEYS = {"head", "num_labels", "labels", "head_dropout", "tie_embeddings", "scaled_head"}
"""The keys of a head. One for labels may take the place of a base's head for tokens: its weights are drawn."""

SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the checkpoint's. `value` is what the user wrote, `now` what it means.

    `fixed` marks what no permission can make fit.
    """

    key: str
    was: Any
    now: Any
    value: Any
    text: str
    fixed: bool = False
    advice: str = (
        "Set it back. The model's shape can never be allowed to change: that is a new run, under another name and "
        "with checkpoint.resume=auto."
    )
    """The advice where a difference cannot be allowed."""


def differences(origin: Origin, config: RunConfig, manifests: Sequence[Manifest] | None) -> list[Difference]:
    """Everything in which a run differs from a checkpoint that it would continue, and must not by itself.

    `manifests` are those of data.train, None where they could not be read: then neither data nor tokenizer are
    compared. Of imported weights only the model's shape and the tokenizer are. Raises CheckpointError where the
    checkpoint's configuration cannot be understood.
    """
    found = _model_differences(origin, config, manifests)
    if not origin.trained:
        found = [*_fixed(found, config), *_tokenizer_differences(origin, config, manifests)]
        return [*found, *_base_differences(origin, config)]
    if (was := origin.config.get("seed", config.seed)) != config.seed:
        found.append(_plain(origin, "seed", was, config.seed, config.seed))
    found += _optimizer_differences(origin, config.optim)
    found += _training_differences(origin, config)
    found += _other_base(origin, config)
    found += _teacher_differences(origin, config)
    found += _rounding_differences(origin, config)
    found += _data_differences(origin, config.data)
    found += _tokenizer_differences(origin, config, manifests)
    return found + _source_differences(origin, config, manifests)


def _fixed(found: Sequence[Difference], config: RunConfig) -> Iterator[Difference]:
    """Of differences from imported weights those that cannot be. New tokens can: their rows are drawn, and trained."""
    for item in found:
        if item.key == "model.vocab_size" and begins_at_base(config) and item.now > item.was:
            declared = declare_parameters(config.model, config.finetune) if config.model.vocab_size else {}
            frozen = [name for name, parameter in declared.items() if parameter.vocabulary and name in config.frozen]
            if frozen:
                text = f"the base {config.finetune and config.finetune.base} has {item.was} tokens, and new ones would "
                text += f"never be trained: {', '.join(frozen)} is frozen"
                advice = (
                    "Train it too (finetune.lora.train_also, optim.freeze), or give control tokens reserved pieces."
                )
                yield Difference(item.key, item.was, item.now, item.value, text, True, advice)
        elif item.fixed:
            yield item


def noted_changes(origin: Origin, config: RunConfig) -> list[Difference]:
    """Changes that are always allowed and worth a word: optimizer and batch size; for imported weights, the model."""
    if not origin.trained:
        return [item for item in _model_differences(origin, config, None) if not item.fixed]
    was = {**OptimConfig().model_dump(mode="json"), **origin.section("optim")}
    found = list(_changed(origin, was, config.optim.model_dump(mode="json"), "optim"))
    default = TrainConfig.model_fields["global_batch_size"].default
    found += _changed(
        origin, origin.section("prune"), config.prune.model_dump(mode="json") if config.prune else {}, "prune"
    )
    size, now = origin.section("train").get("global_batch_size", default), config.train.global_batch_size
    found += [_plain(origin, "train.global_batch_size", size, now, now)] if size != now else []
    ramp = [change.model_dump() for change in config.train.batch_ramp]
    before = origin.section("train").get("batch_ramp", [])
    return [*found, _plain(origin, "train.batch_ramp", before, ramp, ramp)] if before != ramp else found


def _plain(origin: Origin, key: str, was: Any, now: Any, value: Any, fixed: bool = False) -> Difference:
    return Difference(key, was, now, value, f"the checkpoint {origin.path} has {shown(key, was)}", fixed)


def _changed(
    origin: Origin,
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    key: str,
    fixed: Callable[[str], bool] = lambda path: False,
) -> Iterator[Difference]:
    """Keys of two sections that differ; `fixed` is asked with the dotted key."""
    for name in {**now, **was}:
        old, new, path = was.get(name), now.get(name), f"{key}.{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changed(origin, old, new, path, fixed)
        elif old != new:
            yield _plain(origin, path, old, new, "null" if new is None else new, fixed(path))


def _model_differences(origin: Origin, config: RunConfig, manifests: Sequence[Manifest] | None) -> list[Difference]:
    try:
        was = ModelConfig.model_validate(origin.section("model"))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        key = ".".join(("model", *map(str, reason["loc"])))
        raise CheckpointError(
            f"{origin.path / CONFIG}: {key}: {reason['msg']}. Another version of llmtrain may have saved it."
        ) from error
    now = config.model
    if now.vocab_size is None:
        vocab_size = manifests[0].vocab_size if manifests else was.vocab_size
        now = now.with_keys({"vocab_size": vocab_size})
    now = with_labels(now, manifests[0] if manifests else None)
    if now.predicts_labels and not now.is_sized and was.is_sized:
        now = now.with_keys({"labels": was.labels, "num_labels": was.num_labels})
    now = now.with_any_sizes()
    shaping = shape_keys(was, now)
    if not origin.trained and now.predicts_labels and not was.predicts_labels:
        shaping -= SWAPPED_KEYS
    before, after = _effective(was, now), _effective(now, was)
    if "learned" not in (was.position, now.position):
        before["max_seq_len"] = after["max_seq_len"]  # no weight and no number depends on it
    return list(_changed(origin, before, after, "model", lambda path: path.split(".")[1] in shaping))


def shape_keys(was: ModelConfig, now: ModelConfig) -> set[str]:
    """The keys whose difference changes which tensors there are, their shapes, or how heads lie in them.

    Each is tried alone, in both directions: a new kind of positions may bring a table along that other keys shape.
    """
    changed = [name for name in type(was).model_fields if getattr(was, name) != getattr(now, name)]
    found: set[str] = set(HEAD_KEYS)
    for name in changed:
        for base, other in ((was, now), (now, was)):
            one = base.with_keys({name: getattr(other, name)})
            if parameter_shapes(one.with_any_sizes()) != parameter_shapes(base):
                found.add(name)
    return found


def _effective(model: ModelConfig, other: ModelConfig) -> dict[str, Any]:
    """The section; a size that one of the two leaves out and the other writes is written out."""
    sizes = {"num_kv_heads": model.kv_heads, "head_dim": model.head_size, "ffn_hidden_size": model.ffn_size}
    written = {name: size for name, size in sizes.items() if getattr(model, name) or getattr(other, name)}
    everything = {**model.model_dump(mode="json"), **written}
    return {name: value for name, value in everything.items() if name not in FREE_MODEL_KEYS}


def _training_differences(origin: Origin, config: RunConfig) -> Iterator[Difference]:
    """A run trains the same parameters from its first step to its last. One that begins from another's checkpoint may
    freeze more of them, but has no moments of those that were frozen there."""
    if not config.model.is_sized:
        return
    patterns, finetune = tuple(origin.section("optim").get("freeze", ())), _finetune_of(origin)
    then = config.with_keys({"finetune": finetune, "optim.freeze": patterns})
    was, now = _trained(then), _trained(config)
    if then.method != config.method:
        text = f"the checkpoint {origin.path} was trained with {then.method}"
        advice = "Set it back. To train something else of its weights, name it as finetune.base, under another name."
        yield Difference("finetune.method", then.method, config.method, config.method, text, True, advice)
    elif finetune is not None and config.finetune is not None and config.method != "full":
        before, after = (getattr(each, config.method).model_dump(mode="json") for each in (finetune, config.finetune))
        # Others change what is computed with the same parameters, such as the factor of an update.
        yield from _changed(origin, before, after, f"finetune.{config.method}", lambda key: was != now)
    elif was != now and not (is_elsewhere(config) and now.items() < was.items()):
        text = f"the checkpoint {origin.path} was trained with {shown('optim.freeze', list(patterns))}"
        advice = "Set it back. To train other parameters, begin a new run that has this one as its finetune.base."
        frozen = list(config.optim.freeze)
        yield Difference("optim.freeze", list(patterns), frozen, frozen, text, True, advice)


def _finetune_of(origin: Origin) -> FinetuneConfig | None:
    section = origin.config.get("finetune")
    try:
        return None if section is None else FinetuneConfig.model_validate(section)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        key = ".".join(("finetune", *map(str, reason["loc"])))
        raise CheckpointError(f"{origin.path / CONFIG}: {key}: {reason['msg']}.") from error


def _trained(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of what is trained."""
    declared = declare_parameters(config.model, config.finetune)
    return {name: parameter.shape for name, parameter in declared.items() if name not in config.frozen}


def _goes_on(was: FinetuneConfig, config: RunConfig) -> bool:
    """True where a run trains what its base has beside its weights, and computes the same with it."""
    now = config.finetune
    if now is None or now.method != was.method:
        return False
    before, after = (declare_parameters(config.model, finetune) for finetune in (was, now))
    return before == after and was.lora.scale == now.lora.scale and was.adapter.activation == now.adapter.activation


def _base_differences(origin: Origin, config: RunConfig) -> Iterator[Difference]:
    """A base is a whole model: one that was finetuned by additions is merged first, or they are trained on."""
    finetune = _finetune_of(origin)
    method = finetune.method if finetune else "full"
    if finetune is not None and method != "full" and not _goes_on(finetune, config):
        text = f"has a {method} beside its weights, which would be lost"
        advice = (
            "Train it on with the same section finetune, or merge it: `llmtrain export RUN OUT --to hf`, then import "
            "OUT, and name the import."
        )
        key, base = "checkpoint.resume", config.checkpoint.resume
        if begins_at_base(config) and config.finetune is not None and config.finetune.base is not None:
            key, base = "finetune.base", config.finetune.base
        yield Difference(key, method, "full", base, text, True, advice)


def _other_base(origin: Origin, config: RunConfig) -> Iterator[Difference]:
    """The frozen weights of a run are those that it began with, wherever they lie by now."""
    base, told = config.finetune.base if config.finetune else None, origin.about.get(BASE)
    if base is None or not isinstance(told, dict):
        return
    place, found = Path(str(told.get("path"))), checkpoints_at(Path(base))
    if not place.is_dir() and place.parent in (each.absolute().parent for each in found):
        return  # it has gone from where it was: who opens the checkpoint says so
    hashes = [file_sha256(each / MANIFEST) for each in found]
    if hashes and str(told.get("manifest_sha256")) not in hashes:
        text = f"the checkpoint {origin.path} rests on {told.get('path')}, which is not among its checkpoints"
        advice = "Set it back. To train on another base, choose another name."
        yield Difference("finetune.base", told.get("path"), base, base, text, True, advice)


def _rounding_differences(origin: Origin, config: RunConfig) -> Iterator[Difference]:
    """The weights have been trained to be rounded as they were."""
    was, now = origin.config.get("quantize"), config.quantize and config.quantize.model_dump(mode="json")
    if isinstance(was, dict) and now is not None:
        yield from _changed(origin, was, now, "quantize")
    elif was != now:
        schemes = [each and each.get("scheme") for each in (was, now)]
        yield _plain(origin, "quantize", schemes[0], schemes[1], schemes[1])


def _teacher_differences(origin: Origin, config: RunConfig) -> Iterator[Difference]:
    """What a run learns follows from its teacher, and from how it is asked."""
    was, now = origin.config.get("distill"), config.distill and config.distill.model_dump(mode="json")
    if not isinstance(was, dict) or now is None:
        if was != now:
            told = [each and f"the teacher {each.get('teacher')}" for each in (was, now)]
            yield _plain(origin, "distill", told[0], told[1], told[1])
        return
    before, after = ({key: each.get(key) for key in now if key not in ("teacher", "model")} for each in (was, now))
    yield from _changed(origin, before, after, "distill")
    told, found = origin.about.get(TEACHER), newest_origin(checkpoints_of(Path(now["teacher"])))
    if isinstance(told, dict) and found is not None:
        sha256 = file_sha256(found.path / MANIFEST)
        if told.get("manifest_sha256") != sha256:
            text = (
                f"the checkpoint {origin.path} was taught by {told.get('path')}, and this is {found.path}, another one"
            )
            yield Difference("distill.teacher", told.get("path"), str(found.path), now["teacher"], text)


def _optimizer_differences(origin: Origin, optim: OptimConfig) -> Iterator[Difference]:
    was = origin.section("optim").get("name", OptimConfig().name)
    if was != optim.name:
        text = f"the checkpoint {origin.path} has the moments of another optimizer, {was}"
        advice = (
            f"Set it back. To train its weights on with {optim.name}, export it, import the export, and begin a new "
            "run from there with checkpoint.resume."
        )
        yield Difference("optim.name", was, optim.name, optim.name, text, True, advice)


def _data_differences(origin: Origin, data: DataConfig) -> Iterator[Difference]:
    now = stream_keys(data)
    defaults = DataConfig(train=data.train).model_dump(mode="json")
    section = origin.section("data")
    packing = section.get("packing") or USUAL_PACKING.get(section.get("objective", ""), "none")
    saved = {**defaults, **section, "windows": windows_of(section), "packing": packing}
    return _changed(origin, {name: saved[name] for name in now}, now, "data")


def _tokenizer_differences(
    origin: Origin, config: RunConfig, manifests: Sequence[Manifest] | None
) -> Iterator[Difference]:
    was = saved_tokenizer(origin)
    if not manifests or was is None or has_tokenizer(origin, manifests[0].tokenizer_sha256):
        return
    now = manifests[0].tokenizer_sha256
    text = (
        f"the tokenizer of {shown_path(config.data.train[0].path)} has sha256 {now[:SHOWN_DIGITS]}, "
        f"that of the checkpoint {origin.path} has {was[:SHOWN_DIGITS]}"
    )
    yield Difference("data.tokenizer", was, now, config.data.tokenizer, text)


def has_tokenizer(origin: Origin, sha256: str) -> bool:
    """True where the checkpoint's tokenizer is the one with this hash, or was proved to give the same ids."""
    if saved_tokenizer(origin) == sha256:
        return True
    settings = origin.path.absolute().parent.parent / SETTINGS_NAME
    # An own export has a tokenizer that was proved to give the same ids as the one beside the imported weights.
    return not origin.trained and settings.is_file() and sha256 in read_settings(settings).equal_sha256


def saved_tokenizer(origin: Origin) -> str | None:
    """The hash that the checkpoint says, or for imported weights that of the file beside them; None for neither."""
    said = origin.about.get("data", {}).get("tokenizer_sha256")
    if said is not None or origin.trained:
        return said
    run = origin.path.absolute().parent.parent
    return next((file_sha256(run / name) for name in TOKENIZER_NAMES if (run / name).is_file()), None)


def _source_differences(origin: Origin, config: RunConfig, manifests: Sequence[Manifest] | None) -> list[Difference]:
    was = origin.about.get("data", {}).get("sources")
    if not manifests or was is None:
        return []
    now = data_record(config, manifests)["sources"]
    if len(was) != len(now):
        paths = [[source["path"] for source in sources] for sources in (was, now)]
        text = f"the checkpoint {origin.path} was trained on {shown('data.train', paths[0])}"
        return [Difference("data.train", was, now, paths[1], text)]
    found = []
    same_shares = _shares(was) == _shares(now)
    for number, (old, new) in enumerate(zip(was, now, strict=True)):
        key, digest = f"data.train.{number}", "content_sha256"
        if old[digest] != new[digest]:
            text = (
                f"its content has sha256 {new[digest][:SHOWN_DIGITS]}; the checkpoint {origin.path} was trained on "
                f"{old['path']} with {old[digest][:SHOWN_DIGITS]}"
            )
            found.append(Difference(f"{key}.path", old, new, new["path"], text))
        if old["weight"] != new["weight"] and not same_shares:
            found.append(_plain(origin, f"{key}.weight", old["weight"], new["weight"], new["weight"]))
        limits = ((name, old.get(name), new.get(name)) for name in LIMITS)
        found += [_plain(origin, f"{key}.{name}", was, now, now) for name, was, now in limits if was != now]
    return found


def _shares(sources: Sequence[Mapping[str, Any]]) -> list[int]:
    """Weights without their common divisor, which the schedule does not depend on."""
    weights = [source["weight"] for source in sources]
    return [weight // gcd(*weights) for weight in weights]

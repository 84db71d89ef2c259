"""The identity of a stream of samples: which data it comes from, and which sample a number means. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmtrain.config.data import DataConfig, WindowKind
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.token_roles import TrainedTokens

FREE_DATA_KEYS = (
    "valid",
    "verify",
    "on_corrupt",
    "max_skipped",
    "cache_dir",
    "cache_limit_gb",
    "fetch_attempts",
    "fetch_timeout_seconds",
    "prefetch_steps",
)
"""They do not change which sample a number means. All other keys of the section are compared, so that a new one is."""


LIMITS = ("max_epochs", "max_samples", "max_tokens")
"""Keys of a source that end it."""


def content_sha256(manifest: Manifest) -> str:
    """A hash of what a data set holds: tokens, documents, their order. Neither its place nor names of files count."""
    meaning: tuple[Any, ...] = (manifest.tokenizer_sha256, manifest.vocab_size, manifest.dtype, manifest.eos_id)
    if manifest.bos_ids:
        meaning = (*meaning, manifest.bos_ids)
    if manifest.targets != "none":
        labels = asdict(manifest.labels) if manifest.labels else None
        meaning = (*meaning, manifest.targets, manifest.chat.end_ids if manifest.chat else None, labels)
    shards = [(shard.sha256, shard.samples, shard.tokens) for shard in manifest.shards]
    return hashlib.sha256(json.dumps([meaning, shards]).encode()).hexdigest()


def data_record(config: RunConfig, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The record in a checkpoint of the data that it was trained on, as JSON. `manifests` are those of data.train."""
    sources = [
        {
            "path": shown_path(source.path),
            "weight": source.weight,
            "content_sha256": content_sha256(manifest),
            **{name: limit for name in LIMITS if (limit := getattr(source, name)) is not None},
        }
        for source, manifest in zip(config.data.train, manifests, strict=True)
    ]
    first = manifests[0]
    tokens = TrainedTokens(first.tokenizer_sha256, first.eos_id, first.bos_ids, bool(first.settings_sha256))
    return {**tokens.to_json(), "sources": sources}


def evaluation_record(config: RunConfig, manifests: Sequence[Manifest]) -> str | None:
    """A hash of what the metric of an evaluation is, and measured on; `manifests` are those of data.valid. None where
    there are none.

    Values are compared where it is equal: the metric, the data and how much of it is read may change at any time.
    """
    if not manifests:
        return None
    weights = [source.weight for source in config.data.valid]
    sources = list(zip(weights, map(content_sha256, manifests), strict=True))
    samples = config.evaluate.steps * config.train.global_batch_size
    keys = stream_keys(config.data)
    del keys["schedule"], keys["augment"]  # of training
    if keys["packing"] == "none":
        del keys["packing"]  # as before there was the key: losses from then are compared
    for name in ("chat", "labels"):
        if config.data.objective != name:
            del keys[name]  # so with these
    # As before there was a choice: losses from then are compared.
    metric = [] if config.evaluate.metric == "loss" else [config.evaluate.metric]
    return hashlib.sha256(json.dumps([sources, samples, keys, config.seed, *metric]).encode()).hexdigest()


def windows_of(data: Mapping[str, Any]) -> WindowKind:
    """The meaning of data.windows in a section as it was saved: before there was the key, samples lay in one shard."""
    return "per_shard" if data.get("windows", "per_shard") == "per_shard" else "continuous"


def stream_keys(data: DataConfig) -> dict[str, Any]:
    """The keys that decide, beside the sources, which sample a number means."""
    elsewhere = ("train", "tokenizer", *FREE_DATA_KEYS)
    keys = {name: value for name, value in data.model_dump(mode="json").items() if name not in elsewhere}
    return {**keys, "windows": windows_of(keys), "packing": data.packing_kind}

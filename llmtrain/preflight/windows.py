"""How a run cuts its data into samples, and how much of the data that uses.

Before `data.windows` was a key, every sample lay in one shard. What sample n is must not change under a run, so one
that goes on from such a checkpoint stays with that. Imports no torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

from llmtrain.checkpoint.origin import newest_origin
from llmtrain.config.schema import RunConfig, SourceConfig, WindowKind
from llmtrain.data.storage.folders import fetch_config, open_folder
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.usage import DataUse, data_use, samples_once
from llmtrain.preflight.resume_rules import resume_target, windows_of


@dataclass(frozen=True)
class SourceUse:
    """What a run makes of one source. `epochs`: how often it goes through it; an evaluation, how much of it it reads,
    each time, and once at most."""

    split: str
    path: str
    weight: int
    use: DataUse
    epochs: float

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        return {**{key: value for key, value in asdict(self).items() if key != "use"}, **asdict(self.use)}


def with_windows(config: RunConfig) -> RunConfig:
    """The configuration with data.windows filled in."""
    if config.data.windows is not None:
        return config
    target = resume_target(config)
    origin = newest_origin(target) if target else None
    windows: WindowKind = windows_of(origin.section("data")) if origin and origin.trained else "continuous"
    return config.with_keys({"data.windows": windows})


def source_uses(config: RunConfig) -> list[SourceUse]:
    """What a run makes of each of its sources. Reads manifests, raises DataError."""
    data, batch_size = config.data, config.train.global_batch_size
    train = _uses(config, "train", data.train, config.total_steps * batch_size)
    return train + _uses(config, "valid", data.valid, config.evaluate.steps * batch_size)


def _uses(config: RunConfig, split: str, sources: tuple[SourceConfig, ...], samples: int) -> list[SourceUse]:
    data, found = config.data, []
    for source in sources:
        manifest = open_folder(source.path, fetch_config(data)).read_manifest()
        use = data_use(manifest, data.seq_len, data.windows or "continuous")
        taken = samples * source.weight / sum(other.weight for other in sources)
        if split == "valid":
            taken = min(taken, samples_once(manifest, data.seq_len, data.windows or "continuous"))
        found.append(SourceUse(split, shown_path(source.path), source.weight, use, taken / use.samples))
    return found

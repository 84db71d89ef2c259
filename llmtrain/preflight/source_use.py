"""How much of its data a run uses. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmtrain.config.schema import RunConfig, SourceConfig
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.stream import DataUse, data_use, samples_once
from llmtrain.preflight.resolve import ResolvedRun


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


def source_uses(resolved: ResolvedRun) -> list[SourceUse]:
    """What a run makes of each of its sources."""
    config, batch_size = resolved.config, resolved.config.train.global_batch_size
    train = list(zip(config.data.train, resolved.train, strict=True))
    valid = list(zip(config.data.valid, resolved.valid, strict=True))
    return [
        *_uses(config, "train", train, config.total_steps * batch_size),
        *_uses(config, "valid", valid, config.evaluate.steps * batch_size),
    ]


def _uses(
    config: RunConfig, split: str, sources: Sequence[tuple[SourceConfig, Manifest]], samples: int
) -> list[SourceUse]:
    data, found = config.data, []
    for source, manifest in sources:
        use = data_use(manifest, data.seq_len, data.windows or "continuous")
        taken = samples * source.weight / sum(other.weight for other, _ in sources)
        if split == "valid":
            taken = min(taken, samples_once(manifest, data.seq_len, data.windows or "continuous"))
        found.append(SourceUse(split, shown_path(source.path), source.weight, use, taken / use.samples))
    return found

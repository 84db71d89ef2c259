"""The use that a run makes of its sources: how much of each it reads, and whether they last. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmtrain.config.budget import Budget, Seen, seen_by
from llmtrain.config.data import DataSetConfig
from llmtrain.config.rules.mixture import MIXTURE_RULES
from llmtrain.config.schema import RunConfig
from llmtrain.data.mixture import Mixture, Phase
from llmtrain.data.packing_table import Packing, packing_of
from llmtrain.data.storage.folders import fetch_config, open_folder
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.stream import DataUse, data_use, sample_limit, samples_of_epochs
from llmtrain.errors import ConfigError, Problem
from llmtrain.preflight.beginning import run_origin
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.words import counted


@dataclass(frozen=True)
class SourceUse:
    """The use that a run makes of one source. `epochs`: how often it goes through the source. An evaluation reads the
    same part of it each time, and each sample once at most. From step `leaves_at_step` on the mixture has no more of
    the source, which has given all that it may; None where that never comes."""

    split: str
    path: str
    weight: int
    use: DataUse
    epochs: float
    leaves_at_step: int | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        return {**{key: value for key, value in asdict(self).items() if key != "use"}, **asdict(self.use)}


def source_uses(resolved: ResolvedRun) -> list[SourceUse]:
    """The use that a run makes of each of its sources. Raises DataError as `packing_of` does."""
    config, data = resolved.config, resolved.config.data
    sizes, windows = config.train.batch_sizes, data.windows or "continuous"
    packings = _packings(config, data.train, resolved.train)
    mixture = _mixture(config, resolved.train, packings)
    counts = mixture.counts(sizes.before(config.total_steps + 1))
    left = {drop.source: sizes.last_step(drop.first_sample + 1) for drop in mixture.exhausted}
    left = {source: step for source, step in left.items() if step <= config.total_steps}
    found = []
    for number, (source, manifest) in enumerate(zip(data.train, resolved.train, strict=True)):
        use = data_use(manifest, data.seq_len, windows, packings[number])
        epochs = counts[number] / use.samples
        found.append(SourceUse("train", shown_path(source.path), source.weight, use, epochs, left.get(number)))
    samples = config.evaluate.steps * config.train.global_batch_size
    weights = sum(source.weight for source in data.valid)
    packings = _packings(config, data.valid, resolved.valid)
    for source, manifest, packing in zip(data.valid, resolved.valid, packings, strict=True):
        use = data_use(manifest, data.seq_len, windows, packing)
        taken = min(samples * source.weight / weights, samples_of_epochs(manifest, data.seq_len, windows, packing))
        found.append(SourceUse("valid", shown_path(source.path), source.weight, use, taken / use.samples))
    return found


def use_notes(uses: Sequence[SourceUse]) -> Iterator[str]:
    """What is worth a word where a run begins: sources that will leave the mixture, and what packing costs."""
    for use in uses:
        if use.split == "train" and use.use.is_packed:
            yield f"{use.path}: packed, {use.use.unused_text}"
        if use.leaves_at_step is not None:
            step = f"{use.leaves_at_step:,}"
            yield f"{use.path}: has given all that it may in step {step}; the others go on without it"


def too_long_problems(config: RunConfig, train: Sequence[Manifest], valid: Sequence[Manifest]) -> list[Problem]:
    """Documents that no sample can hold and that may not be left out. Raises DataError as `packing_of`."""
    if config.data.too_long not in ("error", "drop"):
        return []
    try:
        _packings(config, config.data.train, train)
        _packings(config, config.data.valid, valid)
    except ConfigError as error:
        return error.problems
    return []


def lasting_problems(config: RunConfig, manifests: Sequence[Manifest]) -> list[Problem]:
    """The sources of data.train give as many samples as the run takes. `manifests` are theirs.

    Raises DataError as `packing_of` does.
    """
    data = config.data
    limits = ("max_epochs", "max_samples", "max_tokens")
    limited = [any(getattr(source, name) is not None for name in limits) for source in data.train]
    if not any(limited) or any(True for rule in MIXTURE_RULES for _ in rule(config)):
        return []
    problems = []
    packings = _packings(config, data.train, manifests)
    for number, (source, manifest, packing) in enumerate(zip(data.train, manifests, packings, strict=True)):
        if sample_limit(source, data, manifest, packing) == 0:
            message = f"allows less than one sample of data.seq_len = {data.seq_len} tokens. Try {10 * data.seq_len}."
            problems.append(Problem(f"data.train.{number}.max_tokens", message, source.max_tokens))
    if problems or (config.train.steps is None) == (config.train.tokens is None):
        return problems
    end = _mixture(config, manifests, packings).end
    seen, position = _position(config)
    last_step, sizes = Budget.of(config).last_step(seen), config.train.batch_sizes
    needed = position + sizes.before(last_step + 1) - sizes.before(seen.step + 1)
    if end is None or end >= needed or last_step <= seen.step:
        return []
    fitting = sizes.last_step(end - position + 1, seen.step) - 1
    keys = tuple(f"data.train.{number}" for number, is_limited in enumerate(limited) if is_limited)
    message = (
        f"its sources give {counted(end, 'sample')} with max_epochs, max_samples and max_tokens as they are, and the "
        f"run takes {needed:,}, up to step {last_step:,}. Raise one of them"
        + (f", or set train.steps={fitting}." if fitting > seen.step else ".")
    )
    uses = (*keys, "train.steps", "train.tokens", "train.epochs", "train.global_batch_size")
    return [Problem("data.train", message, uses=uses)]


def _position(config: RunConfig) -> tuple[Seen, int]:
    """What lies behind the run, and its position in the stream of samples."""
    origin = run_origin(config)
    if origin is None or not origin.trained:
        return Seen(), 0
    state = origin.state["train"]
    return seen_by(state, origin.config), int(state["samples"])


def _packings(
    config: RunConfig, sources: Sequence[DataSetConfig], manifests: Sequence[Manifest]
) -> list[Packing | None]:
    fetch = fetch_config(config.data)
    folders = [open_folder(source.path, fetch) for source in sources]
    return [packing_of(folder, manifest, config.data) for folder, manifest in zip(folders, manifests, strict=True)]


def _mixture(config: RunConfig, manifests: Sequence[Manifest], packings: Sequence[Packing | None]) -> Mixture:
    """The mixture that the run reads; data.schedule names samples already."""
    data = config.data
    phases = [Phase(0, tuple(source.weight for source in data.train))]
    phases += [Phase(phase.first_sample, phase.weights) for phase in data.schedule]
    found = zip(data.train, manifests, packings, strict=True)
    return Mixture(phases, [sample_limit(source, data, manifest, packing) for source, manifest, packing in found])

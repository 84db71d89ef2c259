"""A run's configuration with everything that follows from it and from its data, derived once per process and handed on.

What the configuration leaves open is filled in here, before a run starts, so that the run folder says it: the kind of
windows, the ids that the model has to know, of the data's tokenizer and of its objective, and how many tokens epochs
are. Imports no torch, and a tokenizer only where one has to be asked.
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config.data import DataConfig, DataSetConfig, SpecialTokensConfig, WindowKind, needed_tokens
from llmtrain.config.patience import EarlyStop
from llmtrain.config.reading.rendering import shown
from llmtrain.config.rules.mixture import first_sample_of
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import NUM_SENTINELS, Lengths, num_sentinels
from llmtrain.config.tasks.schema import TaskConfig
from llmtrain.data.storage.folders import fetch_config, open_folder, run_settings, run_tokenizer
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import shown_path
from llmtrain.errors import ConfigError, DataError, Problem
from llmtrain.parallel.layout import Layout, plan_layout
from llmtrain.preflight.beginning import run_origin
from llmtrain.preflight.data_identity import evaluation_record, windows_of
from llmtrain.preflight.epochs import with_epochs
from llmtrain.preflight.label_fit import fill_labels
from llmtrain.preflight.task_files import run_tasks
from llmtrain.preflight.teacher import fill_teacher

if TYPE_CHECKING:
    from llmtrain.values.tokenizer import Tokenizer

FIM_NAMES = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
)
"""Names that tokenizers have for the sentinels of fim."""

SPECIAL_KEY = "data.special_tokens"

Manifests = MutableMapping[str, Manifest]
"""The manifests that were read already, by the path of the source. Some data sets have ten thousand shards, and a
source may be named twice: a process reads each manifest once."""


@dataclass(frozen=True)
class ResolvedRun:
    """All that a run is made from. In `config` everything that the data decides is filled in: vocabulary size, special
    tokens, kind of windows, tokens of epochs. `asked` is the user's. `train` and `valid` are manifests of the sources,
    in order."""

    config: RunConfig
    asked: RunConfig
    train: tuple[Manifest, ...]
    valid: tuple[Manifest, ...]
    tasks: tuple[TaskConfig, ...] = ()

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @cached_property
    def layout(self) -> Layout:
        """The layout of launch.num_workers ranks."""
        return plan_layout(self.config.parallel, self.config.launch.num_workers)

    @cached_property
    def lengths(self) -> Lengths:
        """Of every sample, padding included."""
        return self.config.lengths

    @cached_property
    def early_stop(self) -> EarlyStop | None:
        """When the run ends before its last step; None where it does not."""
        return EarlyStop.of(self.config.evaluate, evaluation_record(self.config, self.valid))

    @cached_property
    def tokenizer(self) -> Path:
        """The run's tokenizer, of which the hash is right. Raises ConfigError, DamagedFileError."""
        return run_tokenizer(self.config.data, self.train[0])


def resolve(config: RunConfig) -> ResolvedRun:
    """Read what a configuration leaves to its data. It was checked when the run was started, or is that of a test.

    Each process of a run does this for itself: what the data was when another one looked does not count. Raises
    ConfigError where something cannot be filled in, DataError where a manifest or the tokenizer is damaged.
    """
    manifests: Manifests = {}
    train = read_manifests(config.data.train, config.data, manifests)
    special, needed = config.data.special_tokens, needed_tokens(config.model.family, config.data.objective)
    is_filled = config.model.vocab_size is not None and all(getattr(special, name) is not None for name in needed)
    filled = config if is_filled and not config.model.predicts_labels else fill_vocabulary(config, train[0])
    filled = filled if isinstance(filled, list) else fill_teacher(filled, train[0])
    if isinstance(filled, list):
        raise ConfigError(filled)
    valid = read_manifests(config.data.valid, config.data, manifests)
    filled = with_epochs(with_windows(filled), train)
    return ResolvedRun(filled, config, train, valid, run_tasks(config))


def read_manifests(sources: tuple[DataSetConfig, ...], data: DataConfig, manifests: Manifests) -> tuple[Manifest, ...]:
    """The manifests of the sources, in order. Those that `manifests` lacks are read and put there. Raises DataError."""
    for source in sources:
        if source.path not in manifests:
            manifests[source.path] = open_folder(source.path, fetch_config(data)).read_manifest()
    return tuple(manifests[source.path] for source in sources)


def with_windows(config: RunConfig) -> RunConfig:
    """The configuration with data.windows filled in, and in data.schedule the samples that phases begin with.

    Before that was a key, every sample lay in one shard. What sample n is must not change under a run, so one that goes
    on from such a checkpoint stays with that. Packed samples are no windows.
    """
    config = _with_samples(config)
    if config.data.windows is not None or config.data.packing_kind != "none":
        return config
    origin = run_origin(config)
    windows: WindowKind = windows_of(origin.section("data")) if origin and origin.trained else "continuous"
    return config.with_keys({"data.windows": windows})


def _with_samples(config: RunConfig) -> RunConfig:
    """The configuration whose data.schedule names samples. A phase that breaks a rule stays what it is, and is told."""
    phases = [
        {"from_sample": first_sample_of(config, number), "weights": phase.weights} if phase.from_step else phase
        for number, phase in enumerate(config.data.schedule)
    ]
    return config.with_keys({"data.schedule": phases}) if phases else config


def fill_vocabulary(config: RunConfig, manifest: Manifest) -> RunConfig | list[Problem]:
    """The configuration with model.vocab_size, the data.special_tokens that its objective needs, and labels filled in.

    `manifest` is that of the first training source. Returns problems where something is impossible or an id is wrong;
    raises DataError where the data set's tokenizer is damaged.
    """
    special, needed = config.data.special_tokens, needed_tokens(config.model.family, config.data.objective)
    if needed:
        tokenizer = _find_tokenizer(config, manifest)
        if isinstance(tokenizer, Problem):
            return [tokenizer]
        special, problems = _filled(config, tokenizer)
        problems = problems or [*_wrong_ids(special, needed, tokenizer)]
        if problems:
            return problems
    ids = [token for name in needed for token in _ids(special, name)]
    size = max([manifest.vocab_size, *(token + 1 for token in ids)])
    if config.model.vocab_size is not None and config.model.vocab_size < size:
        return [_too_small(config, manifest, size)]
    config = config.with_keys({"model.vocab_size": config.model.vocab_size or size, SPECIAL_KEY: special})
    return fill_labels(config, manifest)


def _find_tokenizer(config: RunConfig, manifest: Manifest) -> "Tokenizer | Problem":
    from llmtrain.data.tokenizer import load_tokenizer  # its libraries are slow to import

    try:
        return load_tokenizer(run_tokenizer(config.data, manifest), run_settings(config.data, manifest))
    except (ConfigError, DataError) as error:
        if isinstance(error, DataError) and config.data.tokenizer is None:
            raise  # of the data set itself: nothing in the configuration would mend it
        message = f"data.objective = {config.data.objective} needs it, for special tokens: {error}"
        return Problem("data.tokenizer", message, config.data.tokenizer, uses=("data.objective",))


def _filled(config: RunConfig, tokenizer: "Tokenizer") -> tuple[SpecialTokensConfig, list[Problem]]:
    """Special tokens with what the objective needs, and what nothing can be filled in for."""
    special, objective = config.data.special_tokens, config.data.objective
    found: dict[str, object] = {}
    problems = []
    for name in needed_tokens(config.model.family, objective):
        if getattr(special, name) is not None:
            continue
        if name == "sentinels":
            found[name] = _find_sentinels(config, tokenizer)
            continue
        token = tokenizer.mask_id if name == "mask" else tokenizer.pad_id
        if token is None:
            message = (
                f"data.objective = {objective} needs a {name} token, and {tokenizer.path} has none. Try "
                f"{SPECIAL_KEY}.{name}={tokenizer.vocab_size}, the first id that the tokenizer leaves free."
            )
            problems.append(Problem(f"{SPECIAL_KEY}.{name}", message, uses=("data.objective",)))
        found[name] = token
    return special.with_keys(found), problems


def _find_sentinels(config: RunConfig, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The sentinels of the tokenizer, where they suffice, else ids above all others in use."""
    count, special = num_sentinels(config.data), config.data.special_tokens
    if config.data.objective == "fim":
        families, wanted = FIM_NAMES, count
    else:
        families, wanted = ([f"<extra_id_{number}>" for number in range(max(count, NUM_SENTINELS))],), NUM_SENTINELS
    for names in families:
        ids = [token for token in map(tokenizer.special_id, names) if token is not None]
        if len(ids) >= count and ids == [tokenizer.special_id(name) for name in names[: len(ids)]]:
            return tuple(ids)
    first = max([tokenizer.vocab_size, *(token + 1 for token in (special.mask, special.pad) if token is not None)])
    return tuple(range(first, first + max(count, wanted)))


def _ids(special: SpecialTokensConfig, name: str) -> tuple[int, ...]:
    value = getattr(special, name)
    return value if isinstance(value, tuple) else (value,)


def _wrong_ids(special: SpecialTokensConfig, needed: tuple[str, ...], tokenizer: "Tokenizer") -> Iterator[Problem]:
    """A special token must not occur in the data: its id is a special one of the tokenizer, or lies above them all."""
    is_special = tokenizer.special
    for name in needed:
        for token in _ids(special, name):
            key = f"{SPECIAL_KEY}.{name}"
            if token < tokenizer.vocab_size and not is_special[token]:
                piece = shown(key, tokenizer.pieces[token])
                message = (
                    f"{token} is the piece {piece} of {tokenizer.path}, which texts contain. Give the id of a special "
                    f"token, or one from {tokenizer.vocab_size} on, which the tokenizer leaves free; null finds one."
                )
                yield Problem(key, message, token)
            elif token == tokenizer.eos_id and name != "pad":
                message = f"{token} ends every document ({tokenizer.path}). Give another id; null finds one."
                yield Problem(key, message, token)


def _too_small(config: RunConfig, manifest: Manifest, size: int) -> Problem:
    tokens = f"the data's tokenizer has {manifest.vocab_size} tokens ({shown_path(config.data.train[0].path)})"
    if size > manifest.vocab_size:
        tokens += f", and data.objective = {config.data.objective} uses ids up to {size - 1}"
    message = f"{tokens}. Try model.vocab_size={size}, or null to take it from the data."
    return Problem("model.vocab_size", message, config.model.vocab_size, uses=("data.objective",))

"""A run's configuration, with all that follows from it and from its data: derived once per process, and handed on."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmtrain.config.schema import DataConfig, RunConfig, SourceConfig
from llmtrain.config.sequence_lengths import Lengths, sample_lengths
from llmtrain.data.storage.folders import fetch_config, open_folder, run_tokenizer
from llmtrain.data.storage.manifest import Manifest
from llmtrain.errors import ConfigError
from llmtrain.parallel.layout import Layout, plan_layout
from llmtrain.preflight.vocabulary import fill_vocabulary, is_filled
from llmtrain.preflight.windows import with_windows

Manifests = MutableMapping[str, Manifest]
"""What was read already, by the path of the source. Some data sets have ten thousand shards, and a source may be named
twice: a process reads each manifest once."""


@dataclass(frozen=True)
class ResolvedRun:
    """What a run is made from. `config` has what the data decides filled in: the vocabulary's size, special tokens and
    kind of windows; `asked` is what the user wrote. `train` and `valid` are the manifests of its sources, in order."""

    config: RunConfig
    asked: RunConfig
    train: tuple[Manifest, ...]
    valid: tuple[Manifest, ...]

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @cached_property
    def layout(self) -> Layout:
        """That of launch.num_workers ranks."""
        return plan_layout(self.config.parallel, self.config.launch.num_workers)

    @cached_property
    def lengths(self) -> Lengths:
        """Of every sample, padding included."""
        return sample_lengths(self.config.model.family, self.config.data)

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
    filled = config if is_filled(config) else fill_vocabulary(config, train[0])
    if isinstance(filled, list):
        raise ConfigError(filled)
    valid = read_manifests(config.data.valid, config.data, manifests)
    return ResolvedRun(with_windows(filled), config, train, valid)


def read_manifests(sources: tuple[SourceConfig, ...], data: DataConfig, manifests: Manifests) -> tuple[Manifest, ...]:
    """Those of the sources, in order. What `manifests` lacks is read, and then there. Raises DataError."""
    for source in sources:
        if source.path not in manifests:
            manifests[source.path] = open_folder(source.path, fetch_config(data)).read_manifest()
    return tuple(manifests[source.path] for source in sources)

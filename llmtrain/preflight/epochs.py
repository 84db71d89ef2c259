"""The length of a run in epochs of its data, which is as many tokens as their samples have. Imports no torch."""

from collections.abc import Sequence

from llmtrain.config.rules.arithmetic import profile_is_inside_the_run
from llmtrain.config.schema import RunConfig
from llmtrain.data.packing_table import packing_of
from llmtrain.data.storage.folders import fetch_config, open_folder
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.stream import samples_of_epochs
from llmtrain.errors import Problem


def with_epochs(config: RunConfig, manifests: Sequence[Manifest]) -> RunConfig:
    """The configuration with train.tokens filled in, where it has train.epochs alone. data.windows is known.

    `manifests` are those of data.train. What breaks a rule stays what it is, and is told. Raises as `packing_of` does.
    """
    if config.train.epochs is None or config.train.tokens is not None or len(manifests) != 1:
        return config
    tokens = _epoch_tokens(config, manifests[0])
    return config.with_keys({"train.tokens": tokens}) if tokens else config


def epochs_problems(config: RunConfig, manifests: Sequence[Manifest]) -> list[Problem]:
    """The problems of a length that the data had to be asked for, where the configuration has such a one.

    Raises as `packing_of` does.
    """
    if config.train.epochs is None or config.train.steps is not None or len(manifests) != 1:
        return []
    tokens, path = _epoch_tokens(config, manifests[0]), shown_path(config.data.train[0].path)
    if not tokens:
        return []  # less than one sample is a problem of its own
    if config.train.tokens not in (None, tokens):
        message = (
            f"train.epochs = {config.train.epochs} of {path} are {tokens} tokens. Remove one of the two: "
            "train.tokens=null, or train.epochs=null."
        )
        return [Problem("train.tokens", message, config.train.tokens, uses=("train.epochs", "data.train"))]
    return list(profile_is_inside_the_run(with_epochs(config, manifests)))


def _epoch_tokens(config: RunConfig, manifest: Manifest) -> int:
    data = config.data
    packing = packing_of(open_folder(data.train[0].path, fetch_config(data)), manifest, data)
    windows = data.windows or "continuous"
    assert config.train.epochs is not None
    return data.seq_len * samples_of_epochs(manifest, data.seq_len, windows, packing, config.train.epochs)

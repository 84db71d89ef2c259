"""Which ids a run's model has to know: those of the data's tokenizer, and the special tokens of its objective.

What the configuration leaves open is filled in here, before a run starts, so that the run folder says it. Imports no
torch, and a tokenizer only where one has to be asked.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtrain.config.objective import SpecialTokensConfig, needed_tokens
from llmtrain.config.reading.key_names import shown
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import NUM_SENTINELS, num_sentinels
from llmtrain.data.storage.folders import run_settings, run_tokenizer
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import shown_path
from llmtrain.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from llmtrain.values.tokenizer import Tokenizer

FIM_NAMES = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
)
"""What tokenizers call fim's sentinels."""

SPECIAL_KEY = "data.special_tokens"


def is_filled(config: RunConfig) -> bool:
    """Whether the configuration leaves nothing of this open."""
    names = needed_tokens(config.model.family, config.data.objective)
    given = all(getattr(config.data.special_tokens, name) is not None for name in names)
    return config.model.vocab_size is not None and given


def fill_vocabulary(config: RunConfig, manifest: Manifest) -> RunConfig | list[Problem]:
    """The configuration with model.vocab_size and the data.special_tokens that its objective needs filled in.

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
    return config.with_keys({"model.vocab_size": config.model.vocab_size or size, SPECIAL_KEY: special})


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
    """Those that the tokenizer has, where they suffice, else ids above all others in use."""
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

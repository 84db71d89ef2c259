"""The last look before a run takes any device, at everything on storage that its configuration names.

Reads manifests only, no shard and no token. Imports no torch, so that a mistake is told within a second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.folders import CHECKPOINTS, Room, plan_room
from llmtrain.checkpoint.origin import newest_origin
from llmtrain.config.budget import Budget, Seen, seen_by
from llmtrain.config.data import DataSetConfig
from llmtrain.config.parameters import num_trained
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.folders import fetch_config, run_settings, run_tokenizer, scheme_fault
from llmtrain.data.storage.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAMES,
    Manifest,
    file_sha256,
    parse_manifest,
    read_manifest,
)
from llmtrain.data.storage.remote import RemoteFolder, scheme_of, shown_path
from llmtrain.data.storage.skipped import LEDGER_NAME, SkippedShards
from llmtrain.data.stream import data_use
from llmtrain.data.target_sources import target_faults
from llmtrain.errors import ConfigError, DataError, Problem
from llmtrain.optim.table import row_of
from llmtrain.preflight.epochs import epochs_problems, with_epochs
from llmtrain.preflight.label_fit import LABEL_KEYS
from llmtrain.preflight.resolve import (
    SPECIAL_KEY,
    Manifests,
    ResolvedRun,
    fill_vocabulary,
    read_manifests,
    with_windows,
)
from llmtrain.preflight.resume_rules import difference_problems, resume_problems
from llmtrain.preflight.source_use import lasting_problems, too_long_problems
from llmtrain.preflight.task_files import run_tasks, task_problems
from llmtrain.preflight.teacher import fill_teacher
from llmtrain.runs.audit import iter_events
from llmtrain.runs.file_system import folder_fault
from llmtrain.words import bytes_text, looked_from

FIRST = "data.train.0.path"
"""The source whose tokenizer is that of the run."""

SHARDS_HINT = "Write it with `llmtrain data shards INPUT... OUT --tokenizer MODEL`."


@dataclass(frozen=True)
class StorageCheck:
    """The problems that were found on storage, or where there are none the resolved run."""

    problems: list[Problem]
    run: ResolvedRun | None = None


def load_run(
    path: Path, overrides: Sequence[str] = (), world_size: int | None = None, asks_room: bool = True
) -> ResolvedRun:
    """Read a run's configuration and check it in every way that needs no device, storage included.

    The parameters are those of `load_config` and of `check_storage`. Raises ConfigError with every problem, DataError.
    """
    checks: list[StorageCheck] = []

    def problems_of(config: RunConfig) -> list[Problem]:
        checks.append(check_storage(config, asks_room))
        return checks[-1].problems

    load_config(path, overrides, problems_of, world_size)
    resolved = checks[-1].run
    assert resolved is not None, "a configuration with problems is not loaded"
    return resolved


def check_storage(config: RunConfig, asks_room: bool = True) -> StorageCheck:
    """Look whether all that the run needs is on storage. Reads each manifest once.

    Room for checkpoints is not asked for where it is known that the run will not be here. Raises DataError where a
    manifest or a record of the run is damaged.
    """
    asked, config = config, with_windows(config)
    manifests: dict[str, Manifest] = {}
    read: Manifests = {}
    problems: list[Problem] = []
    for key, source in _iter_sources(config):
        look = _remote_manifest if scheme_of(source.path) else _local_manifest
        found = read.get(source.path) or look(key, source, config)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        manifests[key] = read[source.path] = found
        problems.extend(_too_short(config, key, source, manifests[key]))
    problems.extend(_disagreements(config, manifests))
    problems.extend(_target_problems(config, manifests))
    problems.extend(_tokenizer_problems(config, manifests))
    tokenizer_known = not any(problem.key == "data.tokenizer" for problem in problems)
    problems.extend(task_problems(config, manifests.get(FIRST) if tokenizer_known else None))
    # Before the checkpoint and the disk are looked at: both need the vocabulary's size.
    filled = fill_vocabulary(config, manifests[FIRST]) if FIRST in manifests else []
    if isinstance(filled, RunConfig):
        config = filled
    elif not any(problem.key == found.key for problem in problems for found in filled):
        problems.extend(filled)
    problems.extend(resume_problems(config))
    training = [manifests.get(f"data.train.{number}.path") for number in range(len(config.data.train))]
    if not problems and all(training):
        trained = [manifest for manifest in training if manifest]
        valid = [manifests[key] for key in manifests if key.startswith("data.valid.")]
        problems.extend(too_long_problems(config, trained, valid) or epochs_problems(config, trained))
        config = config if problems else with_epochs(config, trained)
        problems.extend([] if problems else lasting_problems(config, trained))
    if isinstance(filled, RunConfig) and not problems:
        taught = fill_teacher(config, manifests[FIRST])
        config = taught if isinstance(taught, RunConfig) else config
        problems.extend(taught if isinstance(taught, list) else ())
    # A size that could not be filled in differs from the checkpoint's for that reason only.
    unknown = () if isinstance(filled, RunConfig) else (SPECIAL_KEY, "model.vocab_size", *LABEL_KEYS)
    problems.extend(found for found in difference_problems(config, manifests) if not found.key.startswith(unknown))
    if fault := folder_fault(config.run_dir):
        problems.append(Problem("output_dir", fault, config.output_dir, uses=("name",)))
    else:
        # Records are read in a folder that can be a run's only: elsewhere the names may mean anything.
        _require_records(config)
        problems.extend(_room_problems(config) if asks_room else ())
    if problems:
        return StorageCheck(problems)
    train, valid = (read_manifests(sources, config.data, read) for sources in (config.data.train, config.data.valid))
    return StorageCheck([], ResolvedRun(config, asked, train, valid, run_tasks(config)))


def storage_warnings(config: RunConfig) -> list[str]:
    """Warnings of what may stop the run on its way. Needs model.vocab_size."""
    room = _room(config)
    if room.free_bytes is None or room.free_bytes >= room.planned_bytes:
        return []
    text = (
        f"{room.folder}: not all checkpoints will fit that the run keeps at once (checkpoint.keep, keep_best, "
        f"keep_every_steps): they need {bytes_text(room.planned_bytes)} more, {bytes_text(room.free_bytes)} are free."
    )
    return [text]


def _iter_sources(config: RunConfig) -> Iterator[tuple[str, DataSetConfig]]:
    for split, sources in (("train", config.data.train), ("valid", config.data.valid)):
        for number, source in enumerate(sources):
            yield f"data.{split}.{number}.path", source


def _remote_manifest(key: str, source: DataSetConfig, config: RunConfig) -> Manifest | Problem:
    """The manifest behind a URL, or why there is none. Raises DataError where it is damaged."""
    shown = shown_path(source.path)
    fault = scheme_fault(source.path)
    if fault is not None:
        return Problem(key, fault, shown)
    remote = RemoteFolder(source.path, fetch_config(config.data))
    try:
        content = remote.read(MANIFEST_NAME)
    except DataError as error:
        return Problem(key, f"no manifest can be fetched: {error}", shown)
    return parse_manifest(content, remote.location(MANIFEST_NAME))


def _local_manifest(key: str, source: DataSetConfig, config: RunConfig) -> Manifest | Problem:
    """The manifest in a folder, or why there is none. Raises DataError where it is damaged."""
    folder = Path(source.path)
    if not folder.exists():
        return Problem(key, f"no such folder. {looked_from(folder)}{SHARDS_HINT}", source.path)
    if not folder.is_dir():
        return Problem(key, f"is a file; a data set is a folder of shards. {SHARDS_HINT}", source.path)
    if not (folder / MANIFEST_NAME).is_file():
        below = sorted(entry.parent.name for entry in folder.glob(f"*/{MANIFEST_NAME}"))
        hint = f"Try {folder / below[0]}." if below else SHARDS_HINT
        return Problem(key, f"the folder has no {MANIFEST_NAME}, so it is not a data set. {hint}", source.path)
    return read_manifest(folder)


def _too_short(config: RunConfig, key: str, source: DataSetConfig, manifest: Manifest) -> Iterator[Problem]:
    seq_len, windows = config.data.seq_len, config.data.windows
    if config.data.packing_kind != "none":
        if not manifest.num_documents:
            yield Problem(key, "holds no documents. Write shards from some text.", shown_path(source.path))
        return
    use = data_use(manifest, seq_len, windows or "continuous")
    if use.samples:
        return
    most, holds = use.tokens - 1, f"{use.tokens} tokens with ends of sequence, less than"
    if windows == "per_shard":
        most = max((shard.stream_tokens - 1 for shard in manifest.shards), default=0)
        holds = "no shard with"
    advice = f"Try data.seq_len={most} or less, or more text." if most > 0 else "It needs more text."
    message = f"holds {holds} the {seq_len + 1} tokens of one sample (data.seq_len = {seq_len}). {advice}"
    yield Problem(key, message, shown_path(source.path), uses=("data.seq_len", "data.windows"))


def _disagreements(config: RunConfig, manifests: dict[str, Manifest]) -> Iterator[Problem]:
    """Sources whose ids do not mean the same tokens as those of the first readable source."""
    if not manifests:
        return
    first_key, first = next(iter(manifests.items()))
    paths = {key: shown_path(source.path) for key, source in _iter_sources(config)}
    for key, manifest in manifests.items():
        if manifest.tokenizer_sha256 != first.tokenizer_sha256 or manifest.vocab_size != first.vocab_size:
            message = (
                f"was written with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}, "
                f"{manifest.vocab_size} tokens) than {first_key} = {paths[first_key]} "
                f"({first.tokenizer_sha256[:12]}, {first.vocab_size}). Write both with one tokenizer."
            )
            yield Problem(key, message, paths[key])
            continue
        for name in ("eos_id", "bos_ids"):
            is_, was = getattr(manifest, name), getattr(first, name)
            if is_ != was:
                message = (
                    f"its manifest has {name} = {_plain(is_)}, and that of {first_key} = {paths[first_key]} has "
                    f"{_plain(was)}: documents begin or end otherwise. Write one of them again "
                    "(`llmtrain data shards --bos auto|none`)."
                )
                yield Problem(key, message, paths[key])


def _target_problems(config: RunConfig, manifests: dict[str, Manifest]) -> Iterator[Problem]:
    """Sources without what the objective needs of a document beside its tokens."""
    keys, paths = list(manifests), {key: shown_path(source.path) for key, source in _iter_sources(config)}
    names = [f"{key} = {paths[key]}" for key in keys]
    for number, fault in target_faults(list(manifests.values()), names, config.data):
        yield Problem(keys[number], fault, paths[keys[number]], uses=("data.objective",))


def _plain(ids: int | tuple[int, ...]) -> str:
    return str(list(ids) if isinstance(ids, tuple) else ids)


def _tokenizer_problems(config: RunConfig, manifests: dict[str, Manifest]) -> Iterator[Problem]:
    """The named tokenizer is there, and is the one that the first training source was written with.

    Raises DataError where what the data set's manifest says of its tokenizer and the settings of it is not so.
    """
    named, first = config.data.tokenizer, manifests.get(FIRST)
    if first is not None:
        run_settings(config.data, first)
    if named is None:
        # The right one is to be found beside the data.
        try:
            if first is not None:
                run_tokenizer(config.data, first)
        except (ConfigError, DataError) as error:
            if isinstance(error, DataError) and scheme_of(config.data.train[0].path) is None:
                raise
            yield Problem("data.tokenizer", str(error))
        return
    path = Path(named)
    if path.is_file():
        wanted = first.tokenizer_sha256 if first else None
        if wanted is not None and file_sha256(path) != wanted:
            message = (
                f"is not the tokenizer that {shown_path(config.data.train[0].path)} was written with (sha256 "
                f"{file_sha256(path)[:12]} instead of {wanted[:12]}). Name that one, or write the shards again."
            )
            yield Problem("data.tokenizer", message, named)
        return
    source = Path(config.data.train[0].path)
    near = [folder / name for folder in (path, path.parent, source, source.parent) for name in TOKENIZER_NAMES]
    found = [candidate for candidate in near if candidate.is_file()]
    advice = f"Try {found[0]}." if found else "Train one with `llmtrain data tokenizer INPUT... OUT.model`."
    kind = "is a folder" if path.is_dir() else "no such file"
    yield Problem("data.tokenizer", f"{kind}. {looked_from(path)}{advice}", named)


def _require_records(config: RunConfig) -> None:
    """Raise DataError where a file is damaged that says which data the run passes over."""
    run_dir = config.run_dir
    for _ in iter_events(run_dir):
        pass
    if config.data.on_corrupt == "skip":
        SkippedShards(run_dir / LEDGER_NAME, config.data.max_skipped)


def _room_problems(config: RunConfig) -> Iterator[Problem]:
    """A save needs room beside the checkpoint before it: an old one is removed once the new one is whole."""
    if (config.train.steps is None and config.train.tokens is None) or not config.model.is_sized:
        return  # a run without a length or a vocabulary is told of already
    room, per_parameter = _room(config), row_of(config.optim).stored_bytes
    if room.free_bytes is not None and room.free_bytes < room.needed_bytes:
        message = (
            f"the checkpoints of this run do not fit. Needed: {bytes_text(room.needed_bytes)} in {room.folder}, where "
            f"one takes {bytes_text(room.checkpoint_bytes)} ({per_parameter} bytes per parameter) and a new one "
            f"is written beside the one before. Free: {bytes_text(room.free_bytes)}. "
            "Free space there, or choose an output_dir on a larger file system."
        )
        yield Problem("output_dir", message, config.output_dir, uses=("name",))


def _room(config: RunConfig) -> Room:
    size_bytes = row_of(config.optim).stored_bytes * num_trained(config.model, config.finetune, config.frozen)
    folder = config.run_dir / CHECKPOINTS
    saved = newest_origin(folder)
    seen = seen_by(saved.state["train"], saved.config) if saved and saved.trained else Seen()
    return plan_room(folder, size_bytes, config.checkpoint, Budget.of(config).last_step(seen))

"""Planning a pipeline: its inputs are found, hashed and divided, and compared with what the folder was begun as."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from data_pipelines.pipeline.chunks import ScannedFile, chunks_of, scanned
from data_pipelines.pipeline.executors import Executor
from data_pipelines.pipeline.plan import Plan, installed_versions, read_plan, require_same, result_settings
from data_pipelines.reading.formats import FORMATS, format_of
from data_pipelines.reading.inputs import InputFile, ReadReport, find_files, source_exists
from data_pipelines.steps.table import STEPS, package_problems
from llmtrain.config.pipelines.schema import PipelineConfig, ReadConfig
from llmtrain.data.storage.manifest import file_sha256
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError, DataError, LlmtrainError, Problem

_FILES_TOGETHER = 500
_BYTES_TOGETHER = 64_000_000
"""What one call of an executor hashes."""

Shown = Callable[[int, int], None]
"""Is told how many files of how many were looked at."""


@dataclass(frozen=True)
class _Batch:
    """Files of one source, by number, to look at together."""

    number: int
    files: tuple[InputFile, ...]

    def __str__(self) -> str:
        return f"hashing {self.files[0].name}"


def storage_problems(config: PipelineConfig) -> list[Problem]:
    """Everything that is missing, with what to do."""
    problems = package_problems(config.steps)
    if any(step.name == "near_dedup" for step in config.steps) and find_spec("rensa") is None:
        problems.append(Problem("steps", "near_dedup needs the package rensa: pip install 'llmtrain[data]'."))
    for number, source in enumerate(config.read):
        package = FORMATS[source.format].package if source.format != "auto" else None
        if package is not None and find_spec(package) is None:
            message = f"needs the package {package}: pip install 'llmtrain[data]'."
            problems.append(Problem(f"read.{number}.format", message, source.format))
        if not source_exists(source.path):
            message = "no such file, folder or pattern with files. Check the spelling."
            problems.append(Problem(f"read.{number}.path", message, source.path))
    for number, step in enumerate(config.steps):
        for path in STEPS[step.name].files(step.section) if step.name in STEPS else ():
            if not Path(path).is_file():
                problems.append(Problem(f"steps.{number}.{step.name}", f"{path}: no such file. Check the path."))
    if config.tokenizer is not None and config.tokenizer.path is not None:
        try:
            load_tokenizer(Path(config.tokenizer.path))
        except LlmtrainError as error:
            problems.append(Problem("tokenizer.path", str(error), config.tokenizer.path))
    return problems


def make_plan(config: PipelineConfig, folder: Path, executor: Executor, shown: Shown) -> Plan:
    """The plan of a pipeline, written to its folder; that which the folder has, where it has one.

    Raises ConfigError for inputs that do not exist, and where the folder was begun as something else; DataError.
    """
    old = read_plan(folder)
    report = ReadReport(forgiving=True)
    found = list(_inputs(config, report))
    if not found:
        raise ConfigError(f"{', '.join(source.path for source in config.read)}: there is no file. Check the paths.")
    scans = _scans(config, found, old, executor, shown)
    ordered = [(number, scan) for (number, _), scan in zip(found, scans, strict=True)]
    plan = Plan(
        result_settings(config),
        installed_versions(_packages(config)),
        _resources(config),
        tuple(scan.file for scan in scans),
        tuple(chunks_of(ordered, config.chunk_bytes)) if old is None else old.chunks,
        dict(report.left_out),
    )
    if old is not None:
        require_same(old, plan, folder)
    plan.write(folder)
    return plan


def _inputs(config: PipelineConfig, report: ReadReport) -> Iterator[tuple[int, InputFile]]:
    """The files of all sources. A file that two of them name belongs to the first."""
    taken: set[str] = set()
    for number, source in enumerate(config.read):
        for file in find_files([source.path], report):
            if file.location in taken:
                report.leave_out("repeated", file.name)
            elif source.format == "auto" and not file.named and format_of(file.location) is None:
                report.leave_out("archive", file.name)
            else:
                taken.add(file.location)
                yield number, file


def _scans(
    config: PipelineConfig, found: Sequence[tuple[int, InputFile]], old: Plan | None, executor: Executor, shown: Shown
) -> list[ScannedFile]:
    """What each file is. One that has the size and time of the plan is believed to be the same."""
    known = {file.location: file for file in old.files} if old is not None else {}
    scans: dict[int, ScannedFile] = {}
    groups: dict[int, list[int]] = {}
    for place, (number, file) in enumerate(found):
        before = known.get(file.location)
        if before is not None and file.state() == (before.bytes, before.version):
            scans[place] = ScannedFile(before)
        else:
            groups.setdefault(number, []).append(place)
    done = len(scans)
    shown(done, len(found))
    for number, places in groups.items():
        source = config.read[number]
        batches = {batch.number: batch for batch in _batches(places, [found[place][1] for place in places])}
        action = partial(_scan_batch, source, config.chunk_bytes)
        for batch, result in executor.each(action, batches.values()):
            if isinstance(result, str):
                raise DataError(result)
            for place, scan in zip(places[batch.number :], result, strict=False):
                scans[place] = scan
            done += len(result)
            shown(done, len(found))
    return [scans[place] for place in range(len(found))]


def _batches(places: Sequence[int], files: Sequence[InputFile]) -> Iterator[_Batch]:
    """Files in batches; each is known by the number of its first file."""
    begin, size = 0, 0
    for number, file in enumerate(files):
        size += file.state()[0]
        if number + 1 - begin == _FILES_TOGETHER or size >= _BYTES_TOGETHER or number + 1 == len(files):
            yield _Batch(begin, tuple(files[begin : number + 1]))
            begin, size = number + 1, 0


def _scan_batch(source: ReadConfig, chunk_bytes: int, batch: _Batch) -> list[ScannedFile] | str:
    """The files of a batch, or what is wrong with one."""
    try:
        return [scanned(file, source, chunk_bytes) for file in batch.files]
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror}). Repair it or leave it out."


def _packages(config: PipelineConfig) -> set[str]:
    """Packages on whose versions the result depends."""
    names = {
        package for step in config.steps if step.name in STEPS for package in STEPS[step.name].packages(step.section)
    }
    if any(step.name == "near_dedup" for step in config.steps):
        names.add("rensa")
    names |= {FORMATS[source.format].package or "" for source in config.read if source.format != "auto"}
    if config.tokenizer is not None:
        names |= {"sentencepiece", "tokenizers"}
    return {*names, "llmtrain"} - {""}


def _resources(config: PipelineConfig) -> dict[str, str]:
    """Hashes of the other files that the result depends on. Raises ConfigError where one is missing."""
    paths = [path for step in config.steps if step.name in STEPS for path in STEPS[step.name].files(step.section)]
    if config.tokenizer is not None and config.tokenizer.path is not None:
        paths.append(config.tokenizer.path)
        settings = Path(config.tokenizer.path).parent / SETTINGS_NAME
        paths += [str(settings)] if settings.is_file() else []
    try:
        return {path: file_sha256(Path(path)) for path in paths}
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}). Check the path.") from None

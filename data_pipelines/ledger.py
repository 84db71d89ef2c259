"""The token ledger: exactly which documents made up a step of a run, and where they lie.

Nothing was recorded for it. Sample n is a function of n, so a step's documents are found again from the configuration,
the data, and where in the stream of samples the step began.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.folders import CHECKPOINTS
from llmtrain.checkpoint.origin import newest_origin
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.row_config import build_row_config
from llmtrain.data.source_reader import DocumentPart
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.stream import Sample, SampleStream
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.parallel.layout import plan_layout
from llmtrain.preflight.resolve import ResolvedRun, resolve
from llmtrain.runs.audit import skipped_windows
from llmtrain.runs.metrics_file import METRICS_FILE, read_rows
from llmtrain.values.tokenizer import Tokenizer


@dataclass(frozen=True)
class LedgerDocument:
    """A part of a document in a sample: tokens [begin, end) of document number `document` of the shard, named `key`
    there. They stand at `position` of the sample. `ends`: the last of them is its end of sequence."""

    shard: str
    key: str
    document: int
    begin: int
    end: int
    ends: bool
    position: int
    text: str


@dataclass(frozen=True)
class LedgerSample:
    """A sample of a step: its number in the run, its micro-batch and the data rank that reads it, where it is from.

    A blank one has no documents and no targets: its shard is skipped.
    """

    sample: int
    micro_batch: int
    data_rank: int
    source: str
    epoch: int
    padding: int
    blank: bool
    documents: tuple[LedgerDocument, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def step_samples(run: Path, step: int, rank: int | None = None, num_ranks: int | None = None) -> Iterator[LedgerSample]:
    """The samples of a step of a run, in their order; with `rank` those that this rank reads.

    `run` is a run folder or a YAML file, `num_ranks` stands for its launch.num_workers. Raises ConfigError and
    DataError.
    """
    is_folder = run.is_dir()
    overrides = [] if num_ranks is None else [f"launch.num_workers={num_ranks}"]
    resolved = resolve(load_config(run / "config.yaml" if is_folder else run, overrides).config)
    config, run_dir = resolved.config, run if is_folder else resolved.run_dir
    layout = plan_layout(config.parallel, config.launch.num_workers)
    if rank is not None and rank >= layout.world_size:
        raise ConfigError(f"--rank {rank}: the run has ranks 0 to {layout.world_size - 1}.")
    stream = build_stream(config.data.train, config.data, config.seed, run_dir, manifests=resolved.train).only_read()
    own = None if rank is None else layout.coordinates(rank).data
    size, tokenizer = config.train.micro_batch_size, load_tokenizer(resolved.tokenizer)
    for place, number in enumerate(_numbers(_loader(resolved, stream), config, run_dir, step)):
        micro_batch = place // size
        data_rank = micro_batch % layout.data
        if own is None or own == data_rank:
            sample = stream.sample(number)
            source = shown_path(config.data.train[sample.source].path)
            documents = () if sample.blank else tuple(_documents(sample, stream.documents(number), tokenizer))
            where = (source, sample.epoch, sample.padding, sample.blank)
            yield LedgerSample(number, micro_batch, data_rank, *where, documents)


def _loader(resolved: ResolvedRun, stream: SampleStream) -> BatchLoader:
    """The loader of all ranks together."""
    config = resolved.config
    row_config = build_row_config(config, stream, lambda: resolved.tokenizer)
    sizes = (config.train.global_batch_size, config.train.micro_batch_size)
    return BatchLoader(stream, row_config, *sizes).sized(config.train.batch_sizes)


def _numbers(loader: BatchLoader, config: RunConfig, run_dir: Path, step: int) -> Sequence[int]:
    """The numbers of a step's samples: counted from the nearest step before it that is recorded.

    Between the two the run had the batch sizes of its configuration, or was not there yet. Where the step itself is
    recorded, whatever size it had, that counts.
    """
    windows = skipped_windows(run_dir)
    loader, sizes = loader.skipping(windows), config.train.batch_sizes
    recorded = dict(_recorded(run_dir, step))
    end = recorded.pop(step, None)
    done, position = max(recorded.items(), default=(0, 0))
    begin = loader.position_behind(position, sizes.before(step) - sizes.before(done + 1))
    if end is None:
        return loader.step_samples(begin, step)
    return [number for number in range(begin, end) if not any(first <= number < last for first, last in windows)]


def _recorded(run_dir: Path, last: int) -> Iterator[tuple[int, int]]:
    """Steps up to `last` and the positions behind them, as rows of metrics and the newest checkpoint tell."""
    if (run_dir / METRICS_FILE).is_file():
        for row in read_rows(run_dir / METRICS_FILE):
            if row["step"] <= last and type(row.get("samples")) is int:
                yield row["step"], row["samples"]
    origin = newest_origin(run_dir / CHECKPOINTS)
    state = origin.state.get("train") if origin else None
    if state and state["step"] <= last:
        yield state["step"], state["samples"]


def _documents(sample: Sample, parts: list[DocumentPart], tokenizer: Tokenizer) -> Iterator[LedgerDocument]:
    position = 0
    for part in parts:
        end = position + part.end - part.begin
        tokens = sample.tokens[position : end - part.ends].tolist()
        yield LedgerDocument(*vars(part).values(), position=position, text=tokenizer.decode(tokens))
        position = end

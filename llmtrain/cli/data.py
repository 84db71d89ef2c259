"""`llmtrain data ...`: making, looking at and checking data sets."""

import json
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtrain.cli.chat_data import chat, show_conversations
from llmtrain.cli.label_data import labels
from llmtrain.cli.train import OverridesArgument
from llmtrain.errors import ConfigError, DataError
from llmtrain.words import counted

if TYPE_CHECKING:
    from data_pipelines.reading.inputs import ReadReport
    from data_pipelines.reading.records import ReadOptions
    from llmtrain.data.stream import StreamConfig

app = typer.Typer(help="Make, look at and check data sets.", no_args_is_help=True)
app.command()(chat)
app.command()(labels)

Inputs = Annotated[
    list[str],
    typer.Argument(help="Files of text, .jsonl or .json, each also as .gz, .bz2, .xz or .zst; folders; glob patterns."),
]
Dataset = Annotated[Path, typer.Argument(help="Folder of a data set, or the folder that holds its train and valid.")]
Field = Annotated[str, typer.Option("--field", help="Key of the text in a .jsonl line or .json object.")]
Separator = Annotated[
    str | None,
    typer.Option(help="Cuts text files into documents where it stands, such as '<|endoftext|>'; \\n is a line break."),
]


class BosChoice(StrEnum):
    """What stands before every document."""

    AUTO = "auto"
    NONE = "none"


class TokenizerKind(StrEnum):
    """How pieces are found."""

    BPE = "bpe"
    UNIGRAM = "unigram"


class Dtype(StrEnum):
    """How ids are stored, little-endian."""

    UINT16 = "uint16"
    UINT32 = "uint32"


class Windows(StrEnum):
    """How samples are cut."""

    CONTINUOUS = "continuous"
    PER_SHARD = "per_shard"


@app.command()
def tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Argument(help="The tokenizer to write; its name ends with .model.")],
    vocab_size: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="Number of tokens, special ones and 256 bytes included.")
    ],
    kind: Annotated[TokenizerKind, typer.Option(help="Byte-pair merges, or a unigram model.")] = TokenizerKind.BPE,
    control_pieces: Annotated[
        int, typer.Option(min=0, max=1_000, help="Pieces that no text gives, for control tokens of a chat template.")
    ] = 0,
    field: Field = "text",
    separator: Separator = None,
) -> None:
    """Train a sentencepiece tokenizer that gives every text back unchanged."""
    from data_pipelines.reading.documents import iter_documents
    from data_pipelines.reading.inputs import ReadReport
    from data_pipelines.tokenizer import train_tokenizer

    report = ReadReport()
    documents = _with_progress(iter_documents(inputs, report, _read_options(field, separator)), report)
    trained = train_tokenizer(documents, out, vocab_size, kind.value, control_pieces)
    _say(report.summary())
    _say(f"wrote {out}: {trained.vocab_size:,} tokens, sha256 {trained.sha256}")


@app.command()
def shards(
    inputs: Inputs,
    out: Annotated[Path, typer.Argument(help="Folder to write: OUT/train, OUT/valid and a copy of the tokenizer.")],
    tokenizer: Annotated[Path, typer.Option(help="sentencepiece .model or tokenizer.json.")],
    valid_fraction: Annotated[
        float, typer.Option(help="Share of the documents that go to valid, by content; 0: no valid.")
    ] = 0.1,
    shard_tokens: Annotated[int, typer.Option(min=1, max=10**12, help="Tokens after which a shard ends.")] = 50_000_000,
    num_workers: Annotated[
        int, typer.Option(min=1, max=1024, help="Threads that tokenize; the result is the same.")
    ] = 1,
    field: Field = "text",
    separator: Separator = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that OUT already holds.")] = False,
    bos: Annotated[
        BosChoice,
        typer.Option(help="auto: documents begin with what the tokenizer puts before a text. none: with nothing."),
    ] = BosChoice.AUTO,
) -> None:
    """Turn text into tokenized WebDataset shards with manifest, index and a train/valid split."""
    from data_pipelines.dataset_writer import ShardingConfig
    from data_pipelines.reading.documents import iter_documents
    from data_pipelines.reading.inputs import ReadReport
    from data_pipelines.sharding import write_shards
    from data_pipelines.tokenizer import tokenizer_notes
    from llmtrain.data.tokenizer import load_tokenizer

    report = ReadReport()
    documents = _with_progress(iter_documents(inputs, report, _read_options(field, separator)), report)
    config = ShardingConfig(valid_fraction, shard_tokens, num_workers, overwrite, bos.value)
    loaded = load_tokenizer(tokenizer)
    for note in tokenizer_notes(loaded):
        _say(f"note: {note}")
    manifests = write_shards(documents, out, loaded, config)
    _say(report.summary())
    for name, manifest in manifests.items():
        _say(
            f"wrote {out / name}: {counted(manifest.num_documents, 'document')}, {manifest.num_tokens:,} tokens, "
            f"{counted(len(manifest.shards), 'shard')}"
        )


@app.command()
def run(
    pipeline: Annotated[
        Path, typer.Argument(help="YAML file of a pipeline, or llmtrain:data/NAME.yaml for one that llmtrain ships.")
    ],
    overrides: OverridesArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the stages, and stop.")] = False,
) -> None:
    """Turn raw collections into shards: read, clean, deduplicate, tokenize. Started again, it continues.

    The result is the same for any number of workers, on one machine or a Ray cluster.
    """
    from llmtrain.cli.pipelines import checked_pipeline, run_here

    config = checked_pipeline(pipeline, overrides or [])
    if dry_run:
        from data_pipelines.pipeline.program import Program

        typer.echo("\n".join(stage.name for stage in Program(config).stages))
        return
    run_here(config)


@app.command()
def index(
    folder: Dataset,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer of the ids; absent: the one in the folder or beside it.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="How the ids are stored, where it is not the narrowest type for the vocabulary."),
    ] = None,
) -> None:
    """Make sidecars and a manifest for a folder of tars or of Megatron's files, or rebuild sidecars that were lost."""
    from data_pipelines.indexing import find_shards, has_manifest, index_folder, rebuild_sidecars
    from data_pipelines.inspection import datasets_in
    from llmtrain.data.storage.folders import find_tokenizer
    from llmtrain.data.tokenizer import load_tokenizer

    for dataset in datasets_in(folder):
        if has_manifest(dataset):
            if dtype is not None:
                raise ConfigError(
                    f"--dtype {dtype.value}: {dataset} has a manifest, which says it. Delete manifest.json to index "
                    "the folder anew."
                )
            _say(f"{dataset}: rebuilt {counted(rebuild_sidecars(dataset), 'sidecar')}; the manifest is unchanged")
        else:
            found = find_shards(dataset)  # first: where there are no ids, nobody needs a tokenizer
            loaded = load_tokenizer(tokenizer or find_tokenizer(dataset))
            manifest, ended = index_folder(dataset, loaded, dtype.value if dtype else None, found)
            ends = f", of which {ended:,} bring their own end of sequence: no second one follows them" if ended else ""
            _say(
                f"{dataset}: indexed {counted(len(manifest.shards), 'shard')} of {manifest.dtype}, "
                f"{counted(manifest.num_documents, 'document')}{ends}"
            )


@app.command()
def inspect(
    folder: Dataset,
    seq_len: Annotated[int, typer.Option(min=1, max=2**30, help="Length that samples are counted for.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, one object per data set.")] = False,
) -> None:
    """Summarize data sets: shards, documents, tokens, lengths, samples."""
    from data_pipelines.inspection import datasets_in, summarize

    summaries = [summarize(dataset, seq_len) for dataset in datasets_in(folder)]
    if as_json:
        typer.echo(json.dumps([summary.to_json() for summary in summaries], indent=1))
        return
    for summary in summaries:
        begin = ", ".join(map(str, summary.bos_ids))
        quantiles = ", ".join(f"{value:,}" for value in summary.length_quantiles.values())
        typer.echo(
            f"{summary.path}\n"
            f"  {counted(summary.shards, 'shard')}, {summary.size_bytes / 1e6:,.1f} MB, {summary.dtype}, "
            f"vocabulary {summary.vocab_size:,}, tokenizer {summary.tokenizer_sha256[:12]}\n"
            f"  documents {f'begin with {begin} and ' if begin else ''}end with {summary.eos_id}"
            f"{'; the tokenizer does not give every text back as it was' if summary.lossy else ''}\n"
            f"  {counted(summary.documents, 'document')}, {summary.tokens:,} tokens, "
            f"{summary.mean_length:,.1f} per document (min, 10%, median, 90%, max: {quantiles})\n"
            f"{f'  {summary.targets_text}' + chr(10) if summary.targets_text else ''}"
            f"  {summary.samples:,} samples of {summary.seq_len:,} tokens per epoch; "
            f"{'too little for one sample' if summary.unused_tokens else 'no token is left out'}\n"
            f"  with data.windows=per_shard {summary.per_shard.samples:,} samples; {summary.per_shard.unused_text}\n"
            f"  with data.packing=best_fit {summary.best_fit.samples:,} samples; {summary.best_fit.unused_text}"
        )


@app.command()
def verify(folder: Dataset) -> None:
    """Check everything: hashes, tar structure, counts, token ids. Lists every problem; exit code 3 if there is one."""
    from data_pipelines.inspection import datasets_in, verify_dataset

    problems: list[str] = []
    for dataset in datasets_in(folder):
        found = verify_dataset(dataset)
        _say(f"{dataset}: {counted(len(found), 'problem') if found else 'whole'}")
        problems += found
    if problems:
        raise DataError("\n".join(problems))


@app.command()
def show(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of a data set, or the one with its train and valid; not with --step.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, max=10**18, help="Number of the sample, from 0.")] = 0,
    seq_len: Annotated[int, typer.Option(min=1, max=2**30, help="Tokens per sample.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the run whose order is meant.")] = 1234,
    windows: Annotated[Windows, typer.Option(help="The run's data.windows.")] = Windows.CONTINUOUS,
    shuffle_shards: Annotated[int, typer.Option(min=1, max=1_000_000, help="The run's data.shuffle_shards.")] = 8,
    run: Annotated[
        Path | None,
        typer.Option(help="A run's YAML file, in place of the other options; its objective is shown. Or its folder."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="With --run: all documents of this step of the run.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, max=2**20, help="With --step: what this rank reads.")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="With --step: as if on so many ranks; the step is the same.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --step: a JSON object per sample and line.")] = False,
) -> None:
    """Print the text of one sample, as a run on this data set alone would see it, with document boundaries.

    With --run: what the run's objective makes of it, the text that the model reads and its targets. With --run and
    --step, without a folder: every document of that step of the run, its shard, key and place, and its text.
    """
    if step is not None:
        if run is None or folder is not None:
            raise typer.BadParameter("takes a run and no folder: data show --run RUN --step N", param_hint="--step")
        _show_step(run, step, (rank, ranks), as_json)
        return
    for name, given in (("--rank", rank), ("--ranks", ranks), ("--json", as_json or None)):
        if given is not None:
            raise typer.BadParameter("goes with --step", param_hint=name)
    if folder is None:
        raise typer.BadParameter("is needed, or --run RUN --step N", param_hint="FOLDER")
    from data_pipelines.inspection import datasets_in
    from llmtrain.data.storage.manifest import read_manifest
    from llmtrain.data.stream import StreamConfig

    dataset = datasets_in(folder)[0]
    if run is None and read_manifest(dataset).targets == "trained":
        show_conversations(dataset, sample, seq_len, seed)
        return
    if run is not None:
        from data_pipelines.objective_text import objective_texts

        for title, text in objective_texts(run, dataset, sample).items():
            typer.echo(f"-------- {title} --------\n{text}")
        return
    _show_window(dataset, sample, StreamConfig(seed, seq_len, shuffle_shards, windows=windows.value))


def _show_window(dataset: Path, sample: int, config: "StreamConfig") -> None:
    from data_pipelines.inspection import document_texts
    from llmtrain.data.storage.folders import find_tokenizer
    from llmtrain.data.stream import SampleStream, load_sources
    from llmtrain.data.tokenizer import load_tokenizer

    sources = load_sources([dataset], [1])
    tokenizer = load_tokenizer(find_tokenizer(dataset, sources[0].manifest.tokenizer_sha256))
    stream = SampleStream(sources, config)
    shown = stream.sample(sample)
    _say(f"{stream.shard_path(shown)}: epoch {shown.epoch}, window {shown.window}, {len(shown.tokens)} tokens")
    for begins, text in document_texts(shown, tokenizer):
        if begins:
            typer.echo("-------- document --------")
        typer.echo(text)


def _show_step(run: Path, step: int, ranks: tuple[int | None, int | None], as_json: bool) -> None:
    from data_pipelines.ledger import step_samples

    for sample in step_samples(run, step, *ranks):
        if as_json:
            typer.echo(json.dumps(sample.to_json()))
            continue
        place = f"micro-batch {sample.micro_batch}, data rank {sample.data_rank}"
        filled = f", {sample.padding:,} tokens of padding" if sample.padding else ""
        blank = ", without targets: its shard is skipped" if sample.blank else ""
        typer.echo(f"==== sample {sample.sample:,}: {place}, {sample.source}, epoch {sample.epoch}{filled}{blank} ====")
        for part in sample.documents:
            tokens = f"tokens {part.begin:,} to {part.end:,}{', its end' if part.ends else ''}"
            typer.echo(
                f"-------- {part.shard}: {part.key} (document {part.document:,}), {tokens} --------\n{part.text}"
            )


def _read_options(field: str, separator: str | None) -> "ReadOptions":
    from data_pipelines.reading.records import ReadOptions

    if separator == "":
        raise typer.BadParameter("must not be empty", param_hint="--separator")
    return ReadOptions(field, separator.replace("\\n", "\n") if separator else None)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _with_progress(documents: Iterable[str], report: "ReadReport") -> Iterator[str]:
    """The documents, with a count on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from documents
        return
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        for document in documents:
            yield document
            status.update(f"{report.documents:,} documents, {report.text_bytes / 1e6:,.1f} MB")

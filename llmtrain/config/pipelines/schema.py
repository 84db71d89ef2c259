"""Every key of a data pipeline's file, with its type, default and meaning. Pure: imports nothing that reads data."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.launch import SlurmConfig
from llmtrain.config.pipelines.steps import AnyStep
from llmtrain.config.schema import RUN_NAME_PATTERN
from llmtrain.config.section import AsTuple, AsWhole, Section, Text, Threads

Size = Annotated[int, Field(ge=1, le=10**18), AsWhole]
"""Bytes, documents or tokens of a whole collection."""

FormatName = Literal["text", "jsonl", "json", "html", "parquet", "arrow", "webdataset", "warc"]


class ReadConfig(Section):
    """One source: where its documents lie and how they are taken out."""

    path: Text = Field(
        description="A file, a folder, a glob pattern, or a URL (https, http, s3, gs or hf; s3, gs and hf with "
        "patterns). A folder means every file below it."
    )
    name: Text | None = Field(default=None, description="What counts call the source; null: its path.")
    format: Literal["auto", FormatName] = Field(
        default="auto",
        description="auto: by the ending of a file's name, plain text for an ending that says nothing. Others: what "
        "every file of this source is. Each may be compressed: .gz, .bz2, .xz, .zst.",
    )
    text: Text = Field(default="text", description="Key or column of the text, where documents have keys.")
    id: Text | None = Field(
        default=None, description="Key or column of a document's id; null: the file and the place in it."
    )
    url: Text | None = Field(default=None, description="Key or column of a document's URL, which some steps look at.")
    separator: Annotated[str, Field(min_length=1, max_length=1_000)] | None = Field(
        default=None, description="Cuts plain text into documents where it stands; null: a file is a document."
    )
    longest_document: Size = Field(
        default=64_000_000, description="Bytes of the longest document, or line, that is read; longer ones are dropped."
    )
    on_damage: Literal["fail", "skip"] = Field(
        default="fail",
        description="A file that is cut off, cannot be unpacked or changes while it is read ends the pipeline, or is "
        "left out from there on, counted and named.",
    )
    max_documents: Size | None = Field(
        default=None, description="Most documents that are kept of this source, drawn by the seed; null: all."
    )
    max_bytes: Size | None = Field(
        default=None, description="Most bytes of text that are kept of this source, drawn by the seed; null: all."
    )


class TokenizerTrainingConfig(Section):
    """A tokenizer that is trained on a sample of what all steps have kept."""

    kind: Literal["bpe", "unigram", "byte_bpe"] = Field(
        default="bpe",
        description="bpe and unigram: sentencepiece's. byte_bpe: a tokenizer.json with merges of bytes, as GPT-2's.",
    )
    vocab_size: Annotated[int, Field(ge=300, le=10_000_000), AsWhole] = Field(
        default=32_000, description="Number of tokens, special ones and 256 bytes included."
    )
    sample_bytes: Size = Field(default=200_000_000, description="About how much text it is trained on.")
    control_pieces: Annotated[int, Field(ge=0, le=1_000), AsWhole] = Field(
        default=16, description="Pieces <|reserved_0|>, ... that no text gives, for chat templates later."
    )


class TokenizerConfig(Section):
    """The tokenizer of the shards: a file, or one that is trained. `tokenizer: FILE` means `{path: FILE}`."""

    path: Text | None = Field(default=None, description="sentencepiece .model or tokenizer.json.")
    train: TokenizerTrainingConfig | None = Field(default=None, description="Train one; null: path names one.")


class WriteConfig(Section):
    """What comes out."""

    shard_tokens: Size = Field(default=50_000_000, description="Tokens after which a shard ends.")
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.01, description="Share of the documents that go to valid, by their text; 0: no valid."
    )
    shuffle: bool = Field(default=True, description="Documents in an order that the seed draws, over all sources.")
    bos: Literal["auto", "none"] = Field(
        default="auto",
        description="auto: documents begin with what the tokenizer puts before a text. none: with nothing.",
    )
    documents: bool = Field(
        default=False, description="Keep the cleaned documents too, as documents/*.jsonl.zst. Without tokenizer always."
    )


class ExecutorConfig(Section):
    """Who does the work. Nothing here changes the result."""

    backend: Literal["processes", "ray"] = Field(
        default="processes", description="Processes of this machine, or tasks on a Ray cluster that shares its files."
    )
    workers: Threads = Field(default=0, description="Processes, or Ray tasks at a time; 0: one for each core.")
    address: Text | None = Field(
        default=None, description="ray: host:port of a cluster's head; null: RAY_ADDRESS, or else a Ray of its own."
    )
    allow_open_cluster: bool = Field(
        default=False, description="ray: use a cluster that asks nobody for a token, though others can reach it."
    )
    keep_work: bool = Field(default=False, description="Keep intermediate files once the pipeline has finished.")
    grace_seconds: Annotated[float, Field(ge=0, le=1e9)] = Field(
        default=60.0,
        description="From being told to stop to the end: tasks that are not finished by then are done again next time. "
        "0: no limit.",
    )
    slurm: SlurmConfig = Field(
        default_factory=SlurmConfig,
        description="What a job of `llmtrain submit --to slurm` asks for: nodes with run.workers CPUs in all, or whole "
        "nodes where that is 0.",
    )


class PipelineConfig(Section):
    """From raw collections to shards: read, then steps, then write."""

    name: Annotated[str, Field(pattern=RUN_NAME_PATTERN)] = Field(
        description="Name of the collection, 1 to 64 letters, digits or any of _.- ; its folder is <output_dir>/<name>."
    )
    output_dir: Text = Field(default="data", description="Folder of collections.")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), AsWhole] = Field(
        default=1234, description="Draws the order of documents, and which ones of a capped source stay."
    )
    read: Annotated[tuple[ReadConfig, ...], AsTuple, Field(min_length=1, max_length=10_000)] = Field(
        description="Sources, in the order in which duplicates are looked for: the first one stays."
    )
    steps: Annotated[tuple[AnyStep, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(), description="What happens to documents, in this order."
    )
    tokenizer: TokenizerConfig | None = Field(
        default=None, description="The tokenizer of the shards; null: documents are written, and no shards."
    )
    write: WriteConfig = Field(default_factory=WriteConfig)
    run: ExecutorConfig = Field(default_factory=ExecutorConfig)
    chunk_bytes: Annotated[int, Field(ge=1_000, le=10**12), AsWhole] = Field(
        default=16_000_000,
        description="Size of a chunk, the unit of work: small files together, or a part of a large one. Compressed "
        "files are never divided.",
    )

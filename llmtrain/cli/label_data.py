"""`llmtrain data labels`: texts with labels to shards that a head for labels is trained on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llmtrain.errors import ConfigError
from llmtrain.words import counted

MOST_SHOWN = 12
"""Labels whose counts are told one by one."""


class TaskChoice(StrEnum):
    """What labels are of."""

    CLASSIFICATION = "classification"
    TAGGING = "tagging"
    QA = "qa"


class FamilyChoice(StrEnum):
    """The kind of model that texts are framed for."""

    ENCODER = "encoder"
    DECODER = "decoder"


class TooLongChoice(StrEnum):
    """What becomes of texts that are too long."""

    ERROR = "error"
    DROP = "drop"
    TRUNCATE = "truncate"


def labels(
    inputs: Annotated[
        list[str],
        typer.Argument(help="JSON lines, or tables with a header (.csv, .tsv), each also as .gz, .bz2, .xz or .zst."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write: OUT/train, OUT/valid and a copy of the tokenizer.")],
    tokenizer: Annotated[Path, typer.Option(help="sentencepiece .model or tokenizer.json.")],
    task: Annotated[
        TaskChoice,
        typer.Option(
            help="classification: text, label. tagging: words, tags, one for each. qa: question, context, answers."
        ),
    ],
    family: Annotated[
        FamilyChoice, typer.Option(help="encoder: texts between the tokenizer's cls and sep. decoder: as they are.")
    ] = FamilyChoice.ENCODER,
    text_key: Annotated[str | None, typer.Option(help="Instead of text, words or context.")] = None,
    text_b_key: Annotated[
        str | None, typer.Option(help="Of a second text: of qa instead of question; classification: there is one.")
    ] = None,
    label_key: Annotated[str | None, typer.Option(help="Instead of label, tags or answers.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="A data set whose labels these are, in their order; others are errors. Else all that occur."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=4, max=2**30, help="Tokens of a text at most, those around it included.")
    ] = None,
    too_long: Annotated[TooLongChoice, typer.Option(help="What becomes of longer ones.")] = TooLongChoice.ERROR,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of the texts that go to valid, by content; 0: no valid.")
    ] = 0.1,
    shard_tokens: Annotated[int, typer.Option(min=1, max=10**12, help="Tokens after which a shard ends.")] = 50_000_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that OUT already holds.")] = False,
) -> None:
    """Turn texts with labels into shards for data.objective=labels.

    The label of a word is that of its first token. Of several answers the first is taken.
    """
    from data_pipelines.dataset_writer import ShardingConfig
    from data_pipelines.labelled.framing import Frame
    from data_pipelines.labelled.shards import USUAL_KEYS, Keys, LabelSource, write_label_shards
    from llmtrain.data.tokenizer import load_tokenizer

    _require_sense(task, family, text_b_key, too_long, max_tokens)
    usual = USUAL_KEYS[task.value]
    keys = Keys(text_key or usual.text, text_b_key or usual.text_b, label_key or usual.label)
    frame = Frame(load_tokenizer(tokenizer), family.value, max_tokens)
    names = _names_of(like, task) if like else ()
    source = LabelSource(task.value, frame, keys, too_long.value, names)
    config = ShardingConfig(valid_fraction, shard_tokens, overwrite=overwrite)
    manifests = write_label_shards(inputs, out, source, config, lambda line: typer.echo(line, err=True))
    for name, manifest in manifests.items():
        assert manifest.labels is not None
        pairs = zip(manifest.labels.names, manifest.labels.counts, strict=True)
        told = [f"{count:,} {label}" for label, count in pairs]
        more = [f"and {len(told) - MOST_SHOWN:,} labels more"] if len(told) > MOST_SHOWN else []
        labelled = f": {', '.join([*told[:MOST_SHOWN], *more])}" if told else ""
        texts, shards = counted(manifest.num_documents, "text"), counted(len(manifest.shards), "shard")
        typer.echo(f"wrote {out / name}: {texts}, {manifest.num_tokens:,} tokens, {shards}{labelled}", err=True)


def _require_sense(
    task: TaskChoice, family: FamilyChoice, text_b_key: str | None, too_long: TooLongChoice, max_tokens: int | None
) -> None:
    if task == TaskChoice.QA and family == FamilyChoice.DECODER:
        raise ConfigError(
            "--task qa --family decoder: ends of an answer are found by what stands on both sides of them, and a "
            "decoder sees one. Give --family encoder, or train on questions and answers with `llmtrain data chat`."
        )
    if task == TaskChoice.QA and too_long == TooLongChoice.TRUNCATE:
        raise ConfigError("--task qa --too-long truncate: would cut answers. Give drop, or cut contexts yourself.")
    if task == TaskChoice.TAGGING and text_b_key is not None:
        raise ConfigError("--text-b-key: words and tags are of one text. Leave it out with --task tagging.")
    if max_tokens is None and too_long != TooLongChoice.ERROR:
        raise ConfigError(f"--too-long {too_long.value}: has no effect without --max-tokens. Give both, or none.")


def _names_of(dataset: Path, task: TaskChoice) -> tuple[str, ...]:
    """Raises ConfigError where a data set has no such labels."""
    from llmtrain.data.storage.manifest import read_manifest

    record = read_manifest(dataset).labels
    if record is None or record.task != task.value or task == TaskChoice.QA:
        has = f"labels of {record.task}" if record else "no labels"
        raise ConfigError(f"--like {dataset}: has {has}, and --task is {task.value}. Name one with the same task.")
    return record.names

"""`llmtrain data chat`: conversations to shards that say which tokens are trained."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llmtrain.words import counted


class SpecialChoice(StrEnum):
    """What becomes of a message that spells a control token."""

    ERROR = "error"
    TEXT = "text"


def chat(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files with a conversation in each line: messages (OpenAI's), conversations (ShareGPT's), or prompt "
            "and completion. Each also as .gz, .bz2, .xz or .zst."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write: OUT/train, OUT/valid and a copy of the tokenizer.")],
    tokenizer: Annotated[Path, typer.Option(help="sentencepiece .model or tokenizer.json.")],
    template: Annotated[str, typer.Option(help="chatml, llama3, or a jinja file.")],
    control: Annotated[
        list[str] | None,
        typer.Option(help="A control token of the template; a reserved piece gets its name where there is no such."),
    ] = None,
    grow: Annotated[
        bool,
        typer.Option(
            "--grow", help="Control tokens that no reserved piece is left for are new, above the tokenizer's."
        ),
    ] = False,
    special_in_text: Annotated[
        SpecialChoice,
        typer.Option(help="A message that spells a control token is refused, or is ordinary text."),
    ] = SpecialChoice.ERROR,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of the conversations that go to valid, by content; 0: no valid.")
    ] = 0.1,
    shard_tokens: Annotated[int, typer.Option(min=1, max=10**12, help="Tokens after which a shard ends.")] = 50_000_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that OUT already holds.")] = False,
) -> None:
    """Turn conversations into shards for data.objective=chat: their tokens, and those that the assistant says.

    What a run trains of them, and what becomes of long ones, its data.chat says.
    """
    from data_pipelines.conversations import chat_source, write_chat_shards
    from data_pipelines.dataset_writer import ShardingConfig
    from llmtrain.data.chat.control_pieces import NEW
    from llmtrain.data.tokenizer import load_tokenizer

    source, given = chat_source(load_tokenizer(tokenizer), template, control or [], special_in_text.value, grow)
    for name, piece in given.items():
        token = source.encoder.tokenizer.special_id(name)
        told = f"a new token, with the id {token}" if piece == NEW else f"the piece {piece} of {tokenizer}"
        typer.echo(f"{name} is {told}", err=True)
    config = ShardingConfig(valid_fraction, shard_tokens, overwrite=overwrite)
    manifests = write_chat_shards(inputs, out, source, config, lambda line: typer.echo(line, err=True))
    for name, manifest in manifests.items():
        assert manifest.chat is not None
        trained = sum(manifest.chat.trained_tokens.values())
        share = trained / max(1, manifest.num_tokens)
        typer.echo(
            f"wrote {out / name}: {counted(manifest.num_documents, 'conversation')}, {manifest.num_tokens:,} tokens, "
            f"of which {trained:,} ({share:.0%}) are trained, {counted(len(manifest.shards), 'shard')}",
            err=True,
        )


def show_conversations(dataset: Path, sample: int, seq_len: int, seed: int) -> None:
    """Print the conversations of a sample; what is trained is green, or where there are no colours, in brackets."""
    from data_pipelines.objective_text import conversation_texts

    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    marks = ("\x1b[32m", "\x1b[0m") if coloured else ("[[", "]]")
    for text in conversation_texts(dataset, sample, seq_len, seed, marks):
        typer.echo("-------- conversation --------")
        typer.echo(text)

"""Every key of a file of evaluation tasks, with its type, default and meaning. Pure."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.schema import RUN_NAME_PATTERN
from llmtrain.config.section import AsTuple, Count, CountOrZero, Length, Section, Text

TemplateText = Annotated[str, Field(max_length=1 << 16)]
"""A text with fields in braces; see llmtrain/config/tasks/template.py."""

TaskKind = Literal["choices", "cloze", "perplexity", "exact_match", "qa"]

GENERATED: tuple[TaskKind, ...] = ("exact_match", "qa")
"""Kinds for which the model writes an answer; for the others it says how likely a text is."""


class TaskConfig(Section):
    """One task: samples in a file of JSON lines, and what is asked about them."""

    name: Annotated[str, Field(pattern=RUN_NAME_PATTERN)] = Field(
        description="Name in tables and metrics, 1 to 64 letters, digits or any of _.- ."
    )
    kind: TaskKind = Field(
        default="choices",
        description="choices: which of several texts is the likeliest. cloze: whether the likeliest tokens are those "
        "of the answer. perplexity: how likely texts are. exact_match, qa: what the model writes, compared with the "
        "answer.",
    )
    data: Text = Field(default="", description="File of JSON lines, one object per sample. Required.")
    prompt: TemplateText = Field(
        default="",
        description="What stands before the answer, with fields of the sample such as {question}; of perplexity, the "
        "text itself.",
    )
    choices: Annotated[tuple[TemplateText, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(), description="choices: the texts to choose from. '{endings}' stands for all entries of a list."
    )
    answer: TemplateText = Field(
        default="",
        description="The right answer; '{answers}' stands for all entries of a list, any of which is right. Of "
        "choices: as answer_is says.",
    )
    answer_is: Literal["index", "letter", "text"] = Field(
        default="index", description="choices: the answer is the place of a choice from 0, A, B, C, ..., or its text."
    )
    separator: Annotated[str, Field(max_length=1_000)] = Field(
        default=" ", description="Between the prompt and a choice, or the answer of an example."
    )
    description: TemplateText = Field(default="", description="Text before everything else; it has no fields.")
    examples: CountOrZero = Field(default=0, description="Solved examples before each prompt.")
    examples_data: Text | None = Field(
        default=None, description="File of JSON lines whose first samples are the examples."
    )
    examples_separator: Annotated[str, Field(max_length=1_000)] = Field(
        default="\n\n", description="Between one example and the next."
    )
    max_tokens: Count = Field(default=64, description="exact_match, qa: longest answer, in tokens.")
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=1_000)], ...], AsTuple] = Field(
        default=("\n",), description="exact_match, qa: an answer ends before any of these."
    )
    answer_after: Annotated[str, Field(min_length=1, max_length=1_000)] | None = Field(
        default=None, description="exact_match, qa: what is compared stands behind the last of these in the text."
    )
    ignore_case: bool = Field(default=False, description="exact_match: compare without regard to case.")
    ignore_punctuation: bool = Field(default=False, description="exact_match: compare without ASCII punctuation.")
    max_length: Length | None = Field(
        default=None, description="Longest text in tokens; null: what the model takes. Longer ones lose their begin."
    )


class TasksConfig(Section):
    """Tasks that are measured together."""

    tasks: Annotated[tuple[TaskConfig, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(), description="The tasks, in the order in which they are shown. Required."
    )

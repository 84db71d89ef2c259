"""From files of conversations to shards that say which tokens are trained."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.dataset_writer import ShardingConfig, TargetsWriting
from data_pipelines.reading.inputs import ReadReport, find_files
from data_pipelines.reading.opened import Opened, opened_file
from data_pipelines.sharding import TargetDocument, write_shards
from llmtrain.data.chat.control_pieces import CONTROLS, with_controls, with_template
from llmtrain.data.chat.conversation import ASSISTANT, conversation_of
from llmtrain.data.chat.encoding import ChatEncoder, SpecialInText, control_names, template_variables
from llmtrain.data.chat.template import ChatTemplate, read_template
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.targets import ChatRecord
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import parse_json
from llmtrain.values.tokenizer import Tokenizer

LONGEST_LINE = 1 << 26

_PROBES: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "Hello."}, {"role": ASSISTANT, "content": "Hello, you."}]},
    {
        "messages": [
            {"role": "user", "content": "The time?"},
            {"role": ASSISTANT, "content": "", "tool_calls": [{"name": "clock", "arguments": {"zone": "UTC"}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}],
    },
)
"""Conversations that show how a template begins, and how it ends a turn; of calls of tools not every one knows."""


@dataclass(frozen=True)
class ChatSource:
    """An encoder, the tokens that end a turn, and those that every conversation begins with."""

    encoder: ChatEncoder
    end_ids: tuple[int, ...]
    bos_ids: tuple[int, ...]

    @staticmethod
    def of(template: ChatTemplate, tokenizer: Tokenizer, special_in_text: SpecialInText) -> "ChatSource":
        """Raises DataError for a template that no conversation can be written with."""
        encoder = ChatEncoder(template, tokenizer, special_in_text)
        first = encoder.encode(conversation_of(_PROBES[0], f"{template.name}, tried with a question and an answer"))
        ends = set(first.end_ids)
        with suppress(DataError):  # a template without tools: a conversation that has some will tell
            ends |= encoder.encode(conversation_of(_PROBES[1])).end_ids
        begin = int(first.ids[0])
        bos_ids = (begin,) if begin in (tokenizer.bos_id, *tokenizer.around[0]) else ()
        settled = with_template(tokenizer, template.text, sorted(ends))
        return ChatSource(ChatEncoder(template, settled, special_in_text), tuple(sorted(ends)), bos_ids)

    def document(self, item: Any, where: str) -> TargetDocument:
        """The document that a conversation becomes. Raises DataError that begins with its place."""
        conversation = conversation_of(item, where)
        found = self.encoder.encode(conversation)
        if not found.end_ids <= set(self.end_ids):
            pieces = self.encoder.tokenizer.pieces
            other = ", ".join(pieces[token] for token in sorted(found.end_ids - set(self.end_ids)))
            raise conversation.fault(
                f"the template ends a turn of it with {other}, and others with "
                f"{', '.join(pieces[token] for token in self.end_ids)}. Have it end all turns of one kind alike."
            )
        if tuple(found.ids[: len(self.bos_ids)].tolist()) != self.bos_ids:
            raise conversation.fault("it does not begin with the token that conversations of this template begin with.")
        return TargetDocument(found.text, found.ids, found.spans, found.counts)

    def record(self, counts: Mapping[str, int]) -> ChatRecord:
        """What the manifest says of a split."""
        text = self.encoder.template.text
        digest = hashlib.sha256(text.encode()).hexdigest()
        return ChatRecord(text, digest, self.end_ids, {role: counts[role] for role in sorted(counts)})


def chat_source(
    tokenizer: Tokenizer,
    template: str,
    controls: Sequence[str],
    special_in_text: SpecialInText,
    grow: bool = False,
) -> tuple[ChatSource, dict[str, str]]:
    """How conversations are written, and which reserved pieces have been given the names of control tokens; with
    `grow`, which have new ids where none is left.

    Raises ConfigError and DataError for a template or a tokenizer that does not do.
    """
    text, name = read_template(template)
    tokenizer, given = with_controls(tokenizer, (*CONTROLS.get(name, ()), *controls), grow)
    compiled = ChatTemplate(text, name, control_names(tokenizer), template_variables(tokenizer))
    return ChatSource.of(compiled, tokenizer, special_in_text), given


def iter_conversations(inputs: Sequence[str], report: ReadReport) -> Iterator[tuple[Any, str]]:
    """The JSON objects of all files, one in each line, with file and line. Raises ConfigError, DataError."""
    for file in find_files(inputs, report):
        report.files += 1
        with opened_file(file, LONGEST_LINE) as opened:
            yield from _objects(opened, report)
    if not report.documents:
        raise ConfigError(f"{', '.join(inputs)}: there is no conversation in it. Give files with one in each line.")


def _objects(opened: Opened, report: ReadReport) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(opened.lines(), 1):
        where = f"{opened.path}:{number}"
        if line is None:
            raise DataError(f"{where}: has more than {LONGEST_LINE:,} bytes. A line is one conversation, as JSON.")
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}). Each line is one conversation.") from None
        report.documents += 1
        report.text_bytes += len(line)
        yield item, where


def write_chat_shards(
    inputs: Sequence[str], out: Path, source: ChatSource, config: ShardingConfig, said: Callable[[str], None]
) -> dict[str, Manifest]:
    """Write OUT/train and OUT/valid, as `write_shards` does. `said` is told what was read. Raises as that does."""
    report = ReadReport()
    documents = (source.document(item, where) for item, where in iter_conversations(inputs, report))
    targets = TargetsWriting("trained", source.record, source.bos_ids)
    manifests = write_shards(documents, out, source.encoder.tokenizer, config, targets)
    said(report.summary().replace("documents", "conversations"))
    return manifests

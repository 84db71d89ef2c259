"""From records to shards with labels: which names labels have, what is too long, and where a label belongs."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipelines.dataset_writer import ShardingConfig, TargetsWriting
from data_pipelines.labelled.framing import Frame, first_pieces, pieces_between, shortened
from data_pipelines.labelled.records import LabelledRecord, iter_records
from data_pipelines.reading.inputs import ReadReport
from data_pipelines.sharding import TargetDocument, write_shards
from llmtrain.config.model import MOST_LABELS
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.targets import NO_LABEL, LabelsRecord, Task
from llmtrain.errors import ConfigError
from llmtrain.words import counted

TooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True)
class Keys:
    """The keys of a record: of its text, of a second one, and of its label, or the labels of its words."""

    text: str
    text_b: str | None
    label: str


USUAL_KEYS: dict[Task, Keys] = {
    "classification": Keys("text", None, "label"),
    "tagging": Keys("words", None, "tags"),
    "qa": Keys("context", "question", "answers"),
}


@dataclass
class LabelSource:
    """Makes documents of records. `dropped` counts those that were too long."""

    task: Task
    frame: Frame
    keys: Keys
    too_long: TooLong = "error"
    names: tuple[str, ...] = ()
    dropped: int = field(default=0, init=False)

    def documents(self, records: Iterator[LabelledRecord]) -> Iterator[TargetDocument]:
        """Raises DataError that begins with the place of a record that is not what it should be."""
        numbers = {name: number for number, name in enumerate(self.names)}
        make = {"classification": self._classified, "tagging": self._tagged, "qa": self._answered}[self.task]
        for record in records:
            found = make(record, numbers)
            if found is None:
                self.dropped += 1
            else:
                yield found

    def record(self, counts: Mapping[str, int]) -> LabelsRecord:
        """What the manifest says of a split."""
        pairs = self.keys.text_b is not None
        known = tuple(counts.get(name, 0) for name in self.names)
        return LabelsRecord(self.task, self.names, self.frame.family, self.frame.separator if pairs else None, known)

    def _fits(self, record: LabelledRecord, num_tokens: int, room: int | None) -> bool:
        """False for a text to leave out. Raises DataError where it is to be an error."""
        if room is None or num_tokens <= room or self.too_long == "truncate":
            return True
        if self.too_long == "drop":
            return False
        most = self.frame.max_tokens
        message = f"has {num_tokens - room + (most or 0)} tokens with those around it, and --max-tokens is {most}. "
        raise record.fault(
            message + f"Give --too-long drop{'' if self.task == 'qa' else ' or truncate'}, or a larger --max-tokens."
        )

    def _classified(self, record: LabelledRecord, numbers: Mapping[str, int]) -> TargetDocument | None:
        texts = [record.text(key) for key in (self.keys.text, self.keys.text_b) if key is not None]
        name = label_name(record, self.keys.label)
        number = label_number(record, name, numbers)
        joined = ["\n".join(texts)] if self.frame.family == "decoder" else texts
        pieces = [self.frame.encode(text).ids for text in joined]
        room = self.frame.room(len(joined))
        if not self._fits(record, sum(map(len, pieces)), room):
            return None
        ids, _ = self.frame.framed(pieces if room is None else shortened(pieces, room))
        if len(ids) == 0:
            raise record.fault("the tokenizer has no token for it. Leave the record out.")
        return self._document(texts, ids, np.array([number]), [name])

    def _tagged(self, record: LabelledRecord, numbers: Mapping[str, int]) -> TargetDocument | None:
        words, tags = record.words(self.keys.text), record.words(self.keys.label)
        if len(words) != len(tags):
            raise record.fault(f"has {counted(len(words), 'word')} and {counted(len(tags), 'tag')}. Each has one.")
        labels = [label_number(record, tag, numbers) for tag in tags]
        encoded = self.frame.encode(" ".join(words))
        room = self.frame.room(1)
        if not self._fits(record, len(encoded.ids), room):
            return None
        ids, (begin,) = self.frame.framed([encoded.ids[:room]])
        targets = np.full(len(ids), NO_LABEL)
        kept = []
        for word, tag, label, piece in zip(words, tags, labels, first_pieces(words, encoded), strict=True):
            if piece is None:
                raise record.fault(f"the word {word!r} has no piece of its own. Join it to its neighbour.")
            if room is None or piece < room:
                targets[begin + piece] = label
                kept.append(tag)
        return self._document(words, ids, targets, kept)

    def _answered(self, record: LabelledRecord, numbers: Mapping[str, int]) -> TargetDocument | None:
        assert self.keys.text_b is not None
        context, question = record.text(self.keys.text), record.text(self.keys.text_b)
        begin, end = answer_bounds(record, self.keys.label, context)
        asked, told = self.frame.encode(question), self.frame.encode(context)
        if not self._fits(record, len(asked.ids) + len(told.ids), self.frame.room(2)):
            return None
        first, last = pieces_between(told, begin, end)
        if first == last:
            raise record.fault(f"no token of the context has a character of its answer {context[begin:end]!r}.")
        ids, (_, place) = self.frame.framed([asked.ids, told.ids])
        return self._document([question, context], ids, np.array([place + first, place + last]), ["answers"])

    def _document(
        self, texts: Sequence[str], ids: NDArray[np.int64], targets: NDArray[Any], labels: Sequence[str]
    ) -> TargetDocument:
        return TargetDocument("\n".join(texts), ids, targets.astype(np.int64), Counter(labels))


def label_name(record: LabelledRecord, key: str) -> str:
    """A label is a text, or a whole number. Raises DataError for anything else."""
    value = record.value(key)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise record.fault(f"{key} = {value!r}: a label is a name, or a whole number.")
    return str(value).strip()


def label_number(record: LabelledRecord, name: str, numbers: Mapping[str, int]) -> int:
    """Raises DataError for a label that there is not."""
    if name in numbers:
        return numbers[name]
    near = get_close_matches(name, numbers, 1) or list(numbers)[:3]
    raise record.fault(f"the label {name!r} is none of the {len(numbers)} known ones. Try {' or '.join(near)}.")


def answer_bounds(record: LabelledRecord, key: str, context: str) -> tuple[int, int]:
    """The characters of the first answer, in SQuAD's form: texts, and where each begins. Raises DataError."""
    answers = record.value(key)
    if isinstance(answers, list):
        answers = answers[0] if answers else {}
    if not isinstance(answers, dict):
        raise record.fault(f"{key} must be an object with text and answer_start, or a list of such.")
    text, begin = (found[0] if isinstance(found, list) and found else found for found in map(answers.get, _ANSWER))
    if not text:
        raise record.fault("has no answer. An answer is a part of the context: leave out questions without one.")
    if not isinstance(text, str) or isinstance(begin, bool) or not isinstance(begin, int):
        raise record.fault(f"{key}: text must be a text and answer_start a whole number, not {text!r} and {begin!r}.")
    if context[begin : begin + len(text)] != text or begin < 0:
        place = context.find(text)
        where = f"it begins at {place}" if place >= 0 else "it is not in the context"
        raise record.fault(f"the answer {text[:60]!r} does not stand at answer_start = {begin}: {where}.")
    return begin, begin + len(text)


_ANSWER = ("text", "answer_start")


def names_of(task: Task, records: Iterator[LabelledRecord], key: str) -> tuple[str, ...]:
    """All labels in their order: numbers by size, names by the alphabet, O of tags first. Raises as reading does."""
    found: set[str] = set()
    for record in records:
        found.update(record.words(key) if task == "tagging" else [label_name(record, key)])
        if len(found) > MOST_LABELS:
            raise record.fault(f"more than {MOST_LABELS:,} labels up to here. Is {key} the key of the label?")
    if len(found) < 2:
        raise ConfigError(f"all records have the label {', '.join(found)}: nothing is to be told apart.")
    if all(name.isdecimal() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found, key=lambda name: (name != "O", name)))


def write_label_shards(
    inputs: Sequence[str], out: Path, source: LabelSource, config: ShardingConfig, said: Callable[[str], None]
) -> dict[str, Manifest]:
    """Write OUT/train and OUT/valid, as `write_shards` does; label names that are not given are looked for first.

    `said` is told what was read. Raises as that does.
    """
    source.frame.require()
    if not source.names and source.task != "qa":
        source.names = names_of(source.task, iter_records(inputs, ReadReport()), source.keys.label)
    report = ReadReport()
    documents = source.documents(iter_records(inputs, report))
    # What an encoder's text begins with is of its frame, and nothing that generation would begin with.
    bos_ids = source.frame.begin if source.frame.family == "decoder" else ()
    targets = TargetsWriting("labels", source.record, bos_ids)
    manifests = write_shards(documents, out, source.frame.tokenizer, config, targets)
    said(report.summary().replace("documents", "records"))
    if source.dropped:
        said(f"left out {counted(source.dropped, 'text')} of more than {source.frame.max_tokens} tokens")
    return manifests

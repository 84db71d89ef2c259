"""Texts to be scored, as tokens: which are given, and which are to be said how likely they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from llmtrain.data.tasks.samples import TaskSample
from llmtrain.errors import DataError
from llmtrain.values.tokenizer import Around, Tokenizer


@dataclass(frozen=True)
class ScoredText:
    """Ids of which those from `first` on are scored, each by what stands before it. `first` is at least 1.

    Of an encoder-decoder, `source` is what its encoder reads, and the ids are its decoder's.
    """

    ids: tuple[int, ...]
    first: int
    source: tuple[int, ...] = ()

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.first

    def behind(self, places: int, source_first: bool) -> "ScoredText":
        """Behind so many places of a soft prompt, whose ids nobody looks at; `source_first`: it is the encoder's."""
        prompt = (0,) * places
        if source_first:
            return replace(self, source=(*prompt, *self.source))
        return replace(self, ids=(*prompt, *self.ids), first=places + self.first)


class DocumentTokens(Protocol):
    """The tokens that stood around texts in training, as `interop/text/special_tokens.py` has them."""

    @property
    def eos_id(self) -> int: ...

    @property
    def bos_ids(self) -> tuple[int, ...]: ...

    @property
    def begin_id(self) -> int | None: ...

    @property
    def start_id(self) -> int: ...

    def frame(self, family: str) -> Around: ...


@dataclass(frozen=True)
class TextEncoder:
    """Makes tokens of texts as a model was trained on them, at most `limit` positions of it at a time.

    `bos_ids` stand before every text. `begin_id` is the token before a text of which nothing is given. Of an
    encoder-decoder, `source_frame` stands around what its encoder reads.
    """

    tokenizer: Tokenizer
    limit: int
    bos_ids: tuple[int, ...]
    begin_id: int
    source_frame: Around | None = None

    @staticmethod
    def of(tokenizer: Tokenizer, named: DocumentTokens, family: str, limit: int) -> "TextEncoder":
        """Of a model of this `model.family`."""
        if family == "encoder_decoder":
            return TextEncoder(tokenizer, limit, (), named.start_id, named.frame(family))
        begin = named.eos_id if named.begin_id is None else named.begin_id
        return TextEncoder(tokenizer, limit, named.bos_ids, begin)

    def encode(self, text: str) -> list[int]:
        """A text as the model has seen it in training."""
        return [*self.bos_ids, *self.tokenizer.encode(text)]

    def pair(self, prompt: str, continuation: str) -> ScoredText:
        """A continuation behind a prompt, which loses its begin where it is too long.

        White space at the end of the prompt goes to the continuation, as words take it with them; then both are
        encoded in one piece. Raises DataError for what is not valid Unicode, and as `cut`.
        """
        if self.source_frame is not None:
            before, behind = self.source_frame
            room = self.limit - len(before) - len(behind)
            source, answer = self.tokenizer.encode(prompt)[-room:], self.tokenizer.encode(continuation)
            self._require_room(len(answer))
            return ScoredText((self.begin_id, *answer), 1, (*before, *source, *behind))
        if not prompt:
            ids = self.tokenizer.encode(continuation)
            # One begin is enough: where a text spells it, it is what is given.
            return self.cut(ids, 1) if ids[:1] == [self.begin_id] else self.cut([self.begin_id, *ids], 1)
        kept = prompt.rstrip()
        given = self.encode(kept)
        whole = self.encode(kept + prompt[len(kept) :] + continuation)
        return self.cut(whole, len(given)) if given else self.cut([self.begin_id, *whole], 1)

    def cut(self, ids: Sequence[int], first: int) -> ScoredText:
        """The end of ids, as much as the model takes; the last one is only scored.

        Raises DataError where what is scored, from the place `first` on, does not fit: a part of it would be likelier
        than the whole, and win.
        """
        first = max(1, first)
        self._require_room(len(ids) - first)
        surplus = max(0, len(ids) - self.limit - 1)
        return ScoredText(tuple(ids[surplus:]), first - surplus)

    def _require_room(self, num_tokens: int) -> None:
        if num_tokens > self.limit:
            raise DataError(
                f"what is scored has {num_tokens:,} tokens, and {self.limit:,} fit into the model (or max_length). "
                "Shorten it, or leave the sample out."
            )

    def windows(self, text: str) -> Iterator[ScoredText]:
        """A text in windows that score each of its tokens once: the first behind what begins a text, each later one
        behind as much of the text before it as it has room for."""
        begin, ids = self.bos_ids or (self.begin_id,), self.tokenizer.encode(text)
        whole = [*begin, *ids]
        for start in range(len(begin), len(whole), self.limit):
            end = min(start + self.limit, len(whole))
            given = whole[max(0, end - self.limit - 1) : start]
            yield ScoredText((*given, *whole[start:end]), len(given))

    def texts(self, sample: TaskSample) -> list[ScoredText]:
        """What is scored for a sample: each of its continuations behind the prompt, or the windows of its text.

        Raises DataError with the sample's number for what is not valid Unicode, and for what is too long.
        """
        try:
            if sample.prompt:
                return [self.pair(sample.prompt, continuation) for continuation in sample.continuations]
            if sample.answers or sample.choices:
                for continuation in sample.continuations:
                    self._require_room(len(self.tokenizer.encode(continuation)))
            return [window for text in sample.continuations for window in self.windows(text)]
        except DataError as error:
            raise DataError(f"sample {sample.number} (from 0): {error}") from None

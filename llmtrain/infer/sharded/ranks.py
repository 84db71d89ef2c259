"""Decoding with a model whose parts lie on several ranks: one of them leads, the others follow.

The leading rank has the scheduler and chooses the tokens. It tells the others each step, all of them carry it out over
their parts, and the scores come together at the leading one.

Shape suffixes: B rows, S positions, V vocabulary, v this rank's part of it, H hidden, C scores that are asked for.
"""

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llmtrain.infer.batching.arena import Arena
from llmtrain.infer.batching.scheduler import BatchStep, Limits
from llmtrain.infer.sharded.messages import (
    END,
    NEW_BATCH,
    WORK,
    NumberReader,
    limits_numbers,
    read_limits,
    read_step,
    step_numbers,
)
from llmtrain.infer.sharded.works import Found, ModelWork, read_work, work_numbers
from llmtrain.models.transformer import Transformer
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.layout import Coordinates

LEADER = 0

ANY_LONGER = timedelta(days=365)
"""Between two steps there may be any time: nobody may have asked for anything. A rank that is gone is noticed at once,
as its connections end with it."""


def open_word_group() -> ProcessGroup:
    """The group through which the leading rank tells what to do; its followers wait as long as it takes. Whatever a
    step itself waits for has the time limit of the other groups. All ranks call it."""
    group = dist.new_group(backend="gloo", timeout=ANY_LONGER)
    assert isinstance(group, ProcessGroup), "every rank is in it"
    return group


@dataclass(frozen=True)
class RankLinks:
    """See `StageLinks`: stages are joined by messages, the parts of the head by a gather. One of them for all arenas of
    a rank."""

    groups: Groups
    sent: list[tuple[dist.Work | None, Tensor]] = field(default_factory=list)
    """Messages that may still be on their way, with what is in them."""

    def received(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        hidden_SBH = torch.empty(shape, device=device)
        dist.recv(hidden_SBH, self._neighbour(-1))
        return hidden_SBH

    def send(self, hidden_SBH: Tensor) -> None:
        # Not waiting: this rank goes on with the next pass while the next stage has this one.
        hidden_SBH = hidden_SBH.contiguous()
        self.sent.append((dist.isend(hidden_SBH, self._neighbour(1)), hidden_SBH))

    def logits(self, model: Transformer, hidden_SBH: Tensor) -> Tensor:
        ranks = self.groups.layout.tensor
        rows = model.config.padded_vocab_size // ranks
        logits_BSv = (hidden_SBH.transpose(0, 1) @ model.head_weight(rows).T).float()
        if model.mlm is not None:
            logits_BSv = logits_BSv + model.mlm.bias[:rows].float()
        if ranks > 1:
            parts = logits_BSv.new_empty(ranks * len(logits_BSv), *logits_BSv.shape[1:])
            dist.all_gather_into_tensor(parts, logits_BSv.contiguous(), group=self.groups.tensor)
            logits_BSv = torch.cat(parts.chunk(ranks), -1)
        return logits_BSv[..., : model.config.vocabulary]  # padding follows the vocabulary

    def gathered(self, found: Tensor, rows: int) -> Tensor:
        layout, place = self.groups.layout, self.groups.place
        last = layout.rank(Coordinates(0, 0, 0, layout.pipeline - 1))
        if len(found) != rows:  # of a stage that is not the last
            found = found.new_empty(rows, *found.shape[1:])
        # Once for some passes, behind them: a stage that waited for the leading rank between them could be what that
        # one waits for.
        if rows and last != LEADER:
            if layout.rank(place) == LEADER:
                dist.recv(found, last)
            elif layout.rank(place) == last:
                found = found.contiguous()
                self.sent.append((dist.isend(found, LEADER), found))
        for work, _ in self.sent:
            if work is not None:
                work.wait()
        self.sent.clear()
        return found

    def _neighbour(self, away: int) -> int:
        """The rank that holds the same part of the layers of another stage."""
        place = self.groups.place
        return self.groups.layout.rank(Coordinates(place.tensor, place.context, place.data, place.pipeline + away))


class LeadingArena:
    """Carries out steps over all ranks, as the leading one. A new one forgets what an earlier one remembered."""

    def __init__(self, part: Transformer, limits: Limits, links: RankLinks, words: ProcessGroup) -> None:
        self._words = words
        _tell(limits_numbers(limits), words)
        self._own = Arena(part, limits, links)

    def run(self, step: BatchStep) -> Tensor:
        """See `StepRunner`."""
        if not (step.chunks or step.rows):
            return torch.empty(0, self._own.model.config.vocabulary, device=self._own.device)
        _tell(step_numbers(step), self._words)
        return self._own.run(step)


@dataclass(frozen=True)
class LeadingRank:
    """A model that several ranks hold, as the leading one uses it: for one thing at a time."""

    part: Transformer
    links: RankLinks
    words: ProcessGroup
    failure: "Future[str]" = field(default_factory=Future)
    """Says what has happened where the ranks can do no more, as one of them has ended or failed."""

    def runner(self, limits: Limits) -> LeadingArena:
        """Carries out the steps of one batch; it is the only one until the next is asked for."""
        return LeadingArena(self.part, limits, self.links, self.words)

    def do(self, work: ModelWork[Found]) -> Found:
        """Do it on all ranks."""
        try:
            _tell([WORK, *work_numbers(work)], self.words)
            return work.run(self.part, self.links)
        except Exception as error:  # messages that others wait for, or have sent, would meet the next work
            self.fail(f"{type(error).__name__}: {error}")
            raise

    def fail(self, reason: str) -> None:
        """Say that the ranks can do no more. The first reason counts."""
        with suppress(InvalidStateError):
            self.failure.set_result(reason)

    def end(self) -> None:
        """Let the others return from `follow`."""
        _tell([END], self.words)


def follow(part: Transformer, links: RankLinks, words: ProcessGroup) -> None:
    """Do what the leading rank tells, to the end."""
    arena: Arena | None = None
    while (said := _heard(words))[0] != END:
        if said[0] == NEW_BATCH:
            arena = Arena(part, read_limits(said), links)
        elif said[0] == WORK:
            read_work(NumberReader(iter(said[1:]))).run(part, links)
        else:
            assert arena is not None, "limits are told before steps"
            arena.run(read_step(said))


def _tell(numbers: Sequence[int], words: ProcessGroup) -> None:
    dist.broadcast(torch.tensor([len(numbers)]), LEADER, group=words)
    dist.broadcast(torch.tensor(numbers), LEADER, group=words)


def _heard(words: ProcessGroup) -> list[int]:
    """The next message; waits as long as it takes."""
    length = torch.empty(1, dtype=torch.long)
    dist.broadcast(length, LEADER, group=words)
    numbers = torch.empty(int(length), dtype=torch.long)
    dist.broadcast(numbers, LEADER, group=words)
    return numbers.tolist()

"""Which sequences go on in the next step, and where their keys lie. Pure: tokens in, plans out.

Each step has one new position of every sequence that is being continued, and a chunk of the oldest prompt that is not
read yet, so that a long prompt delays the others by a chunk at a time. Where blocks run out, the newest sequence gives
its own up and begins again later; the oldest is never asked to, so that everything ends.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmtrain.config.model import ModelConfig
from llmtrain.infer.batching.blocks import BlockPool, Digest, next_digest
from llmtrain.infer.batching.request import Ending, NewToken, Request
from llmtrain.models.attention.rows import BLOCK, SPARE


@dataclass(frozen=True)
class Limits:
    """What a batch may take: sequences at a time, blocks of all of them, positions of one, and prompt tokens a step.

    `chunk` is a multiple of BLOCK. With `exact`, whatever is computed of a sequence is computed in the same pieces,
    however often it has to begin again and whatever was found of its prompt.
    """

    slots: int
    blocks: int
    max_seq_len: int
    chunk: int = 256
    exact: bool = False
    shares_prompts: bool = True
    """False where the memory of positions is more than their keys, as of linear attention or behind an encoder."""

    def __post_init__(self) -> None:
        assert self.slots > 0 and self.chunk > 0 and self.chunk % BLOCK == 0, self

    @staticmethod
    def of(config: ModelConfig, slots: int, positions: int | None = None, exact: bool = False) -> "Limits":
        """Room for texts of so many positions, else of the longest ones, in all slots: nothing has to begin again."""
        encodes = config.family == "encoder_decoder"
        each = blocks_for(positions or config.max_seq_len) + (blocks_for(config.max_seq_len) if encodes else 0)
        shares = not encodes and config.attention.kind != "linear"
        # Experts that choose do so among the tokens of one piece, so that other pieces are another computation.
        exact = exact or (config.moe is not None and config.moe.router == "expert_choice")
        return Limits(slots, slots * each, config.max_seq_len, exact=exact, shares_prompts=shares)

    def cache_bytes(self, config: ModelConfig, item_bytes: int = 4) -> int:
        """Memory of all layers' keys and values, or sums, once everything is taken."""
        if config.attention.kind == "linear":
            own = (self.slots + 1) * config.num_heads * config.head_size * (config.head_size + 1)
        else:
            own = 0
        keys = 2 * (self.blocks + 1) * BLOCK * config.kv_heads * config.head_size
        stores = (own == 0) + (config.family == "encoder_decoder")
        return config.decoder_layers * item_bytes * (own + stores * keys)

    def blocks_of(self, request: Request) -> int:
        """The most blocks that a request can come to own."""
        positions = min(self.max_seq_len, len(request.prompt) + request.max_tokens)
        return blocks_for(positions) + blocks_for(len(request.source))


def blocks_for(positions: int) -> int:
    return -(-positions // BLOCK)


@dataclass(frozen=True)
class PromptChunk:
    """Several next positions of one sequence; `source` is what its encoder reads where it begins."""

    request: int
    slot: int
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    chooses: bool
    """True where the token behind them is asked for."""
    source: tuple[int, ...] = ()
    memory_blocks: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Positions that are computed behind it."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class DecodeRow:
    """The next position of one sequence."""

    request: int
    slot: int
    token: int
    position: int
    blocks: tuple[int, ...]
    chooses: bool
    memory_length: int = 0
    memory_blocks: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Positions that are computed behind it."""
        return self.position + 1


@dataclass(frozen=True)
class BatchStep:
    """What to compute; the scores that are asked for come in this order: those of chunks, then those of rows."""

    chunks: tuple[PromptChunk, ...]
    rows: tuple[DecodeRow, ...]

    @property
    def chosen(self) -> list[PromptChunk | DecodeRow]:
        """Those behind which a token is asked for."""
        return [part for part in (*self.chunks, *self.rows) if part.chooses]


@dataclass(eq=False)
class RunningRequest:
    """A request on its way: its tokens, and how far they are computed and where."""

    number: int
    request: Request
    tokens: list[int]
    read_until: int = 0
    """Positions that are read in chunks; those behind them come one at a time."""
    computed: int = 0
    """Positions whose keys lie in blocks."""
    slot: int = 0
    """0: it waits."""
    blocks: list[int] = field(default_factory=list)
    memory_blocks: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    """Of its first blocks."""

    @property
    def reads(self) -> bool:
        """True where its next positions come in a chunk."""
        return self.computed < self.read_until

    def digest(self, block: int) -> Digest:
        """Of a block whose tokens are all known."""
        while len(self.digests) <= block:
            start = len(self.digests) * BLOCK
            before = self.digests[-1] if self.digests else b""
            self.digests.append(next_digest(before, self.tokens[start : start + BLOCK]))
        return self.digests[block]

    def ending(self, limits: Limits) -> Ending | None:
        """Why its newest token is its last one."""
        if self.tokens[-1] in self.request.ends:
            return "stop"
        full = len(self.tokens) >= min(limits.max_seq_len, len(self.request.prompt) + self.request.max_tokens)
        return "length" if full else None


class Scheduler:
    """Requests on their way through a batch."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.blocks)
        self._free_slots = list(range(limits.slots, SPARE, -1))
        self._waiting: deque[RunningRequest] = deque()
        self._running = dict[int, RunningRequest]()
        self._added = 0

    @property
    def is_idle(self) -> bool:
        """True where nothing is on its way."""
        return not self._waiting and not self._running

    def add(self, request: Request) -> int:
        """The number of a request, which waits from now on. It fits: see `Limits.blocks_of`."""
        assert 0 < len(request.prompt) < self.limits.max_seq_len and request.max_tokens > 0, (
            "requests are checked before"
        )
        assert self.limits.blocks_of(request) <= self.limits.blocks, "requests are checked before"
        self._added += 1
        self._waiting.append(RunningRequest(self._added, request, list(request.prompt)))
        return self._added

    def cancel(self, number: int) -> None:
        """Forget a request, wherever it is."""
        if (progress := self._running.get(number)) is not None:
            self._release(progress)
        else:
            self._waiting = deque(each for each in self._waiting if each.number != number)

    def plan(self) -> BatchStep:
        """The next step; empty where nothing is on its way."""
        self._admit()
        chunks, rows, budget = list[PromptChunk](), list[DecodeRow](), self.limits.chunk
        # The oldest first: where blocks run out, newer ones give theirs up, which are in no plan yet.
        for progress in sorted(self._running.values(), key=lambda each: each.number):
            if not progress.slot:
                continue  # it has just given up its place
            if not progress.reads:
                if self._reserve(progress, progress.computed + 1):
                    rows.append(self._row(progress))
            elif budget > 0:
                if not progress.blocks:
                    self._find_beginning(progress)
                whole = (progress.computed // self.limits.chunk + 1) * self.limits.chunk
                end = min(progress.read_until, whole)
                if self._reserve(progress, end):
                    chunks.append(self._chunk(progress, end))
                    budget -= end - progress.computed
        return BatchStep(tuple(chunks), tuple(rows))

    def done(self, step: BatchStep, tokens: Iterable[int]) -> list[NewToken]:
        """Take in what was chosen behind a step, in the order of `BatchStep.chosen`."""
        chosen, found = iter(tokens), list[NewToken]()
        for part in (*step.chunks, *step.rows):
            token = next(chosen) if part.chooses else None
            progress = self._running.get(part.request)
            if progress is None:
                continue  # cancelled meanwhile
            before, progress.computed = progress.computed, part.end
            self._name_blocks(progress, before)
            if token is None:
                continue
            progress.tokens.append(token)
            ending = progress.ending(self.limits)
            found.append(NewToken(progress.number, token, ending))
            if ending is not None:
                self._release(progress)
        return found

    def _admit(self) -> None:
        """Give slots to those that wait longest, as far as what they are to read has room."""
        while self._waiting and self._free_slots:
            progress = self._waiting[0]
            memory = blocks_for(len(progress.request.source))
            promised = sum(
                blocks_for(each.read_until) - len(each.blocks) for each in self._running.values() if each.reads
            )
            if self._running and self.pool.available <= promised + memory + blocks_for(len(progress.tokens)):
                return
            self._waiting.popleft()
            progress.read_until = len(progress.request.prompt if self.limits.exact else progress.tokens)
            progress.slot = self._free_slots.pop()
            self._running[progress.number] = progress
            taken = [self.pool.take() for _ in range(memory)]
            progress.memory_blocks = [block for block in taken if block is not None]
            assert len(progress.memory_blocks) == memory, "there is room for it"

    def _find_beginning(self, progress: RunningRequest) -> None:
        """Share the blocks in which the same tokens were read before, but for the last one that it reads."""
        if not self.limits.shares_prompts:
            return
        found = list[int]()
        for number in range((progress.read_until - 1) // BLOCK):
            block = self.pool.find(progress.digest(number))
            if block is None:
                break
            found.append(block)
        if self.limits.exact:  # the pieces that follow begin where they would have begun
            pieces = self.limits.chunk // BLOCK
            del found[len(found) // pieces * pieces :]
        for block in found:
            self.pool.share(block)
        progress.blocks, progress.computed = found, len(found) * BLOCK

    def _name_blocks(self, progress: RunningRequest, before: int) -> None:
        """Let others find the blocks that have become full; `exact`, those that were read in whole chunks."""
        if not self.limits.shares_prompts:
            return
        size = self.limits.chunk
        end = progress.computed if not self.limits.exact else min(progress.computed, progress.read_until) // size * size
        for number in range(before // BLOCK, end // BLOCK):
            self.pool.name(progress.blocks[number], progress.digest(number))

    def _reserve(self, progress: RunningRequest, positions: int) -> bool:
        """Get blocks for so many positions; False where it was itself what had to give way."""
        while len(progress.blocks) < blocks_for(positions):
            block = self.pool.take()
            if block is not None:
                progress.blocks.append(block)
                continue
            newest = self._running[max(self._running)]
            self._release(newest)
            self._waiting.appendleft(newest)
            if newest is progress:
                return False
        return True

    def _release(self, progress: RunningRequest) -> None:
        del self._running[progress.number]
        self._free_slots.append(progress.slot)
        self.pool.leave([*progress.memory_blocks, *progress.blocks])
        progress.slot, progress.computed, progress.blocks, progress.memory_blocks = 0, 0, [], []

    def _chunk(self, progress: RunningRequest, end: int) -> PromptChunk:
        tokens = tuple(progress.tokens[progress.computed : end])
        return PromptChunk(
            *(progress.number, progress.slot, tokens, progress.computed, tuple(progress.blocks)),
            chooses=end == len(progress.tokens),
            source=progress.request.source,
            memory_blocks=tuple(progress.memory_blocks),
        )

    def _row(self, progress: RunningRequest) -> DecodeRow:
        at = progress.computed
        return DecodeRow(
            *(progress.number, progress.slot, progress.tokens[at], at, tuple(progress.blocks)),
            chooses=at + 1 == len(progress.tokens),
            memory_length=len(progress.request.source),
            memory_blocks=tuple(progress.memory_blocks),
        )

"""Plans under random arrivals, cancellations and too few blocks: every sequence finds its own tokens in its blocks,
nothing is lost, and everything ends."""

import random
from dataclasses import dataclass, field

import pytest

from llmtrain.infer.batching.request import NewToken, Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.batching.scheduler import BatchStep, Limits, PromptChunk, Scheduler
from llmtrain.models.attention.rows import BLOCK
from llmtrain.values.keyed_hash import derived_key

LONGEST = 12 * BLOCK
END = 0


@dataclass
class FakeModel:
    """Remembers tokens where others have keys; the next token follows from all before it."""

    limits: Limits
    memory: dict[int, list[int | None]] = field(default_factory=dict)
    computed: int = 0
    pieces: dict[tuple[int, int], str] = field(default_factory=dict)
    """By request and first position: in which piece it was computed last."""

    def run(self, step: BatchStep) -> list[int]:
        assert len(step.rows) + len(step.chunks) <= self.limits.slots
        slots = [part.slot for part in (*step.rows, *step.chunks)]
        assert len(set(slots)) == len(slots) and 0 not in slots
        written = [block for part in (*step.rows, *step.chunks) for block in self.write(part)]
        assert len(set(written)) == len(written), "two sequences write into one block"
        return [self.next_token(part) for part in step.chosen]

    def write(self, part) -> list[int]:
        tokens, start = (part.tokens, part.start) if isinstance(part, PromptChunk) else ((part.token,), part.position)
        self.pieces[part.request, start] = f"{type(part).__name__} of {len(tokens)}"
        self.computed += len(tokens)
        assert 0 not in part.blocks, "the spare block is nobody's"
        for place, token in enumerate(tokens, start):
            self.memory.setdefault(part.blocks[place // BLOCK], [None] * BLOCK)[place % BLOCK] = token
        return list(part.blocks[start // BLOCK : (part.end - 1) // BLOCK + 1])

    def next_token(self, part) -> int:
        read = [self.memory[part.blocks[place // BLOCK]][place % BLOCK] for place in range(part.end)]
        return token_behind([token for token in read if token is not None])


def token_behind(tokens: list[int]) -> int:
    return derived_key("token", *tokens) % 60


def expected(request: Request) -> list[int]:
    tokens = list(request.prompt)
    while len(tokens) < min(LONGEST, len(request.prompt) + request.max_tokens):
        tokens.append(token_behind(tokens))
        if tokens[-1] in request.ends:
            break
    return tokens[len(request.prompt) :]


def requests(rng: random.Random, count: int) -> list[Request]:
    shared = [rng.randrange(1, 60) for _ in range(LONGEST)]
    found = []
    for _ in range(count):
        start = shared[: rng.choice([0, 20, 70, 200, 300])]
        prompt = (*start, *(rng.randrange(1, 60) for _ in range(rng.randrange(1, 80))))
        ends = frozenset([END]) if rng.random() < 0.5 else frozenset()
        found.append(Request(prompt, rng.randrange(1, 90), Sampling(), ends))
    return found


def run(limits: Limits, asked: list[Request], rng: random.Random, cancels: float = 0.0) -> tuple[FakeModel, dict, set]:
    scheduler, model = Scheduler(limits), FakeModel(limits)
    written, names, cancelled = dict[int, list[NewToken]](), dict[int, int](), set[int]()
    waiting = list(enumerate(asked))
    while waiting or not scheduler.is_idle:
        while waiting and rng.random() < 0.4:
            index, request = waiting.pop(0)
            names[scheduler.add(request)] = index
        plan = scheduler.plan()
        tokens = model.run(plan)
        if names and rng.random() < cancels:  # between plan and result, as a client may leave
            number = rng.choice(sorted(names))
            scheduler.cancel(number)
            cancelled.add(names[number])
        for new in scheduler.done(plan, tokens):
            written.setdefault(names[new.request], []).append(new)
    assert scheduler.pool.available == limits.blocks, "a block was lost"
    return model, written, cancelled


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(("slots", "blocks"), [(1, 12), (4, 14), (8, 40), (8, 96)])
def test_every_sequence_goes_on_from_its_own_tokens(slots: int, blocks: int, shares: bool, exact: bool) -> None:
    for seed in range(6):
        rng = random.Random(seed)
        asked = requests(rng, 25)
        limits = Limits(slots, blocks, LONGEST, chunk=2 * BLOCK, exact=exact, shares_prompts=shares)
        _, written, cancelled = run(limits, asked, rng, cancels=0.02)
        for number, request in enumerate(asked):
            tokens = [new.token for new in written.get(number, [])]
            if number not in cancelled:
                assert tokens == expected(request)
                endings = [new.ending for new in written[number]]
                assert set(endings[:-1]) <= {None} and endings[-1] == (
                    "stop" if tokens[-1] in request.ends else "length"
                )
            else:
                assert tokens == expected(request)[: len(tokens)]


def test_exact_computes_each_position_in_the_same_pieces_whatever_happens() -> None:
    for seed in range(8):
        asked = requests(random.Random(seed), 20)
        alone, _, _ = run(Limits(1, 12, LONGEST, 2 * BLOCK, True, False), asked, random.Random(0))
        crowded, _, _ = run(Limits(6, 13, LONGEST, 2 * BLOCK, True, True), asked, random.Random(1))
        assert crowded.pieces.items() <= alone.pieces.items()


def test_a_prompt_that_was_read_before_is_not_read_again() -> None:
    prompt = tuple(range(1, 5 * BLOCK + 10))
    asked = [Request((*prompt, 50 + number), 3, Sampling()) for number in range(4)]
    counts = {
        (shares, exact): run(Limits(2, 40, LONGEST, 2 * BLOCK, exact, shares), asked, random.Random(0))[0].computed
        for shares in (False, True)
        for exact in (False, True)
    }
    whole = 4 * (len(prompt) + 1 + 2)
    assert counts[False, False] == counts[False, True] == whole
    assert counts[True, False] == whole - 3 * 5 * BLOCK
    assert counts[True, True] == whole - 3 * 4 * BLOCK, "whole pieces only"


def test_the_oldest_ends_first_where_blocks_run_out() -> None:
    asked = [Request((number + 1,) * (3 * BLOCK), 6 * BLOCK, Sampling()) for number in range(3)]
    scheduler = Scheduler(Limits(3, 12, LONGEST))
    model = FakeModel(scheduler.limits)
    numbers = [scheduler.add(request) for request in asked]
    ended, begun = [], 0
    while not scheduler.is_idle:
        plan = scheduler.plan()
        begun += sum(chunk.start == 0 for chunk in plan.chunks)
        ended += [new.request for new in scheduler.done(plan, model.run(plan)) if new.ending]
    assert ended == numbers and begun > len(numbers), "some had to begin again"


def test_a_long_prompt_does_not_keep_the_others_waiting() -> None:
    scheduler = Scheduler(Limits(4, 48, LONGEST, chunk=BLOCK))
    model = FakeModel(scheduler.limits)
    scheduler.add(Request((1,), 50, Sampling()))
    scheduler.done(plan := scheduler.plan(), model.run(plan))
    scheduler.add(Request((2,) * (10 * BLOCK), 5, Sampling()))
    for _ in range(10):
        plan = scheduler.plan()
        assert len(plan.rows) == 1 and sum(len(chunk.tokens) for chunk in plan.chunks) <= BLOCK
        scheduler.done(plan, model.run(plan))


def test_several_short_prompts_are_read_in_one_step() -> None:
    scheduler = Scheduler(Limits(8, 48, LONGEST, chunk=BLOCK))
    for number in range(8):
        scheduler.add(Request((number + 1,) * 10, 5, Sampling()))
    assert [len(scheduler.plan().chunks)] == [4]

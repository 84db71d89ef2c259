"""Every text is scored once, in a row that holds it; ranks have equally many micro-batches, all of one shape."""

import random

import pytest

from llmtrain.data.tasks.batches import Dealing, plan_steps, step_batches
from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.values.batch import IGNORED_LABEL, PADDING, Batch

LIMIT = 60
DEALINGS = {
    "one rank": Dealing(64, LIMIT, 0, parts=1, per_rank=4, round=1),
    "four ranks": Dealing(128, LIMIT, 0, parts=1, per_rank=2, round=1, dp_size=4),
    "parts that do not divide": Dealing(128, LIMIT, 0, parts=8, per_rank=4, round=2, dp_size=2),
    "a soft prompt": Dealing(96, LIMIT, 7, parts=2, per_rank=2, round=2, dp_size=3),
    "short batches": Dealing(16, LIMIT, 0, parts=1, per_rank=3, round=1),
}


def drawn(rng: random.Random, count: int, longest: int, encodes: bool) -> list[ScoredText]:
    texts = list[ScoredText]()
    for _ in range(count):
        ids = tuple(rng.randrange(1, 1000) for _ in range(rng.randrange(2, longest + (not encodes) + 1)))
        source = tuple(rng.randrange(1, 1000) for _ in range(rng.randrange(1, longest + 1))) if encodes else ()
        texts.append(ScoredText(ids, rng.randrange(1, len(ids)), source))
    return texts


def read(batch: Batch, row: int, prompt: int) -> ScoredText:
    """The text of a row, as a model sees it: what is given from the first token on, and the labels."""
    encodes = batch.encoder_tokens_BT is not None
    skipped = 0 if encodes else prompt
    tokens, labels = batch.tokens_BS[row, skipped:].tolist(), batch.labels_BS[row, skipped:].tolist()
    places = [place for place, label in enumerate(labels) if label != IGNORED_LABEL]
    assert places == list(range(places[0], places[-1] + 1))
    source = ()
    if batch.encoder_tokens_BT is not None and batch.encoder_segments_BT is not None:
        seen = batch.encoder_segments_BT[row] != PADDING
        source = tuple(batch.encoder_tokens_BT[row][seen].tolist()[prompt:])
    return ScoredText((*tokens[: places[-1] + 1], labels[places[-1]]), places[0] + 1, source)


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("name", DEALINGS)
def test_every_text_is_scored_once(name: str, encodes: bool) -> None:
    dealing = DEALINGS[name]
    if encodes and LIMIT % dealing.parts:
        pytest.skip("a rule refuses it: tasks_fit_the_parts")
    for count in (1, 5, 40):
        texts = drawn(random.Random(count), count, LIMIT - dealing.prompt_tokens, encodes)
        found = list[int]()
        for step in plan_steps(texts, dealing):
            ranks = [
                step_batches(texts, step, Dealing(**{**vars(dealing), "dp_rank": rank}))
                for rank in range(dealing.dp_size)
            ]
            shapes = {(batch.tokens_BS.shape, batch.num_texts) for batches in ranks for batch in batches}
            numbers = {len(batches) for batches in ranks}
            assert len(shapes) == len(numbers) == 1
            assert all(0 < number <= dealing.per_rank and number % dealing.round == 0 for number in numbers)
            for batch in (batch for batches in ranks for batch in batches):
                check_shape(batch, dealing)
                found += [step.places[place] for place in rows_of(batch, texts, step.places, dealing.prompt_tokens)]
        assert sorted(found) == list(range(count))


def check_shape(batch: Batch, dealing: Dealing) -> None:
    rows, length = batch.tokens_BS.shape
    source = 0 if batch.encoder_tokens_BT is None else batch.encoder_tokens_BT.shape[1]
    assert rows == 1 or rows * (length + source) <= dealing.tokens
    assert (length % dealing.parts, source % dealing.parts) == (0, 0)
    assert int(batch.positions_BS.max()) < dealing.limit
    assert source <= dealing.limit


def rows_of(batch: Batch, texts: list[ScoredText], places: list[int], prompt: int) -> list[int]:
    """The numbers of the texts in the rows of a batch, each of which is that text; blank rows have none."""
    assert batch.texts_B is not None
    found = list[int]()
    for row, number in enumerate(batch.texts_B.tolist()):
        if bool((batch.labels_BS[row] != IGNORED_LABEL).any()):
            assert read(batch, row, prompt) == texts[places[number]]
            found.append(number)
        elif batch.encoder_segments_BT is not None:
            assert bool((batch.encoder_segments_BT[row] != PADDING).any()), "a row that sees nothing has no numbers"
    return found


def test_short_texts_share_a_batch_and_few_shapes_are_met() -> None:
    dealing = Dealing(4096, 2048, 0, parts=1, per_rank=8, round=1, dp_size=2)
    texts = [ScoredText(tuple(range(size)), 1) for size in range(2, 1500)]
    steps = list(plan_steps(texts, dealing))
    assert {step.length for step in steps} <= {16, 32, 64, 128, 256, 512, 1024, 2048}
    assert steps[0].rows == 2 and steps[-1].rows > 8
    lengths = [step.length for step in steps]
    assert lengths == sorted(lengths, reverse=True), "memory that suffices at first suffices"
    (step,) = plan_steps([ScoredText(tuple(range(9)), 1)] * 3000, dealing)
    assert (step.length, step.rows, step.micro_batches) == (16, 256, 12)

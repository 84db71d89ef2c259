"""The zero-bubble plan, played through with costs: its time, its memory, its messages."""

from collections.abc import Iterable, Mapping
from itertools import product

import pytest

from llmtrain.parallel.pipeline_schedule import (
    Action,
    Compute,
    Message,
    Receive,
    Send,
    Work,
    compute_order,
    plan_zero_bubble,
)

Costs = Mapping[Work, float]

UNIT: Costs = {"forward": 1, "input_gradient": 1, "weight_gradient": 1}
STAGES = (2, 3, 4, 5, 8)
GRID = [(stages, micro_batches) for stages in STAGES for micro_batches in (*range(1, 10), 17, 24)]


def plans(stages: int, micro_batches: int) -> list[list[Action]]:
    return [plan_zero_bubble(stage, stages, micro_batches) for stage in range(stages)]


def one_f_one_b(stages: int, micro_batches: int) -> list[list[Action]]:
    """The same without W's of their own: B and W in one, which the stage before waits for."""
    return [
        [action for action in actions if not (isinstance(action, Compute) and action.work == "weight_gradient")]
        for actions in plans(stages, micro_batches)
    ]


class Pipeline:
    """Plays plans: messages take no time, and those of two neighbours are exchanged one after the other, each when both
    ends have begun with it. `blocking`: whoever begins with a message does nothing else until it is exchanged. A stage
    that sends waits for the message of this kind that it has sent before."""

    def __init__(self, actions: list[list[Action]], costs: Costs, blocking: bool = False) -> None:
        self.actions, self.costs, self.blocking = actions, costs, blocking
        self.clock = [0.0] * len(actions)
        self.next = [0] * len(actions)
        self.begun: dict[tuple[int, bool], list[tuple[Message, int, float]]] = {}
        self.exchanged: dict[tuple[int, Message, int], float] = {}
        self.channel_free = [0.0] * len(actions)
        while sum(self.advance(stage) for stage in range(len(actions))):
            pass
        assert self.next == [len(each) for each in actions], "stages wait for each other"

    @property
    def makespan(self) -> float:
        return max(self.clock)

    def advance(self, stage: int) -> bool:
        before = self.next[stage]
        while self.next[stage] < len(self.actions[stage]) and self.do(stage, self.actions[stage][self.next[stage]]):
            self.next[stage] += 1
        return self.next[stage] > before

    def do(self, stage: int, action: Action) -> bool:
        """False: not yet."""
        if isinstance(action, Compute):
            needed = self.needed(stage, action)
            if needed is not None and needed not in self.exchanged:
                return False
            start = max(self.clock[stage], self.exchanged[needed] if needed else 0.0)
            self.clock[stage] = start + self.costs[action.work]
            return True
        upper = stage if isinstance(action, Send) == (action.message == "activation") else stage - 1
        before = (upper, action.message, action.micro_batch - 1)
        if isinstance(action, Send) and action.micro_batch:
            if before not in self.exchanged:
                return False
            self.clock[stage] = max(self.clock[stage], self.exchanged[before])
        mine = self.begun.setdefault((upper, stage == upper), [])
        if action[:] not in [message[:2] for message in mine]:
            mine.append((*action, self.clock[stage]))
            self.exchange(upper)
        if not self.blocking:
            return True
        done = self.exchanged.get((upper, *action))
        self.clock[stage] = max(self.clock[stage], done or 0.0)
        return done is not None

    def needed(self, stage: int, compute: Compute) -> tuple[int, Message, int] | None:
        if compute.work == "forward" and stage > 0:
            return stage - 1, "activation", compute.micro_batch
        if compute.work == "input_gradient" and stage < len(self.actions) - 1:
            return stage, "gradient", compute.micro_batch
        return None

    def exchange(self, upper: int) -> None:
        for one, other in zip(self.begun.get((upper, True), []), self.begun.get((upper, False), []), strict=False):
            assert one[:2] == other[:2], f"between stages {upper} and {upper + 1} {one} meets {other}"
            if (upper, *one[:2]) not in self.exchanged:
                self.channel_free[upper] = max(self.channel_free[upper], one[2], other[2])
                self.exchanged[upper, one[0], one[1]] = self.channel_free[upper]


@pytest.mark.parametrize(("stages", "micro_batches"), GRID)
def test_every_micro_batch_goes_forward_and_back_and_then_to_the_weights(stages: int, micro_batches: int) -> None:
    for actions in plans(stages, micro_batches):
        computed = [action for action in actions if isinstance(action, Compute)]
        for work in UNIT:  # gradients are added up in the order of micro-batches
            assert [each.micro_batch for each in computed if each.work == work] == list(range(micro_batches))
        for number in range(micro_batches):
            places = [computed.index(Compute(work, number)) for work in UNIT]
            assert places == sorted(places)


@pytest.mark.parametrize(("stages", "micro_batches"), GRID)
def test_no_stage_waits_in_vain_even_where_every_message_blocks(stages: int, micro_batches: int) -> None:
    Pipeline(plans(stages, micro_batches), UNIT)
    Pipeline(plans(stages, micro_batches), UNIT, blocking=True)


@pytest.mark.parametrize(("stages", "micro_batches"), [case for case in GRID if case[1] >= case[0]])
def test_the_bubble_is_that_of_the_paper(stages: int, micro_batches: int) -> None:
    """Qi et al. 2023, section 2.3: (p - 1)(T_F + T_B - T_W), of 1F1B (p - 1)(T_F + T_B + T_W)."""
    for forward, back, weights in ((1, 1, 1), (1, 1, 0.5), (1, 1.5, 1), (2, 2, 1), (2, 1, 1)):
        apart: Costs = {"forward": forward, "input_gradient": back, "weight_gradient": weights}
        together = {**apart, "input_gradient": back + weights}
        ideal = micro_batches * (forward + back + weights)
        bubble = Pipeline(plans(stages, micro_batches), apart).makespan - ideal
        assert bubble == pytest.approx((stages - 1) * (forward + back - weights))
        bubble = Pipeline(one_f_one_b(stages, micro_batches), together).makespan - ideal
        assert bubble == pytest.approx((stages - 1) * (forward + back + weights))


@pytest.mark.parametrize(("stages", "micro_batches"), [case for case in GRID if case[1] < case[0]])
def test_with_fewer_micro_batches_than_stages_it_is_still_shorter_than_1f1b(stages: int, micro_batches: int) -> None:
    bubble = Pipeline(plans(stages, micro_batches), UNIT).makespan - 3 * micro_batches
    together = {**UNIT, "input_gradient": 2}
    assert bubble == (stages - 1) + (stages - micro_batches)
    assert bubble < Pipeline(one_f_one_b(stages, micro_batches), together).makespan - 3 * micro_batches


def most(actions: Iterable[Action], first: Work, last: Work) -> int:
    """The most micro-batches that have done the one and not the other."""
    held = found = 0
    for action in actions:
        if isinstance(action, Compute):
            held += (action.work == first) - (action.work == last)
            found = max(found, held)
    return found


@pytest.mark.parametrize(("stages", "micro_batches"), GRID)
def test_no_stage_keeps_more_than_the_first_one_of_1f1b(stages: int, micro_batches: int) -> None:
    whole = min(stages, micro_batches)
    for stage, actions in enumerate(plans(stages, micro_batches)):
        activations = min(stages - stage, micro_batches)
        assert most(actions, "forward", "input_gradient") == activations, "as in 1F1B"
        # What W needs is all that is left of them, for one micro-batch more as soon as its B is done.
        assert most(actions, "input_gradient", "weight_gradient") == min(stage + 1, micro_batches)
        assert most(actions, "forward", "weight_gradient") <= whole
    last = plan_zero_bubble(stages - 1, stages, micro_batches)
    assert most(last, "forward", "weight_gradient") == whole


@pytest.mark.parametrize(("stages", "micro_batches"), GRID)
def test_one_message_of_a_kind_is_received_ahead(stages: int, micro_batches: int) -> None:
    """Each takes memory: beside the one that is in use there is one."""
    users: dict[Message, Work] = {"activation": "forward", "gradient": "input_gradient"}
    for actions, (message, work) in product(plans(stages, micro_batches), users.items()):
        ahead = 0
        for action in actions:
            ahead += isinstance(action, Receive) and action.message == message
            ahead -= isinstance(action, Compute) and action.work == work and ahead > 0
            assert ahead <= 2


def test_the_plan_of_the_paper() -> None:
    """Four stages: the first one's W's follow its B's, the last one's wait for three more."""

    def letters(stage: int) -> str:
        names = {"forward": "F", "input_gradient": "B", "weight_gradient": "W"}
        return " ".join(f"{names[each.work]}{each.micro_batch}" for each in compute_order(stage, 4, 5))

    assert letters(0) == "F0 F1 F2 F3 B0 W0 F4 B1 W1 B2 W2 B3 W3 B4 W4"
    assert letters(3) == "F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 W2 W3 W4"


def late(actions: list[Action]) -> list[Action]:
    """Begin to receive only where it is needed, as 1F1B does."""
    found: list[Action] = []
    waiting: list[Receive] = []
    for action in actions:
        if isinstance(action, Receive):
            waiting.append(action)
            continue
        message = "activation" if isinstance(action, Compute) and action.work == "forward" else "gradient"
        if isinstance(action, Compute) and action.work != "weight_gradient":
            needed = [each for each in waiting if each == Receive(message, action.micro_batch)]
            waiting = [each for each in waiting if each not in needed]
            found += needed
        found.append(action)
    return found


def test_receiving_in_another_order_is_caught() -> None:
    first, *others = plans(3, 6)
    with pytest.raises(AssertionError, match="between stages 0 and 1"):
        Pipeline([late(first), *others], UNIT)

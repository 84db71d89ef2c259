"""The zero-bubble schedule ZB-H1 (Qi et al. 2023, section 2.1): what each pipeline stage does, in order. Pure.

A backward pass is two: B, the gradient of a stage's input, for which the stage before waits, and W, the gradients of
its weights, for which nobody waits. Stages do F and B as in 1F1B. W of a micro-batch follows B on the first stage at
once, and on stage s only s micro-batches later: until then the stage hands its B on sooner, and what is left over at
the end fills the time in which it would wait for the gradients of the last micro-batches.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Work = Literal["forward", "input_gradient", "weight_gradient"]
"""F, B and W."""

Message = Literal["activation", "gradient"]
"""What a stage sends to the next one after F, and to the one before after B."""


class Compute(NamedTuple):
    """Do F, B or W of a micro-batch. F and B need what has been received for them, if they are not at an end."""

    work: Work
    micro_batch: int


class Send(NamedTuple):
    """Send what F or B has just made. Nobody waits until it is received."""

    message: Message
    micro_batch: int


class Receive(NamedTuple):
    """Begin to receive. The F or B that needs it waits for it."""

    message: Message
    micro_batch: int


Action = Compute | Send | Receive

MESSAGES: dict[Work, Message] = {"forward": "activation", "input_gradient": "gradient"}


def compute_order(stage: int, stages: int, micro_batches: int) -> list[Compute]:
    """F, B and W of all micro-batches on a stage.

    It keeps something of as many micro-batches as there are stages at most, as the first stage of 1F1B does: of the
    last `stage` of them, or one more after a B, what W needs, and of the others all activations.
    """
    warmup = min(stages - 1 - stage, micro_batches)  # as in 1F1B
    order = [Compute("forward", number) for number in range(warmup)]
    weight_gradients = (Compute("weight_gradient", number) for number in range(micro_batches))
    for number in range(micro_batches):
        if number + warmup < micro_batches:
            order.append(Compute("forward", number + warmup))
        order.append(Compute("input_gradient", number))
        if number >= stage:  # so many B's is this stage ahead of its W's
            order.append(next(weight_gradients))
    return [*order, *weight_gradients]


@dataclass
class Channel:
    """The messages between two neighbours, in the one order in which both of them begin to send and to receive.

    On GPUs they go through one communicator, which does one after the other: where the two ends had different orders,
    each would wait for the other.
    """

    messages: deque[tuple[Message, int]]
    received: Message
    """What this end receives."""
    begun: int = 0
    """Messages that it has begun to receive."""
    used: int = 0
    """Those of them that a computation has used, or waits for."""

    @staticmethod
    def between(upper: int, stages: int, micro_batches: int, received: Message) -> "Channel":
        """The channel of stages `upper` and `upper` + 1, in the order in which the latter computes.

        It begins to receive an activation when it has sent the gradients before that, and the former begins to receive
        those gradients before it has made the activation.
        """
        order = compute_order(upper + 1, stages, micro_batches)
        return Channel(deque((MESSAGES[c.work], c.micro_batch) for c in order if c.work in MESSAGES), received)

    def receives(self) -> Iterator[Receive]:
        """What is next to be received, at most one ahead of what is used: each takes memory."""
        while self.messages and self.messages[0][0] == self.received and self.begun <= self.used:
            self.begun += 1
            yield Receive(*self.messages.popleft())

    def send(self, message: Message, micro_batch: int) -> Send:
        """What has just been made: it is this message's turn."""
        assert self.messages.popleft() == (message, micro_batch), "received too late"
        return Send(message, micro_batch)


def plan_zero_bubble(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """All that a stage does in a step."""
    before = Channel.between(stage - 1, stages, micro_batches, "activation") if stage > 0 else None
    after = Channel.between(stage, stages, micro_batches, "gradient") if stage < stages - 1 else None
    channels = [channel for channel in (before, after) if channel is not None]
    actions: list[Action] = []

    def receive() -> None:
        for channel in channels:
            actions.extend(channel.receives())

    receive()
    for compute in compute_order(stage, stages, micro_batches):
        source, target = (before, after) if compute.work == "forward" else (after, before)
        if compute.work in MESSAGES and source is not None:
            source.used += 1
            receive()
        actions.append(compute)
        if compute.work in MESSAGES and target is not None:
            actions.append(target.send(MESSAGES[compute.work], compute.micro_batch))
            receive()
    return actions

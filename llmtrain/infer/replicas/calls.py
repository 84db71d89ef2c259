"""Calls on their way to one of several replicas of a server, and which replica gets the next one."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmtrain.errors import LlmtrainError
from llmtrain.files import parse_json
from llmtrain.infer.serving.asked import DEFAULT_NEW_TOKENS

BYTES_PER_TOKEN = 4
"""Of prompts, about: the tokenizer is with the replicas."""


@dataclass(eq=False)
class PassedCall:
    """A call without its key. `outstanding` says how many tokens are still to be read and written for it, about and at
    most: it gets smaller while an answer streams, and is 0 when the call has ended."""

    method: str
    path: str
    body: bytes
    outstanding: int = 0
    refused_by: set[str] = field(default_factory=set)
    """Replicas that have no room for it."""


@dataclass(frozen=True)
class AnswerHead:
    """How a replica's answer begins. Its bytes follow."""

    replica: str
    status: int
    headers: tuple[tuple[str, str], ...]

    @property
    def streams(self) -> bool:
        return any(value.startswith("text/event-stream") for name, value in self.headers if name == "content-type")


class LostError(LlmtrainError):
    """The replica that had the call is gone."""


class Replicas(Protocol):
    """Several servers of one model."""

    @property
    def num_ready(self) -> int:
        """Replicas that have answered lately."""
        ...

    @property
    def least(self) -> int:
        """Replicas that there should be at least."""
        ...

    def ask(self, call: PassedCall) -> AsyncGenerator[AnswerHead | bytes, None]:
        """The answer of the replica that is best for it: its head, then its bytes; closing it gives the call up.

        Raises LostError where the replica dies.
        """
        ...

    async def figures(self) -> Mapping[str, str]:
        """The figures of each replica, in Prometheus's text format."""
        ...


def promised_tokens(body: bytes, limit: int) -> int:
    """Tokens that a call asks for, about: those of its prompts, and the longest texts that may be written for them.

    0 for what is no call: a replica says what is wrong with it. `limit` is of the new tokens of a text.
    """
    asked: Any = None
    with suppress(ValueError):
        asked = parse_json(body)
    if not isinstance(asked, dict):
        return 0
    prompts = asked.get("prompt", asked.get("input", ""))
    ids = [each if isinstance(each, list) else [each] for each in prompts] if isinstance(prompts, list) else []
    read = sum(isinstance(token, int) for each in ids for token in each) or len(body) // BYTES_PER_TOKEN
    if "input" in asked:
        return read
    longest = [asked.get("max_completion_tokens"), asked.get("max_tokens")]
    default = limit if "messages" in asked else DEFAULT_NEW_TOKENS
    new = next((number for number in longest if isinstance(number, int)), default)
    count = asked.get("n")
    several = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], str | list)
    texts = (len(prompts) if several else 1) * (count if isinstance(count, int) else 1)
    return read + max(0, min(new, limit)) * max(1, texts)


class Balance:
    """The calls that are with each replica. The next one goes to the replica with the fewest outstanding tokens."""

    def __init__(self) -> None:
        self._places = dict[PassedCall, str]()

    def order(self, call: PassedCall, replicas: Sequence[str]) -> list[str]:
        """The replicas, the best for a call first; it counts as that one's from now on.

        Those that have refused it come last, where all have.
        """
        self._places = {other: place for other, place in self._places.items() if other.outstanding and other != call}
        load = dict.fromkeys(replicas, 0)
        for other, place in self._places.items():
            if place in load:
                load[place] += other.outstanding
        ordered = sorted(replicas, key=lambda replica: (replica in call.refused_by, load[replica]))
        if ordered:
            self._places[call] = ordered[0]
        return ordered

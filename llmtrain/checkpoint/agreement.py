"""How the ranks that write one checkpoint together hear of each other, and agree whether it is there.

Of each save every rank says what it needs; rank 0 then whether the folder is ready; every rank what it has written;
rank 0 in the end whether the checkpoint is there. A rank that fails says that in place of its text, so that nobody
waits for what will not come.
"""

from dataclasses import dataclass
from typing import Protocol

from llmtrain.errors import SaveError

FAILED = "failed: "
"""Begins what a rank says in place of its text when it could not do its part."""


class RankStore(Protocol):
    """Small texts that ranks leave for each other under keys, each written once. One thread at a time may use it."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def put(self, key: str, text: str) -> None:
        """Leave a text under a key that nobody used before."""
        ...

    def get(self, key: str) -> str:
        """Wait for the text of a key. Raises LaunchError where nobody leaves one in time."""
        ...


@dataclass(frozen=True)
class SaveMessages:
    """The messages of the ranks about save `number`, counted alike on all of them. A single rank sends none."""

    ranks: RankStore | None
    number: int

    @property
    def rank(self) -> int:
        return 0 if self.ranks is None else self.ranks.rank

    def send(self, topic: str, text: str) -> None:
        """Rank 0 sends to all, another rank to rank 0."""
        if self.ranks is not None:
            # The store keeps every text: the number of the save keeps this one apart from those of earlier saves.
            self.ranks.put(self._key(topic, self.ranks.rank), text)

    def send_failure(self, topic: str, error: BaseException) -> None:
        self.send(topic, f"{FAILED}{str(error) or type(error).__name__}")

    def receive_from_first(self, topic: str) -> str:
        """The message of rank 0. Raises SaveError where it has failed."""
        assert self.ranks is not None
        return _unless_failed(self.ranks.get(self._key(topic, 0)))

    def receive_from_others(self, topic: str) -> list[str]:
        """The messages of all ranks but 0, once all are there. Raises SaveError where one of them has failed."""
        if self.ranks is None:
            return []
        # All are waited for before any is judged: a rank that still writes must not lose its folder.
        texts = [self.ranks.get(self._key(topic, rank)) for rank in range(1, self.ranks.world_size)]
        return [_unless_failed(text) for text in texts]

    def _key(self, topic: str, rank: int) -> str:
        return f"save {self.number}: {topic} {rank}"


def _unless_failed(text: str) -> str:
    if text.startswith(FAILED):
        raise SaveError(text.removeprefix(FAILED))
    return text

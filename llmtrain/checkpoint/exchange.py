"""How the ranks that write one checkpoint together hear of each other."""

from typing import Protocol


class Exchange(Protocol):
    """Small texts that ranks leave for each other under keys, each written once. One thread at a time may use it."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def say(self, key: str, text: str) -> None:
        """Leave a text under a key that nobody used before."""
        ...

    def hear(self, key: str) -> str:
        """Wait for the text of a key. Raises LaunchError where nobody leaves one in time."""
        ...

"""Ranks of one process, as llmtrain.checkpoint.agreement.RankStore: threads that speak over a board."""

import threading
from dataclasses import dataclass, field


@dataclass
class Board:
    """What all ranks have said."""

    texts: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)


@dataclass
class Voice:
    """One rank at the board."""

    board: Board
    rank: int
    world_size: int

    def put(self, key: str, text: str) -> None:
        with self.board.changed:
            assert key not in self.board.texts
            self.board.texts[key] = text
            self.board.changed.notify_all()

    def get(self, key: str) -> str:
        with self.board.changed:
            assert self.board.changed.wait_for(lambda: key in self.board.texts, timeout=20)
            return self.board.texts[key]

"""A batch that writes when a test says so, in place of a model."""

import threading
from collections import Counter

from llmtrain.infer.batching.request import NewToken, Request


class HeldBatch:
    """Writes one token of each text whenever `go` is released, up to the text's limit."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.texts = dict[int, Request]()
        self.added = 0
        self.fails = False
        self._written = Counter[int]()

    @property
    def is_idle(self) -> bool:
        return not self.texts

    def add(self, request: Request) -> int:
        self.added += 1
        self.texts[self.added] = request
        return self.added

    def cancel(self, number: int) -> None:
        self.texts.pop(number, None)

    def step(self) -> list[NewToken]:
        if not self.go.acquire(timeout=0.01):
            return []
        if self.fails:
            raise RuntimeError("the secret of the model")
        self._written.update(list(self.texts))
        ends = [number for number, request in self.texts.items() if self._written[number] == request.max_tokens]
        return [NewToken(number, 40, "length" if number in ends else None) for number in self.texts]

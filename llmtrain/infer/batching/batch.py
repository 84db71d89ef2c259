"""Continuous batching: requests come and go, and each step gives the ones on their way a token more."""

from dataclasses import replace

import torch

from llmtrain.infer.batching.arena import Arena, StepRunner
from llmtrain.infer.batching.request import NewToken, Request
from llmtrain.infer.batching.sampling import LogProbs, choose, drawn
from llmtrain.infer.batching.scheduler import DecodeRow, Limits, PromptChunk, Scheduler
from llmtrain.models.transformer import Transformer


class ContinuousBatch:
    """Requests on their way through one model, or through whatever else carries out steps within the same limits."""

    def __init__(self, model: Transformer | StepRunner, limits: Limits) -> None:
        self.scheduler = Scheduler(limits)
        self.arena: StepRunner = Arena(model, limits) if isinstance(model, Transformer) else model
        self._requests = dict[int, Request]()

    def add(self, request: Request) -> int:
        """The request's number."""
        number = self.scheduler.add(request)
        self._requests[number] = request
        return number

    def cancel(self, number: int) -> None:
        """Free what a request holds; nothing more comes of it."""
        self.scheduler.cancel(number)
        self._requests.pop(number, None)

    @property
    def is_idle(self) -> bool:
        """True where nothing is on its way."""
        return self.scheduler.is_idle

    def step(self) -> list[NewToken]:
        """The next tokens; none where no prompt is read to its end yet, or nothing is on its way."""
        plan = self.scheduler.plan()
        logits = self.arena.run(plan)
        parts = plan.chosen
        # The host waits for the device once; greedy tokens come in one piece.
        best = logits.argmax(-1).tolist() if parts else []
        tokens = [self._chosen(part, row, token) for part, row, token in zip(parts, logits, best, strict=True)]
        rows = {part.request: row for part, row in zip(parts, logits, strict=True)}
        found = list[NewToken]()
        for new in self.scheduler.done(plan, tokens):
            request, row_V = self._requests[new.request], rows[new.request]
            if request.logprobs is not None:
                new = replace(new, logprobs=LogProbs.of(row_V, new.token, request.logprobs))
            if request.guide is not None and not request.guide.take(new.token) and new.ending is None:
                new = replace(new, ending="length")
                self.scheduler.cancel(new.request)
            found.append(new)
            if new.ending is not None:
                del self._requests[new.request]
        return found

    def _chosen(self, part: PromptChunk | DecodeRow, logits_V: torch.Tensor, best: int) -> int:
        request = self._requests[part.request]
        if request.guide is not None:
            logits_V = logits_V.masked_fill(~request.guide.allowed().to(logits_V.device), -torch.inf)
        elif request.sampling.temperature == 0:
            return best
        return choose(logits_V, request.sampling, drawn(request.sampling.seed, request.text, part.end))

"""Figures of a server for Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class CallMetrics:
    """Counters and times of calls, with a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        place: dict[str, Any] = {"registry": self._registry}
        self._answers = Counter("llmtrain_requests", "Answered calls", ["path", "status"], **place)
        self._whole = Histogram("llmtrain_request_seconds", "Of a call", ["path"], buckets=SECONDS, **place)

    def watch(self, name: str, told: str, value: Callable[[], float]) -> None:
        """A gauge that is asked for its value when somebody looks."""
        Gauge(f"llmtrain_{name}", told, registry=self._registry).set_function(value)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._answers.labels(path, str(status)).inc()
        self._whole.labels(path).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class ServingMetrics(CallMetrics):
    """Those of calls, and of the tokens that are read and written for them."""

    def __init__(self) -> None:
        super().__init__()
        place: dict[str, Any] = {"registry": self._registry}
        self._prompt_tokens = Counter("llmtrain_prompt_tokens", "Tokens of prompts", **place)
        self._new_tokens = Counter("llmtrain_new_tokens", "Tokens that were written", **place)
        self._first = Histogram("llmtrain_first_token_seconds", "Until the first token", buckets=SECONDS, **place)
        self._next = Histogram("llmtrain_next_token_seconds", "Between tokens", buckets=SECONDS, **place)

    def prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def token(self, seconds: float, first: bool) -> None:
        """One more token, so long after the one before it, or after the request."""
        self._new_tokens.inc()
        (self._first if first else self._next).observe(seconds)

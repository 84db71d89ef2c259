"""What is asked of a batch: a prompt and how to go on from it; and what comes back, token by token."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from llmtrain.infer.batching.sampling import LogProbs, Sampling

Ending = Literal["stop", "length"]
"""Why a text has ended: at one of its ends, or because nothing more was asked for or would fit."""


class Guide(Protocol):
    """What one text may go on with. It goes along with the text, and so belongs to one request."""

    def allowed(self) -> Tensor:
        """[vocabulary], true for the tokens that may come next."""
        ...

    def take(self, token: int) -> bool:
        """Go on by a token. False where nothing more can be said, and the text has to end."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt's ids and how to go on from them.

    Of an encoder-decoder, `source` is what the encoder reads, and the prompt begins what the decoder writes.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    """Tokens that end the text; they are the last one then."""
    text: int = 0
    """Its number among the texts of one prompt and seed."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told with each; None: no probabilities."""
    source: tuple[int, ...] = ()
    guide: Guide | None = None


@dataclass(frozen=True)
class NewToken:
    """One more token of a request, by the request's number in the batch."""

    request: int
    token: int
    ending: Ending | None = None
    logprobs: LogProbs | None = None

"""The proof that llmtrain's model and llama.cpp's are the same: ids of texts and conversations, the likelihoods of all
next tokens along texts, and a greedy continuation, all in llama.cpp itself.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ExportError
from llmtrain.interop.examples import Example, Logits
from llmtrain.interop.gguf.file_format import TensorType
from llmtrain.interop.proof import TOLERANCE
from llmtrain.interop.text.proof import ChatExamples, Prompt
from llmtrain.values.tokenizer import Around, Tokenizer

BINDING = "xllamacpp"

NUM_WINDOWS, FIRST, POSITIONS = 4, 8, 16
"""Texts along which likelihoods are compared, and at which positions."""

_CONTEXT = 256
_LEAST = -40.0
"""Likelihoods below e^-40 are none in the numbers that llama.cpp tells them in."""

ALLOWED = {TensorType.F32: TOLERANCE, TensorType.F16: 2e-2, TensorType.Q8_0: 3e-1}
"""Difference of two logarithms of likelihoods. For fp16 and Q8_0 weights llama.cpp rounds activations alike, to 11 bits
and to 8 of the largest of 32, which no other program does; beyond logits of 10 in proportion."""

ALLOWED_BY_TABLE = 1e-2
"""For models with gelu: llama.cpp looks it up in a table of fp16."""

TIPPED = 20
"""Where activations are rounded, one in so many likelihoods of a mixture may differ by more: experts are chosen by
their scores, and rounding tips a choice between two that are nearly equal. Another model differs in all of them."""


@dataclass(frozen=True)
class Bound:
    """What two programs may differ by: `difference` in all questions but one in `TIPPED`, where `tips`."""

    difference: float
    tips: bool

    @staticmethod
    def of(model: ModelConfig, type: TensorType) -> "Bound":
        """That of a model whose file has weights of this type."""
        by_table = ALLOWED_BY_TABLE if model.activation == "gelu" else 0.0
        return Bound(max(ALLOWED[type], by_table), tips=model.moe is not None and type is not TensorType.F32)


@dataclass(frozen=True)
class LlamaCppProof:
    """What was compared in llama.cpp, and found equal or near."""

    max_difference: float
    """Of logarithms of likelihoods, but those of choices between experts that have tipped."""
    num_likelihoods: int
    num_tipped: int
    """Likelihoods that differ by more, since another expert was chosen."""
    num_greedy_tokens: int
    num_greedy_compared: int
    """All are equal where weights are in fp32."""
    num_texts: int
    num_text_characters: int
    num_chats: int
    version: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LlamaCppQuestions:
    """What both sides are asked."""

    texts: Sequence[str]
    windows: Sequence[Sequence[int]]
    prompt: Prompt
    chats: ChatExamples | None
    num_new: int
    """Tokens of the greedy continuation."""
    tokenizer: Tokenizer
    frame: Around


def can_prove() -> bool:
    """True where llama.cpp is installed as the extra gguf brings it."""
    return find_spec(BINDING) is not None


def prove(path: Path, ours: Logits, num_tokens: int, asked: LlamaCppQuestions, bound: Bound) -> LlamaCppProof:
    """Compare a file in llama.cpp with a model of the numbers that it holds. Raises ExportError that says what differs,
    or with llama.cpp's own words where it does not take the file."""
    questions = list[list[int]]()
    for window in asked.windows:
        last = min(FIRST + POSITIONS, len(window)) - 1
        questions += [list(window[:end]) for end in range(min(FIRST, last), last + 1)]
    examples = () if asked.chats is None else asked.chats.examples
    chats = [
        {
            "messages": [dict(message) for message in example.messages],
            "add_generation_prompt": example.prompts,
            **({} if example.tools is None else {"tools": [dict(tool) for tool in example.tools]}),
        }
        for example in examples
    ]
    job = {
        "file": str(path.resolve()),
        "context": _CONTEXT,
        "threads": torch.get_num_threads(),
        "num_tokens": num_tokens,
        "texts": list(asked.texts),
        "chats": chats,
        "questions": questions,
        "prompt": list(asked.prompt.ids),
        "num_new": asked.num_new,
    }
    answers, theirs_QV = _judged(job)
    _compare_ids(answers, asked)
    greedy = [[*asked.prompt.ids, *answers["greedy"][:count]] for count in range(asked.num_new)]
    ours_QV = _log_probs(ours, [*questions, *greedy], num_tokens)
    difference, num_tipped = _difference(ours_QV, theirs_QV, bound)
    own = ours_QV[len(questions) :].argmax(-1).tolist()
    num_equal = sum(one == other for one, other in zip(own, answers["greedy"], strict=True))
    if num_equal < asked.num_new and bound.difference <= TOLERANCE:
        raise ExportError(f"Greedy continuations differ: ours {own}, llama.cpp's {answers['greedy']}.")
    return LlamaCppProof(
        difference,
        len(ours_QV),
        num_tipped,
        num_equal,
        asked.num_new,
        len(asked.texts),
        sum(map(len, asked.texts)),
        len(chats),
        answers["version"],
    )


def _judged(job: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """llama.cpp's answers, from a process of its own."""
    with TemporaryDirectory(prefix="llmtrain-") as folder:
        script = Path(__file__).with_name("judge.py")
        done = subprocess.run(
            [sys.executable, "-P", str(script), folder], input=json.dumps(job), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            said = (done.stderr.strip() or f"it ended with {done.returncode}")[-600:]
            raise ExportError(f"llama.cpp does not take the file: {said}")
        answers = json.loads(Path(folder, "ids.json").read_text("utf-8"))
        return answers, torch.from_numpy(np.load(Path(folder, "log_probs.npy"), allow_pickle=False))


def _compare_ids(answers: Mapping[str, Any], asked: LlamaCppQuestions) -> None:
    before, behind = asked.frame
    for text, plain, framed in zip(asked.texts, answers["plain"], answers["framed"], strict=True):
        expected = asked.tokenizer.encode(text)
        _require_equal(expected, plain, text)
        _require_equal([*before, *expected, *behind], framed, text)
    examples = () if asked.chats is None else asked.chats.examples
    for example, found in zip(examples, answers["chats"], strict=True):
        _require_equal(example.ids, found, str(example.messages))


def _require_equal(expected: Sequence[int], actual: Sequence[int], text: str) -> None:
    if list(expected) == list(actual):
        return
    pairs = enumerate(zip(expected, actual, strict=False))
    place = next((at for at, (one, other) in pairs if one != other), min(len(expected), len(actual)))
    raise ExportError(
        f"llama.cpp gives other ids for a text that begins with {text[:40]!r}: at token {place} trained with "
        f"{list(expected[place : place + 6])}, there {list(actual[place : place + 6])}."
    )


@torch.no_grad()
def _log_probs(ours: Logits, questions: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
    """[questions, V]: of the token behind each."""
    rows = [ours(Example(torch.tensor([list(ids)])))[0, -1, :num_tokens] for ids in questions]
    return torch.stack(rows).cpu().float().log_softmax(-1)


def _difference(ours_QV: Tensor, theirs_QV: Tensor, bound: Bound) -> tuple[float, int]:
    """The largest of questions whose choices have not tipped, and how many have."""
    if ours_QV.shape != theirs_QV.shape:
        raise ExportError(f"Likelihoods have the shape {list(ours_QV.shape)} here and {list(theirs_QV.shape)} there.")
    apart_QV = (ours_QV - theirs_QV).abs().masked_fill((ours_QV < _LEAST) & (theirs_QV < _LEAST), 0.0)
    apart_Q = apart_QV.amax(-1)
    allowed = bound.difference * max(1.0, float((ours_QV.amax(-1) - ours_QV.mean(-1)).max()) / 10)
    tipped_Q = ~(apart_Q <= allowed)  # a NaN too
    num_tipped = int(tipped_Q.sum())
    if num_tipped > (len(apart_Q) // TIPPED if bound.tips else 0) or bool(apart_Q.isnan().any()):
        raise ExportError(
            f"llama.cpp computes another model: logarithms of likelihoods differ by up to {float(apart_Q.max()):.3g}, "
            f"and {num_tipped} of {len(apart_Q)} by more than {allowed:.3g}, which is allowed."
        )
    return float(apart_Q[~tipped_Q].max()), num_tipped

"""What is found out about a sample, and the metrics of a task that follow from all samples. Pure."""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.config.tasks.schema import TaskConfig
from llmtrain.data.tasks.samples import TaskSample

Outcome = Mapping[str, Any]
"""What is kept of a sample: what the model said, and its scores by name. JSON."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LARGEST_EXPONENT = 700.0
"""Of an exponential that a float can hold."""


@dataclass(frozen=True)
class LogLikelihood:
    """The sum of the logarithms of the probabilities of tokens, their number, and whether each was the likeliest, where
    that is known."""

    total: float
    num_tokens: int
    greedy: bool | None = None

    @staticmethod
    def sum_of(parts: Sequence["LogLikelihood"]) -> "LogLikelihood":
        known = all(part.greedy is not None for part in parts)
        greedy = all(part.greedy for part in parts) if known else None
        return LogLikelihood(math.fsum(part.total for part in parts), sum(part.num_tokens for part in parts), greedy)


def scored(task: TaskConfig, sample: TaskSample, found: Sequence[LogLikelihood]) -> Outcome:
    """The outcome of a sample whose texts were scored, in the order of `TextEncoder.texts`."""
    if task.kind == "choices":
        totals = [each.total for each in found]
        sizes = {
            "accuracy": [1] * len(found),
            "accuracy_per_byte": [len(text.encode()) for text in sample.choices],
            "accuracy_per_token": [each.num_tokens for each in found],
        }
        scores = dict[str, float]()
        for name, of in sizes.items():
            rates = [total / size for total, size in zip(totals, of, strict=True)]
            scores[name] = float(rates.index(max(rates)) == sample.target)  # the first of equal ones
        return {"target": sample.target, "loglikelihoods": totals, "scores": scores}
    whole = LogLikelihood.sum_of(found)
    outcome: dict[str, Any] = {"loglikelihood": whole.total, "tokens": whole.num_tokens}
    if task.kind == "cloze":
        return outcome | {"scores": {} if whole.greedy is None else {"accuracy": float(whole.greedy)}}
    text = sample.continuations[0]
    # Words are what white space parts, as in the literature on this measure.
    return outcome | {"bytes": len(text.encode()), "words": len(re.split(r"\s+", text)), "scores": {}}


def answered(task: TaskConfig, sample: TaskSample, text: str) -> Outcome:
    """The outcome of a sample to which the model wrote an answer."""
    given = text if task.answer_after is None else text.rpartition(task.answer_after)[2]
    if task.kind == "qa":
        pairs = [(squad_words(given), squad_words(answer)) for answer in sample.answers]
        scores = {
            "exact_match": max(float(ours == theirs) for ours, theirs in pairs),
            "f1": max(_f1(ours, theirs) for ours, theirs in pairs),
        }
    else:
        right = {_normal(task, answer) for answer in sample.answers}
        scores = {"exact_match": float(_normal(task, given) in right)}
    return {"text": text, "answers": list(sample.answers), "scores": scores}


def _normal(task: TaskConfig, text: str) -> str:
    text = text.lower() if task.ignore_case else text
    return (text.translate(_PUNCTUATION) if task.ignore_punctuation else text).strip()


def squad_words(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: in lower case, without punctuation and articles (Rajpurkar et al.
    2016, section 6.1)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words that both have; without words, whether both have none."""
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def task_metrics(task: TaskConfig, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The metrics of a task by name, the means over its samples; of texts, over their bytes and words."""
    count = len(outcomes)
    names = list(outcomes[0]["scores"])
    metrics = {name: math.fsum(outcome["scores"][name] for outcome in outcomes) / count for name in names}
    if task.kind not in ("cloze", "perplexity"):
        return metrics
    total = math.fsum(outcome["loglikelihood"] for outcome in outcomes)
    if task.kind == "cloze":
        return metrics | {"perplexity": _exp(-total / count)}
    num_bytes, words = (sum(outcome[key] for outcome in outcomes) for key in ("bytes", "words"))
    return {
        "byte_perplexity": _exp(-total / num_bytes),
        "word_perplexity": _exp(-total / words),
        "bits_per_byte": -total / num_bytes / math.log(2),
    }


def standard_errors(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The standard error of each mean over samples; none where there is a single sample."""
    count = len(outcomes)
    if count < 2:
        return {}
    errors = dict[str, float]()
    for name in outcomes[0]["scores"]:
        values = [outcome["scores"][name] for outcome in outcomes]
        mean = math.fsum(values) / count
        errors[name] = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return errors


def _exp(power: float) -> float:
    return math.exp(power) if power < _LARGEST_EXPONENT else math.inf

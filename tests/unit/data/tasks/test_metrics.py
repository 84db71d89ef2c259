"""Metrics by hand: accuracies, perplexities, SQuAD's exact match and F1."""

import math
from typing import Any

import pytest

from llmtrain.config.tasks.schema import TaskConfig
from llmtrain.data.tasks.metrics import LogLikelihood, answered, scored, standard_errors, task_metrics
from llmtrain.data.tasks.samples import TaskSample


def task(kind: str, **keys: Any) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "kind": kind, "data": "x", **keys})


def test_choices_are_the_best_as_they_are_per_byte_and_per_token():
    sample = TaskSample(0, "p", (" ü", " long text"), ("ü", "long text"), target=1)
    found = scored(task("choices"), sample, [LogLikelihood(-4.0, 1), LogLikelihood(-10.0, 2)])
    # Per byte -2 and -1.11, per token -4 and -5.
    assert found["scores"] == {"accuracy": 0.0, "accuracy_per_byte": 1.0, "accuracy_per_token": 0.0}
    even = scored(task("choices"), TaskSample(0, "p", ("a", "b"), ("a", "b"), 0), [LogLikelihood(-1.0, 1)] * 2)
    assert even["scores"]["accuracy"] == 1.0  # the first of equal ones


def test_perplexities_are_over_all_bytes_and_words():
    texts = [("ab c", -4.0), ("ü", -2.0)]
    outcomes = [
        scored(task("perplexity"), TaskSample(0, "", (text,)), [LogLikelihood(total / 2, 1)] * 2)
        for text, total in texts
    ]
    assert task_metrics(task("perplexity"), outcomes) == pytest.approx(
        {"byte_perplexity": math.e, "word_perplexity": math.exp(2), "bits_per_byte": 1 / math.log(2)}
    )


def test_a_cloze_is_right_where_every_token_is_the_likeliest():
    sample = TaskSample(0, "p", (" x",), answers=("x",))
    right, wrong = (scored(task("cloze"), sample, [LogLikelihood(-1.0, 2, greedy)]) for greedy in (True, False))
    assert task_metrics(task("cloze"), [right, wrong]) == pytest.approx({"accuracy": 0.5, "perplexity": math.e})
    assert standard_errors([right, wrong]) == pytest.approx({"accuracy": 0.5})
    unknown = scored(task("cloze"), sample, [LogLikelihood(-1.0, 2)])
    assert task_metrics(task("cloze"), [unknown]) == pytest.approx({"perplexity": math.e})


@pytest.mark.parametrize(
    ("text", "exact", "f1"),
    [
        ("The Eiffel Tower!", 1, 1), (" eiffel  tower", 1, 1), ("tower", 0, 2 / 3), ("the tower of Eiffel", 0, 0.8),
        ("nothing", 0, 0), ("", 0, 0),
    ],
)  # fmt: skip
def test_questions_are_answered_as_squad_says(text: str, exact: float, f1: float):
    sample = TaskSample(0, "p", answers=("an Eiffel tower", "Paris"))
    assert answered(task("qa"), sample, text)["scores"] == pytest.approx({"exact_match": exact, "f1": f1})


def test_answers_match_behind_a_mark_without_case_and_punctuation():
    sample = TaskSample(0, "p", answers=("1,000",))
    marked = task("exact_match", answer_after="####", ignore_punctuation=True)
    assert answered(marked, sample, "6 #### 5 #### 1000.")["scores"] == {"exact_match": 1.0}
    assert answered(task("exact_match"), sample, "1000")["scores"] == {"exact_match": 0.0}
    assert answered(task("exact_match", ignore_case=True), TaskSample(0, "p", answers=("Yes",)), " yes ")["scores"] == {
        "exact_match": 1.0
    }

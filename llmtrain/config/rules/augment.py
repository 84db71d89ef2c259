"""Data augmentation: the objectives that noise makes sense with, and why it does not with the others. Pure."""

from collections.abc import Iterator

from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

WHY_NOT = {
    "chat": "which of its tokens are trained stands in the shards, turn by turn, and what is said before decides what "
    "is right. Change the texts before `llmtrain data chat`",
    "labels": "labels stand at the places of tokens, which would move. Change the texts before `llmtrain data labels`",
}
"""The objectives whose samples are no plain text."""

Found = Iterator[Problem]


def augmentation_fits_objective(config: RunConfig) -> Found:
    data, family = config.data, config.model.family
    for key, value in data.augment:
        if not value:
            continue
        if data.objective in WHY_NOT:
            message = f"does not go with data.objective = {data.objective}: {WHY_NOT[data.objective]}. Try 0."
            yield Problem(f"data.augment.{key}", message, value, uses=("data.objective",))
        elif key == "swap_words" and family == "decoder":
            message = (
                "does not go with model.family = decoder: a position would read the word that it is to predict. Try 0, "
                "or data.augment.delete_words or replace_words."
            )
            yield Problem("data.augment.swap_words", message, value, uses=("model.family",))


AUGMENT_RULES = (augmentation_fits_objective,)

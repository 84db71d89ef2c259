"""Data augmentation: the objectives that noise makes sense with, and why it does not with the others. Pure."""

from collections.abc import Iterator

from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

WHY_NOT = {
    "chat": "which of its tokens are trained stands in the shards, turn by turn, and what is said before decides what "
    "is right. Change the texts before `llmtrain data chat`",
}
"""The objectives whose samples are no plain text."""

WHY_NOT_HEAD = {
    "token_classifier": "every word has a label of its own, and is what is to be predicted",
    "span": "the answer is told by its places in the text",
}
"""The heads for labels whose texts must stay as they are."""

Found = Iterator[Problem]


def augmentation_fits_objective(config: RunConfig) -> Found:
    data, family = config.data, config.model.family
    for key, value in data.augment:
        if not value:
            continue
        head = config.model.head
        if data.objective in WHY_NOT:
            message = f"does not go with data.objective = {data.objective}: {WHY_NOT[data.objective]}. Try 0."
            yield Problem(f"data.augment.{key}", message, value, uses=("data.objective",))
        elif data.objective == "labels" and head in WHY_NOT_HEAD:
            message = f"does not go with model.head = {head}: {WHY_NOT_HEAD[head]}. Try 0."
            yield Problem(f"data.augment.{key}", message, value, uses=("data.objective", "model.head"))
        elif key == "swap_words" and family == "decoder" and data.objective != "labels":
            message = (
                "does not go with model.family = decoder: a position would read the word that it is to predict. Try 0, "
                "or data.augment.delete_words or replace_words."
            )
            yield Problem("data.augment.swap_words", message, value, uses=("model.family",))


AUGMENT_RULES = (augmentation_fits_objective,)

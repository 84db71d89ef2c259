"""A batch as a model takes it, and the factors of its gradients."""

from dataclasses import dataclass

from llmtrain.models.transformer import ModelInputs
from llmtrain.values.batch import Batch


def model_inputs(batch: Batch) -> ModelInputs:
    """The fields that a model reads; all of a batch but its labels."""
    return ModelInputs(
        batch.tokens_BS,
        batch.positions_BS,
        batch.segments_BS,
        batch.prefix_B,
        batch.encoder_tokens_BT,
        batch.encoder_segments_BT,
    )


@dataclass(frozen=True)
class Scales:
    """What the gradients of a micro-batch are multiplied by: of the loss of each target, and of balancing losses."""

    loss: float
    balance: float = 0.0

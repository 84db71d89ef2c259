"""The section `observe`: what is recorded and where. Pure."""

from typing import Literal

from pydantic import Field

from llmtrain.config.section import Count, Probability, Section


class ObserveConfig(Section):
    """What is recorded and where."""

    wandb: Literal["offline", "online", "off"] = Field(default="offline", description="Weights & Biases mode.")
    wandb_project: str = Field(default="llmtrain", description="Weights & Biases project.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard event files.")
    log_every_steps: Count = Field(default=1, description="Steps between recorded rows.")
    straggler_score: Probability = Field(
        default=0.7,
        description="A rank is called slow when the other ranks' work takes this share of its own time or less, "
        "in several windows in a row; 0: never.",
    )

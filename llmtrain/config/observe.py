"""The sections `health` and `observe`: what is done about what a run shows, and what is recorded of it. Pure."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import (
    AsTuple,
    Count,
    NotNegative,
    Probability,
    RanksOrZero,
    Section,
    Steps,
    StepsOrZero,
    Text,
)


class HealthConfig(Section):
    """What is done about losses and gradients that are not as they should be."""

    rerun: bool = Field(
        default=True,
        description="Run a step whose gradient is not finite once more, to tell a passing fault of the hardware from "
        "the data's or the model's (not with fp16, whose scale overflows on purpose).",
    )
    rollback: bool = Field(
        default=False,
        description="After max_strikes or a spike of the loss, go back to the last good checkpoint and skip the data "
        "since.",
    )
    max_strikes: Count = Field(default=3, description="Skipped steps in a row that lead to a rollback.")
    spike_deviations: NotNegative = Field(
        default=10.0,
        description="A loss that is higher than the running median by this many median absolute deviations is a spike; "
        "0: none is.",
    )
    window_steps: Count = Field(default=100, description="Steps of the running median.")
    max_skipped_steps: StepsOrZero = Field(
        default=100,
        description="Skipped steps in a row, trials of fp16's loss scale included, before a run is given up with exit "
        "code 93; 0: never before its end.",
    )
    max_rollbacks: Count = Field(default=10, description="Rollbacks of a run before it is given up with exit code 93.")


class ProfileConfig(Section):
    """Steps that are traced with torch.profiler."""

    steps: Annotated[tuple[Steps, Steps], AsTuple] = Field(description="First and last traced step, such as [10, 12].")
    ranks: Annotated[tuple[RanksOrZero, ...], AsTuple, Field(min_length=1, max_length=10_000)] = Field(
        default=(0,), description="Ranks that trace. Each writes files of its own."
    )


class ObserveConfig(Section):
    """What is recorded and where."""

    wandb: Literal["offline", "online", "off"] = Field(default="offline", description="Weights & Biases mode.")
    wandb_project: Text = Field(default="llmtrain", description="Weights & Biases project.")
    wandb_artifacts: Literal["none", "final"] = Field(
        default="none", description="final: the last checkpoint goes to Weights & Biases when the run is done."
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard event files.")
    log_every_steps: Steps = Field(default=1, description="Steps between recorded rows.")
    layer_norms_every_steps: StepsOrZero = Field(
        default=0,
        description="Steps between rows with the norm of every weight and of its gradient before clipping; 0: never.",
    )
    profile: ProfileConfig | None = Field(
        default=None, description="Steps to trace with torch.profiler, into `profile/` of the run folder; absent: none."
    )
    straggler_score: Probability = Field(
        default=0.0,
        description="Look for slow ranks: one is named when the other ranks' work takes this share of its own time or "
        "less, in several windows in a row. Try 0.7; 0: no rank is measured.",
    )

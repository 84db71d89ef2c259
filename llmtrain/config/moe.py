"""Configuration of mixtures of experts. Pure: imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import AsWhole, Layers, NotNegative, Probability, Section, Width


class MoeConfig(Section):
    """Experts in place of the MLP of some layers. A router decides per token; experts have no biases."""

    num_experts: Annotated[int, Field(ge=2, le=2**16), AsWhole] = Field(default=8, description="Experts per layer.")
    top_k: Annotated[int, Field(ge=1, le=2**16), AsWhole] | None = Field(
        default=None, description="Experts that a token goes to; absent: 2, of a switch 1."
    )
    router: Literal["switch", "top_k", "expert_choice"] = Field(
        default="top_k",
        description="switch: the best expert, weighted by its probability (Fedus et al. 2021). top_k: the best top_k "
        "(Shazeer et al. 2017). expert_choice: each expert takes its best tokens (Zhou et al. 2022).",
    )
    capacity_factor: Annotated[float, Field(gt=0, le=2.0**16)] | None = Field(
        default=None,
        description="Tokens that an expert takes in training, as a multiple of an equal share of the micro-batch; "
        "the others pass by it. Absent: no token is dropped (expert_choice: 1). Evaluation drops none.",
    )
    normalize_weights: bool = Field(
        default=True, description="top_k: the weights of a token's experts sum to one (Mixtral)."
    )
    jitter: Probability = Field(
        default=0.0, description="The router's input is multiplied by uniform numbers within 1 +- jitter in training."
    )
    aux_loss_coeff: NotNegative = Field(
        default=0.01, description="Weight of the load-balancing loss (Fedus et al. 2021, eq. 4)."
    )
    z_loss_coeff: NotNegative = Field(
        default=0.0, description="Weight of the router's z-loss (Zoph et al. 2022, eq. 5)."
    )
    bias_update_rate: NotNegative = Field(
        default=0.0,
        description="top_k: each step, a bias that is added for the choice alone moves by this towards an equal load "
        "(Wang et al. 2024); 0: no bias.",
    )
    every_n_layers: Layers = Field(
        default=1, description="Layers 1, 1 + n, ... (counted from 0; with n = 1 all) have experts, the others an MLP."
    )
    num_shared_experts: Annotated[int, Field(ge=0, le=2**16), AsWhole] = Field(
        default=0, description="Experts that every token goes to besides (Dai et al. 2024)."
    )
    ffn_hidden_size: Width | None = Field(
        default=None, description="Inner width of an expert; absent: that of the model's MLP."
    )

    @property
    def choices(self) -> int:
        """Experts that a token goes to; with expert_choice on average."""
        return 1 if self.router == "switch" else self.top_k or 2

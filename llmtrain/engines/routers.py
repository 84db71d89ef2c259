"""The routers of a run's layers with experts: their counts of a step, and the biases that follow from the counts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.models.experts.mixture import MoE
from llmtrain.models.experts.router import NUM_SCALARS, RouterReport, bias_name
from llmtrain.models.stack import Stack
from llmtrain.values.fragment import Box, Fragment, FragmentSource


class Routers:
    """All layers with experts by their global names, of which some are on this rank. Without experts nothing happens.

    Every rank knows the sums of all layers, so that the biases are the same everywhere and rank 0 can save them.
    """

    def __init__(self, config: RunConfig, here: Iterable[tuple[str, MoE]], device: torch.device) -> None:
        model = config.model
        self._moe = model.moe
        stacks = (("encoder", model.encoder_layers), ("decoder", model.decoder_layers))
        self._names = [f"{side}.layers.{n}" for side, count in stacks for n in range(count) if model.has_experts(n)]
        self._place = {name: number for number, name in enumerate(self._names)}
        num_experts = self._moe.num_experts if self._moe else 0
        self.sums = torch.zeros(len(self._names), NUM_SCALARS + num_experts, dtype=torch.float64, device=device)
        """By layer, what this rank has counted in a step; once summed, what all ranks have."""
        self._here = {name: moe.router for name, moe in here}
        moving = [f"{name}.moe.router.weight" not in config.frozen for name in self._names]
        self._moving = torch.tensor(moving, dtype=torch.int64, device=device)[:, None]
        self._biased = bool(self._moe and self._moe.bias_update_rate)
        self._biases = torch.zeros(len(self._names), num_experts, dtype=torch.int64, device=device)
        self._hand_out()

    def add(self, reports: Mapping[str, Tensor]) -> None:
        """The reports of one micro-batch's layers on this rank."""
        for name, report in reports.items():
            self.sums[self._place[name]] += report

    def forget(self) -> None:
        """Begin to count anew."""
        self.sums.zero_()

    def step_metrics(self, sums: Tensor, num_micro_batches: int) -> dict[str, float]:
        """The figures of a step, from the sums of all ranks, on the host, over so many micro-batches."""
        if not self._names:
            return {}
        reports = [RouterReport.of(layer_sums) for layer_sums in sums]
        metrics: dict[str, float] = {}
        for name, report in zip(self._names, reports, strict=True):
            metrics |= {f"moe/{name}/{key}": value for key, value in layer_figures(report, num_micro_batches).items()}
        for key in ("aux_loss", "z_loss", "drop_rate", "entropy", "max_load"):
            metrics[f"moe/{key}"] = sum(metrics[f"moe/{name}/{key}"] for name in self._names) / len(self._names)
        return metrics

    def rebalance(self) -> None:
        """Move each expert's bias towards an equal load, by the loads of the step (Wang et al. 2024, algorithm 1).

        Where a router is frozen, its biases are as well.
        """
        if self._biased:
            loads = self.sums[:, NUM_SCALARS:]
            # Whole numbers of steps: a resumed run adds up to the same bits.
            self._biases += (loads.mean(1, keepdim=True) - loads).sign().long() * self._moving
            self._hand_out()

    def _hand_out(self) -> None:
        if self._biased and self._moe:
            for name, router in self._here.items():
                router.bias_E = self._biases[self._place[name]] * self._moe.bias_update_rate

    def fragments(self) -> Iterator[Fragment]:
        """All biases, in steps of bias_update_rate; for rank 0 to save."""
        if self._biased:
            for name, bias_E in zip(self._names, self._biases, strict=True):
                yield Fragment.whole(bias_name(name), "buffer", bias_E.float())

    def load(self, source: FragmentSource | None) -> None:
        """Continue a source's biases; without one, or where it has none, they start at zero."""
        if not self._biased:
            return
        for name, bias_E in zip(self._names, self._biases, strict=True):
            bias_E.copy_(read_bias(source, name, len(bias_E)))
        self._hand_out()


def iter_moe(stacks: Iterable[Stack]) -> Iterator[tuple[str, MoE]]:
    """The mixtures of experts in stacks, by the global names of their layers."""
    for stack in stacks:
        for number, layer in stack.layers.items():
            if isinstance(layer.moe, MoE):
                yield f"{stack.side}.layers.{number}", layer.moe


def read_bias(source: FragmentSource | None, layer: str, num_experts: int) -> Tensor:
    """The bias of a layer's router in a source, in steps; zeros where it has none."""
    if source is None or source.global_shape(bias_name(layer), "buffer") is None:
        return torch.zeros(num_experts)
    return source.read(bias_name(layer), "buffer", Box.whole((num_experts,)))


def layer_figures(report: RouterReport, num_micro_batches: int) -> dict[str, Any]:
    """Figures of one layer: means per token, per choice or per micro-batch, and of each expert its share of choices."""
    wanted = max(1.0, float(report.load_E.sum()))
    shares = (report.load_E / wanted).tolist()
    return {
        "aux_loss": report.aux_loss / num_micro_batches,
        "z_loss": report.z_loss / num_micro_batches,
        "drop_rate": report.dropped / wanted,
        "entropy": report.entropy / max(1.0, report.tokens),
        "max_load": max(shares) * len(shares),
        "min_load": min(shares) * len(shares),
        **{f"tokens_expert_{number}": load for number, load in enumerate(report.load_E.tolist())},
    }

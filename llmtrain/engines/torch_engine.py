"""Plain PyTorch, one device per rank: the readable reference that every other engine is compared with.

Several ranks share the batch and nothing else: each holds the whole model, and gradients are summed over them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import EvalResult, GradientInspector, StepResult
from llmtrain.engines.compilation import compile_layers
from llmtrain.engines.inputs import Scales, model_inputs
from llmtrain.engines.placement import Placement, read_range
from llmtrain.engines.precision import DTYPES, clip_factor, scale_gradients
from llmtrain.engines.routers import Routers, iter_moe
from llmtrain.models.build import build_model, materialize
from llmtrain.models.cross_entropy import Objective
from llmtrain.models.transformer import Pass, Reports
from llmtrain.optim.groups import parameter_groups
from llmtrain.optim.scaler import build_loss_scale
from llmtrain.parallel.all_reduce import sum_over_ranks
from llmtrain.parallel.stateless_random import Draws
from llmtrain.parallel.vocabulary import VocabularyPart
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Box, Fragment, FragmentSource


class TorchEngine:
    """Weights in the training precision, and fp32 masters, gradients and moments beside them.

    In fp32 the weights are their own masters. In lower precisions each gradient is added to its master's fp32
    gradient as soon as it is complete, and freed.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.group = dist.group.WORLD if dist.is_initialized() else None
        self.dp_rank = self.group.rank() if self.group else 0
        self.dp_size = self.group.size() if self.group else 1
        self.model = build_model(config.model, config.train.recompute)
        materialize(self.model, config.seed, device)
        self.masters = self._build_masters(DTYPES[config.train.precision])
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.masters.values(), optim.weight_decay),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )
        for master in self.masters.values():
            self.optimizer.state[master] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        self.loss_scale = build_loss_scale(config.train.precision, optim)
        self.inspect_gradients: GradientInspector | None = None
        self.routers = Routers(config.model, iter_moe(self.model.stacks), device)
        if config.train.compile:
            compile_layers(layer for stack in self.model.stacks for layer in stack.layers.values())

    def _build_masters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        if dtype == torch.float32:
            return dict(parameters)
        masters = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.model.to(dtype)
        for name, parameter in self.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(_accumulator_into(masters[name]))
        return masters

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        if not self.model.training:  # setting the mode visits every module
            self.model.train()
        # The count of the whole step is known before the first backward: gradients are sums, divided once.
        num_tokens = int(self._over_ranks(sum(batch.num_valid_tokens for batch in micro_batches)))
        loss_scale = self.loss_scale.scale if self.loss_scale else 1.0
        num_micro_batches = len(micro_batches) * self.dp_size
        scales = Scales(loss_scale / max(1, num_tokens), loss_scale / num_micro_batches)
        self.routers.forget()
        loss_sum = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches):
            global_number = self.dp_rank + number * self.dp_size
            draws = Draws.of_micro_batch(self.config.seed, step, global_number, self.device)
            objective, batch_loss_sum, reports = self._loss(batch, draws, scales)
            objective.backward()
            self.routers.add(reports)
            loss_sum += batch_loss_sum
        grads = [master.grad for master in self.masters.values() if master.grad is not None]
        if self.group:
            sum_over_ranks([*grads, loss_sum], self.group)
        if self.inspect_gradients:
            self.inspect_gradients(self._gradient_fragments(1 / loss_scale))
        norm = torch.nn.utils.get_total_norm(grads)
        # The host waits here.
        loss, grad_norm = torch.stack((loss_sum / max(1, num_tokens), norm / loss_scale)).tolist()
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        metrics = self.routers.step_metrics(num_micro_batches, self._total)
        if finite:
            self._update(grads, grad_norm, loss_scale, lr)
            self.routers.rebalance()
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss_scale:
            metrics["loss_scale"] = loss_scale
        if self.loss_scale:
            self.loss_scale.update(finite)
        return StepResult(loss, grad_norm, num_tokens, skipped=not finite, metrics=metrics)

    def _loss(self, batch: Batch, draws: Draws | None, scales: Scales) -> tuple[Tensor, Tensor, Reports]:
        batch = batch.to(self.device)
        hidden_SBH, reports = self.model(model_inputs(batch), Pass(draws, scales.balance))
        whole = VocabularyPart(0, self.config.model.vocabulary)
        objective = Objective(scales.loss, self.config.train.loss_chunk_tokens, whole)
        return *self.model.loss(hidden_SBH, batch.labels_BS, objective), reports

    def _total(self, sums: Tensor) -> Tensor:
        if self.group:
            dist.all_reduce(sums, group=self.group)
        return sums

    @torch.no_grad()
    def _update(self, grads: list[Tensor], grad_norm: float, loss_scale: float, lr: float) -> None:
        scale_gradients(grads, clip_factor(self.config.optim.grad_clip, grad_norm) / loss_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._round_weights()

    def _round_weights(self) -> None:
        """Low-precision weights are the masters, rounded; in fp32 they are the masters."""
        if self.config.train.precision == "fp32":
            return
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(self.masters[name])

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalResult:
        self.model.eval()
        losses = [self._loss(batch, None, Scales(1.0))[1] for batch in micro_batches]
        num_tokens = sum(batch.num_valid_tokens for batch in micro_batches)
        return EvalResult(self._over_ranks(float(torch.stack(losses).sum())), int(self._over_ranks(num_tokens)))

    def _over_ranks(self, number: float) -> float:
        """The sum of a number of the host over all ranks; counts of tokens are exact in fp64."""
        if self.group is None:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.item()

    def _gradient_fragments(self, factor: float) -> Iterator[Fragment]:
        for name, master in self.masters.items():
            if master.grad is not None and self.dp_rank == 0:
                yield Fragment.whole(name, "gradient", master.grad * factor)

    def fragments(self) -> Iterator[Fragment]:
        if self.dp_rank > 0:  # every rank holds the same
            return
        for name, master in self.masters.items():
            yield Fragment.whole(name, "master", master.detach())
            for kind in ("exp_avg", "exp_avg_sq"):
                yield Fragment.whole(name, kind, self.optimizer.state[master][kind])
        yield from self.routers.fragments()

    def load(self, source: FragmentSource) -> None:
        self.load_weights(source)
        self.routers.load(source)
        for name, master in self.masters.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                _fill(self.optimizer.state[master][kind], name, kind, source)

    @torch.no_grad()
    def load_weights(self, source: FragmentSource) -> None:
        for name, master in self.masters.items():
            _fill(master.data, name, "master", source)
        self._round_weights()

    def state(self) -> dict[str, Any]:
        adam_steps = int(self.optimizer.state[next(iter(self.masters.values()))]["step"])
        return {"adam_steps": adam_steps, "loss_scale": self.loss_scale.state() if self.loss_scale else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for master in self.masters.values():
            self.optimizer.state[master]["step"].fill_(state["adam_steps"])
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load_state(state["loss_scale"])


def _accumulator_into(master: Tensor) -> Any:
    """A hook that adds a complete low-precision gradient to the master's fp32 one, and frees it."""

    def accumulate(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    return accumulate


def _fill(target: Tensor, name: str, kind: str, source: FragmentSource) -> None:
    """Replace a whole tensor by what the source has of it. Raises CheckpointError where the shapes differ."""
    placement = Placement(name, tuple(target.shape), Box.whole(target.shape))
    read_range(source, placement, kind, (0, target.numel()), target.view(-1))

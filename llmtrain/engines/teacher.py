"""The teacher of a distillation on one rank: split as the student is, never trained, asked before each step.

Its own pass goes through the micro-batches ahead of the student's, so that what it predicts is there whatever schedule
the student's pipeline follows. Of each prediction only the likeliest tokens are kept.

Shape suffixes: B micro-batch, s this rank's part of the sequence, H the teacher's hidden, T tokens, C of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llmtrain.config.finetune import DistillConfig
from llmtrain.config.rules.distill import teacher_run
from llmtrain.config.schema import RunConfig
from llmtrain.engines.masters import Master, Placement, read_masters
from llmtrain.engines.routers import Routers, iter_moe
from llmtrain.models.float8 import multiply_in_float8
from llmtrain.models.init import InitialWeights
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import Transformer, build_model, chosen_from
from llmtrain.parallel.parts import VocabularyPart
from llmtrain.parallel.soft_targets import likeliest
from llmtrain.values.batch import Batch, SoftTargets
from llmtrain.values.fragment import Box, FragmentSource
from llmtrain.values.precision import DTYPES


@dataclass(frozen=True)
class TeacherPart:
    """This rank's part of the teacher, on the meta device, and where its parameters lie in the whole.

    `pipeline` are the ranks with the other stages, where there are some.
    """

    model: Transformer
    vocabulary: VocabularyPart
    placements: Sequence[Placement]
    pipeline: ProcessGroup | None = None


def whole_teacher(config: RunConfig) -> TeacherPart:
    """All of the teacher."""
    run = teacher_run(config)
    model = build_model(run.model)
    if run.train.precision == "fp8":
        multiply_in_float8(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    places = [Placement(name, shape, Box.whole(shape)) for name, shape in shapes.items()]
    return TeacherPart(model, chosen_from(run.model), places)


class Teacher:
    """Weights in the training precision, whole on every data rank; tensor, context and pipeline ranks have their parts.

    They are drawn until `load` is called.
    """

    def __init__(self, config: RunConfig, part: TeacherPart, device: torch.device, chunk_tokens: int) -> None:
        assert config.distill is not None, "an engine asks for a teacher where there is one"
        self.distill: DistillConfig = config.distill
        self.device, self.chunk_tokens = device, chunk_tokens
        self.vocabulary, self.placements, self.pipeline = part.vocabulary, part.placements, part.pipeline
        self.dtype = DTYPES[config.train.precision]
        self.model = part.model.to(self.dtype).to_empty(device=device).eval().requires_grad_(False)
        run = teacher_run(config)
        self.routers = Routers(run, iter_moe(self.model.stacks), device)
        # Not the student's seed: where both have one architecture, they would have the same weights.
        self.load(InitialWeights(run.model, config.seed ^ 1))

    @torch.no_grad()
    def load(self, source: FragmentSource) -> None:
        """Replace the weights by what `source` holds. Raises CheckpointError where it does not fit."""
        self.routers.load(source)
        for parameter, placement in zip(self.model.parameters(), self.placements, strict=True):
            weight = parameter.detach()
            read_masters(source, [Master(placement, (0, weight.numel()), weight)], ("master",))

    @torch.no_grad()
    def teach(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches on the device, where this rank has the head, with what the teacher predicts.

        All ranks of a pipeline call it with the same micro-batches, in the same order.
        """
        return [self._taught(batch.to(self.device)) for batch in micro_batches]

    def _taught(self, batch: Batch) -> Batch:
        received = None if self.model.starts else self._receive(batch)
        hidden_sBH, _ = self.model(batch, Pass(), received=received)
        if not self.model.ends:
            assert self.pipeline is not None, "a stage without the end is one of several"
            dist.send(hidden_sBH.contiguous(), group=self.pipeline, group_dst=self.pipeline.rank() + 1)
            return batch
        return replace(batch, soft=self._targets(hidden_sBH.flatten(0, 1)))

    def _receive(self, batch: Batch) -> Tensor:
        """What the stage before has made of a micro-batch: of an encoder-decoder, both sequences."""
        assert self.pipeline is not None, "a stage without the beginning is one of several"
        own, size = self.model.parts.own, self.model.config.hidden_size
        length = own(batch.tokens_BS.shape[1]).size
        if self.model.has_memory and batch.encoder_tokens_BT is not None:
            length += own(batch.encoder_tokens_BT.shape[1]).size
        received = torch.empty(length, len(batch.tokens_BS), size, dtype=self.dtype, device=self.device)
        dist.recv(received, group=self.pipeline, group_src=self.pipeline.rank() - 1)
        return received

    def _targets(self, hidden_TH: Tensor) -> SoftTargets:
        """Of the head's predictions, a chunk of tokens at a time: the logits of all never exist."""
        distill, rows = self.distill, self.vocabulary.rows
        weight_VH, bias_V = self.model.head_weight(rows), self.model.head_bias(rows)
        found = []
        for hidden_CH in hidden_TH.split(self.chunk_tokens):
            logits_CV = (hidden_CH @ weight_VH.T).float()
            if bias_V is not None:
                logits_CV += bias_V.float()
            found.append(likeliest(logits_CV.div_(distill.temperature), self.vocabulary, distill.top_k))
        log_probs, ids, log_rest = (torch.cat(parts) for parts in zip(*found, strict=True))
        # Half the memory: all micro-batches of a step are kept.
        return SoftTargets(log_probs, ids.int(), log_rest, distill.temperature, distill.weight)

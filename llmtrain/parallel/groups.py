"""Process groups of a layout, in megatron-core's own bookkeeping, which its layers, optimizers and schedules read."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from llmtrain.parallel.layout import Coordinates, Layout
from llmtrain.parallel.parts import SequenceParts


@dataclass(frozen=True)
class Groups:
    """This rank's place, and the groups that it shares with the ranks that differ from it on the named axes only."""

    layout: Layout
    place: Coordinates
    tensor: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup
    data_context: ProcessGroup
    pipeline: ProcessGroup
    expert: ProcessGroup
    """Ranks that hold the other experts of this rank's layers."""
    expert_data: ProcessGroup
    """Ranks that hold the same part of the same experts."""

    def sequence_parts(self, balanced: bool) -> SequenceParts:
        """The part of the sequence that this rank holds. `balanced`: context ranks hold two runs of it each."""
        layout, place = self.layout, self.place
        number, groups = place.context, ()
        if layout.sequence:
            number, groups = number * layout.tensor + place.tensor, (self.tensor,)
        if layout.context > 1:
            groups = (*groups, self.context)
        return SequenceParts(number, layout.sequence_parts, groups, layout.context, balanced)


def build_groups(layout: Layout) -> Groups:
    """Make the groups. torch.distributed is initialized with as many ranks as the layout has."""
    assert dist.get_world_size() == layout.world_size, (dist.get_world_size(), layout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        order="tp-cp-ep-dp-pp",  # the numbering of layout.py; the asserts below hold the two together
        create_gloo_process_groups=False,  # for its own checkpoints, which nobody writes here
    )
    groups = Groups(
        layout=layout,
        place=layout.coordinates(dist.get_rank()),
        tensor=_own(parallel_state.get_tensor_model_parallel_group()),
        context=_own(parallel_state.get_context_parallel_group()),
        data=_own(parallel_state.get_data_parallel_group()),
        data_context=_own(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        pipeline=_own(parallel_state.get_pipeline_model_parallel_group()),
        expert=_own(parallel_state.get_expert_model_parallel_group()),
        expert_data=_own(parallel_state.get_expert_data_parallel_group()),
    )
    assert groups.tensor.rank() == groups.place.tensor and groups.pipeline.rank() == groups.place.pipeline
    assert (groups.expert.rank(), groups.expert_data.rank()) == layout.expert_place(groups.place)
    assert groups.context.rank() == groups.place.context and groups.data.rank() == groups.place.data
    return groups


def _own(group: object) -> ProcessGroup:
    """megatron-core's group, which a rank outside of it would get as something else."""
    assert isinstance(group, ProcessGroup), group
    return group

"""What megatron-core is told about the messages between stages."""

from llmtrain.config.schema import ParallelConfig
from llmtrain.engines.megatron_engine.pipeline_chunk import message_settings

INTERLEAVED = ParallelConfig(pipeline=2, virtual_pipeline=2)
ONE_BY_ONE = ParallelConfig(pipeline=2)
ZERO_BUBBLE = ParallelConfig(pipeline=2, pipeline_schedule="zero_bubble")


def test_stages_talk_while_they_compute_where_that_is_possible() -> None:
    assert message_settings(INTERLEAVED, on_gpu=True) == {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    assert message_settings(ONE_BY_ONE, on_gpu=True) == {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    # megatron-core's 1F1B, which evaluates, refuses to overlap; what does not wait cannot be in batches.
    assert message_settings(ZERO_BUBBLE, on_gpu=True) == {"overlap_p2p_comm": False, "batch_p2p_comm": False}
    for parallel in (INTERLEAVED, ONE_BY_ONE, ZERO_BUBBLE):
        on_gloo = message_settings(parallel, on_gpu=False)
        assert not any(on_gloo.values()), "batches are mixed up there, and nothing overlaps"

"""What megatron-core is told about the messages between stages."""

from llmtrain.engines.megatron_engine.pipeline_chunk import message_settings


def test_stages_talk_while_they_compute_where_that_is_possible() -> None:
    assert message_settings(interleaved=True, on_gpu=True) == {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    assert message_settings(interleaved=False, on_gpu=True) == {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    for interleaved in (True, False):
        on_gloo = message_settings(interleaved, on_gpu=False)
        assert not any(on_gloo.values()), "batches are mixed up there, and nothing overlaps"

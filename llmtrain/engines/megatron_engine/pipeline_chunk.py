"""A stage under the names that megatron-core's schedules and gradient reductions look for on a model."""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from llmtrain.config.schema import ParallelConfig, RunConfig
from llmtrain.engines.stage import Stage, StageOutput
from llmtrain.parallel.layout import Layout


class PipelineChunk(nn.Module):
    """A stage under the names that megatron-core calls."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, stage: Stage, config: TransformerConfig, tied: bool, number: int) -> None:
        super().__init__()
        self.stage = stage
        self.config = config
        self.pre_process = stage.chunk.first
        self.post_process = stage.chunk.last
        self.share_embeddings_and_output_weights = tied
        self.vp_stage = number if stage.groups.layout.virtual_pipeline > 1 else None

    def set_input_tensor(self, received: Tensor | list[Tensor | None]) -> None:
        """Take what the previous pipeline rank sent: one tensor, or a list of it."""
        self.stage.received = received[0] if isinstance(received, list) else received

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The word embedding, on the chunks that hold it; its gradients are summed over them where it is tied."""
        embeddings = self.stage.model.embeddings
        return None if embeddings is None else embeddings.word.weight

    def forward(self, *arguments: Any) -> StageOutput:
        return self.stage(*arguments)


def message_settings(parallel: ParallelConfig, on_gpu: bool) -> dict[str, Any]:
    """How stages talk. On GPUs an interleaved schedule sends while it computes, one message at a time; without one a
    stage has nothing to compute meanwhile, and messages go in batches. On gloo neither: the interleaved schedule with
    batches mixes messages up without a word. The zero-bubble one sends while it computes without being told, which
    batches could not."""
    interleaved, apart = parallel.virtual_pipeline > 1, parallel.pipeline_schedule == "zero_bubble"
    return {"overlap_p2p_comm": on_gpu and interleaved, "batch_p2p_comm": on_gpu and not (interleaved or apart)}


def transformer_config(config: RunConfig, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """The keys of a run that megatron-core reads. Loss and gradients are sums that we have normalized ourselves."""
    virtual, moe = layout.virtual_pipeline, config.model.moe
    experts: dict[str, Any] = {}
    if moe is not None:  # what is checked before expert parallelism is allowed
        experts = {"num_moe_experts": moe.num_experts, "add_bias_linear": False}
        experts["moe_token_dispatcher_type"] = "alltoall"
    return TransformerConfig(
        **experts,
        num_layers=config.model.total_layers,
        hidden_size=config.model.hidden_size,
        num_attention_heads=config.model.num_heads,
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        sequence_parallel=layout.sequence,
        calculate_per_token_loss=True,  # else it divides by micro-batches and ranks once more
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        **message_settings(config.parallel, torch.cuda.is_available()),
        # Fused kernels that need CUDA or Transformer Engine: our modules do not call them.
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )

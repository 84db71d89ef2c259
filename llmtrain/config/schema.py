"""Every key of a run's configuration, with its type, default and meaning. Pure: imports no torch.

What can be said about one key alone stands here and in the modules of large sections (model, attention, data, launch).
What relates keys to each other stands in rules/.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.attention import kind_of
from llmtrain.config.batch_sizes import BatchSizes
from llmtrain.config.data import DataConfig
from llmtrain.config.engines import DEFAULT_ENGINE, EngineName
from llmtrain.config.finetune import DistillConfig, FinetuneConfig, Method, PruneConfig, QuantizeConfig
from llmtrain.config.launch import LaunchConfig
from llmtrain.config.metrics import MetricName
from llmtrain.config.model import ModelConfig
from llmtrain.config.observe import HealthConfig, ObserveConfig
from llmtrain.config.parameters import FrozenNames, frozen_by
from llmtrain.config.section import (
    AsTuple,
    AsWhole,
    Batch,
    Count,
    CountOrZero,
    Layers,
    Length,
    NotNegative,
    Positive,
    Probability,
    Ranks,
    Section,
    Steps,
    StepsOrZero,
    Text,
)
from llmtrain.config.sequence_lengths import Lengths, sample_lengths

ContextExchange = Literal["heads", "ring"]

RUN_NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"


CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 1024, 8192
GPU_LOGITS_BYTES = 2 << 30
"""Of a chunk's logits in fp32, on a GPU."""


class RampConfig(Section):
    """A change of the batch size."""

    from_step: Steps = Field(description="The first step that has this size; steps count from 1.")
    global_batch_size: Batch = Field(description="Sequences per step over all ranks, from that step on.")


class TrainConfig(Section):
    """How long, how large, how precise."""

    steps: Steps | None = Field(default=None, description="Optimizer steps in all; absent: from tokens or epochs.")
    tokens: Annotated[int, Field(ge=1, le=10**18), AsWhole] | None = Field(
        default=None,
        description="Tokens of data in all, instead of steps; rounded up to whole steps. A step reads "
        "global_batch_size x data.seq_len, however few of them the objective predicts. What was read counts, whatever "
        "the batch size was; the schedule goes by it.",
    )
    epochs: Annotated[int, Field(ge=1, le=10**6), AsWhole] | None = Field(
        default=None,
        description="How often the one source of data.train is read, instead of steps: as many tokens as its samples "
        "of so many epochs have. The run's config.yaml has these tokens too.",
    )
    global_batch_size: Batch = Field(
        default=16, description="Sequences per step over all ranks. With a batch_ramp, those that the run begins with."
    )
    batch_ramp: Annotated[tuple[RampConfig, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Steps from which on the batch has another size, such as "
        "[{from_step: 1001, global_batch_size: 32}]. Evaluation keeps global_batch_size.",
    )
    micro_batch_size: Batch = Field(default=4, description="Sequences per forward pass of one rank.")
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        default="fp32",
        description="bf16 and fp16: weights and activations in that type, fp32 master weights and gradients. fp8: as "
        "bf16, with the products of the layers' linears in float8, on a GPU.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations computed again in the backward pass: none, the attention kernel and MLP "
        "activation, or whole layers.",
    )
    compile: bool | None = Field(
        default=None,
        description="Compile the layers with torch.compile; null: on a GPU, where engine and layout can.",
    )
    deterministic: bool = Field(
        default=False,
        description="The same bits in every run of a layout, on a GPU at a cost in speed; on a CPU it is always so.",
    )
    loss_chunk_tokens: Length | None = Field(
        default=None,
        description="Tokens per chunk of the output head and cross-entropy; null: 1024 on a CPU, and on a GPU as many "
        "as have 2 GiB of logits, 8192 at most.",
    )

    @property
    def batch_sizes(self) -> BatchSizes:
        """The samples of every step."""
        sizes = (self.global_batch_size, *(change.global_batch_size for change in self.batch_ramp))
        return BatchSizes(sizes, (0, *(change.from_step - 1 for change in self.batch_ramp)))

    def chunk_tokens(self, rows: int, on_gpu: bool) -> int:
        """Tokens per chunk where a rank's head has so many rows. A GPU needs large chunks to be busy: each of them
        passes over the head's gradient once more."""
        if self.loss_chunk_tokens is not None:
            return self.loss_chunk_tokens
        if not on_gpu:
            return CPU_CHUNK_TOKENS
        fitting = max(1, GPU_LOGITS_BYTES // (4 * rows))
        return min(GPU_CHUNK_TOKENS, 1 << (fitting.bit_length() - 1))


class LossScaleConfig(Section):
    """Dynamic loss scaling, used with fp16 only."""

    initial: Annotated[float, Field(gt=0, le=2.0**48)] = Field(default=65536.0, description="Scale at the first step.")
    growth_interval: Steps = Field(default=2000, description="Good steps in a row before the scale doubles.")
    minimum: Annotated[float, Field(gt=0, le=2.0**48)] = Field(
        default=1.0, description="The scale never falls below this."
    )


class LrScaleConfig(Section):
    """Parameters with a learning rate of their own."""

    names: Annotated[tuple[Text, ...], AsTuple, Field(min_length=1, max_length=1_000)] = Field(
        description="Patterns of parameter names, such as embeddings.* or *lora_b."
    )
    scale: Positive = Field(description="Their learning rate is the schedule's times this.")


class OptimConfig(Section):
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "lion"] = Field(
        default="adamw",
        description="adamw (Loshchilov and Hutter 2019), or lion (Chen et al. 2023), which keeps one moment less and "
        "wants a learning rate of a third to a tenth and a weight decay of three to ten times adamw's.",
    )
    lr: Positive = Field(default=3e-4, description="Peak learning rate.")
    min_lr: NotNegative = Field(default=3e-5, description="Learning rate at the end of the decay.")
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = Field(
        default="cosine", description="Decay after warm-up; wsd: warm-up, stable, linear decay (Hu et al. 2024)."
    )
    warmup_steps: StepsOrZero = Field(default=0, description="Steps of linear warm-up.")
    decay_steps: Steps | None = Field(
        default=None,
        description="Length of wsd's decay (absent: a tenth of the run), or the step at which the others end their "
        "decay (absent: the last step).",
    )
    betas: Annotated[tuple[Probability, Probability], AsTuple] = Field(
        default=(0.9, 0.95), description="Decay rates of the moments. Lion's paper has [0.9, 0.99]."
    )
    eps: Positive = Field(default=1e-8, description="Added to adamw's denominator.")
    weight_decay: NotNegative = Field(
        default=0.1, description="Decoupled decay of matrices; biases and norms have none."
    )
    grad_clip: NotNegative = Field(default=1.0, description="Largest global gradient norm; 0: no clipping.")
    freeze: Annotated[tuple[Text, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Patterns of parameter names, such as embeddings.* or decoder.layers.0.*: these keep the values "
        "that they have where the run begins, in the training precision, without gradients, masters and moments.",
    )
    lr_scale: Annotated[tuple[LrScaleConfig, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Learning rates of their own, such as [{names: ['*lora_b'], scale: 16}] (LoRA+). "
        "Of several entries that fit a parameter, the first counts.",
    )
    loss_scale: LossScaleConfig = Field(default_factory=LossScaleConfig)

    def scale_of(self, name: str) -> float:
        """The factor of a parameter's learning rate."""
        fitting = (entry.scale for entry in self.lr_scale if name in FrozenNames(entry.names))
        return next(fitting, 1.0)


PipelineSchedule = Literal["zero_bubble"]


class ParallelConfig(Section):
    """Sizes of the mesh axes. Data parallel is what is left of the world size."""

    tensor: Ranks = Field(default=1, description="Ranks that split each layer.")
    pipeline: Ranks = Field(default=1, description="Ranks that split the layers.")
    virtual_pipeline: Layers = Field(default=1, description="Model chunks per pipeline rank.")
    pipeline_schedule: PipelineSchedule | None = Field(
        default=None,
        description="Order of a pipeline's forward and backward passes. null: 1F1B, interleaved with virtual_pipeline "
        "above 1. zero_bubble: ZB-H1 (Qi et al. 2023), which computes weight gradients while 1F1B would wait.",
    )
    context: Ranks = Field(default=1, description="Ranks that split the sequence in attention.")
    context_exchange: ContextExchange | None = Field(
        default=None,
        description="How context ranks attend to each other's positions. heads: each trades its part of the sequence "
        "for the whole of some heads. ring: keys and values go round the ranks in blocks, for any number of heads. "
        "null: heads where the ranks divide them, else ring.",
    )
    expert: Ranks = Field(default=1, description="Ranks that split the experts.")
    sequence: bool = Field(
        default=False, description="Split activations outside attention and MLP over the tensor ranks."
    )
    pipeline_split: Annotated[Annotated[tuple[CountOrZero, ...], Field(max_length=10_000)] | None, AsTuple] = Field(
        default=None, description="Layers of each pipeline chunk in model order; absent: as equal as can be."
    )
    overlap_grad_reduce: bool | None = Field(
        default=None, description="Reduce gradients while the backward pass goes on; null: on a GPU."
    )

    @property
    def replica_size(self) -> int:
        """Ranks that hold one replica of the model. Expert parallel lies within data and context."""
        return self.tensor * self.pipeline * self.context


class EngineConfig(Section):
    """Which engine runs the step."""

    name: EngineName = Field(
        default=DEFAULT_ENGINE,
        description="torch: plain PyTorch, the readable reference, data parallel. megatron: megatron-core, every axis, "
        "ZeRO 0 and 1. deepspeed: ZeRO 0 to 3 and offload, no pipeline.",
    )
    zero_stage: Annotated[int, Field(ge=0, le=3), AsWhole] = Field(
        default=0, description="What is sharded over data-parallel ranks."
    )
    offload: Literal["none", "cpu", "nvme"] = Field(default="none", description="Where optimizer state lives.")
    nvme_path: Text | None = Field(default=None, description="Folder on the local disk for offload=nvme.")


class EvaluateConfig(Section):
    """Evaluation during training."""

    every_steps: StepsOrZero = Field(default=0, description="Steps between evaluations; 0: never.")
    steps: Steps = Field(
        default=10,
        description="Global batches per evaluation, always the same first samples. Data that holds fewer is read once.",
    )
    stop_after: Count | None = Field(
        default=None,
        description="Early stopping: end the run after so many evaluations in a row without an improvement of the "
        "metric; null: never.",
    )
    metric: MetricName = Field(
        default="loss",
        description="What checkpoint.keep_best and stop_after go by, of an evaluation: loss, or a metric of a head for "
        "labels, of which more is better.",
    )
    min_improvement: NotNegative = Field(
        default=0.0,
        description="With stop_after: an improvement is a value better by more than this than the last improvement.",
    )
    tasks: Annotated[tuple[Text, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Files of tasks, as for `llmtrain eval`, that the model in training is measured on: choices, cloze "
        "and perplexity.",
    )
    tasks_every_steps: StepsOrZero = Field(default=0, description="Steps between evaluations on tasks; 0: never.")


class CheckpointConfig(Section):
    """What is saved, when, and from where a run continues."""

    every_steps: StepsOrZero = Field(default=500, description="Steps between checkpoints; 0: only the last step.")
    keep: Count = Field(default=3, description="Newest checkpoints that are kept.")
    keep_every_steps: StepsOrZero = Field(
        default=0, description="Checkpoints at multiples of this are kept for good; 0: none."
    )
    keep_best: bool = Field(
        default=False,
        description="Also keep the best checkpoint by evaluate.metric. Steps that are saved are then evaluated "
        "too, whatever evaluate.every_steps is.",
    )
    async_save: bool = Field(
        default=True, description="Write behind training; it waits only for one copy of the state."
    )
    resume: Text = Field(
        default="auto",
        description="auto: the newest valid checkpoint; none: a fresh run folder; or a run's or checkpoint's path.",
    )
    allow_change: Annotated[tuple[Text, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Keys that may differ from those of the checkpoint that a run continues, such as seed, "
        "data.train or data.tokenizer.",
    )
    on_save_error: Literal["continue", "stop"] = Field(
        default="continue",
        description="When the file system does not take a checkpoint: train on and try again at the next one, or stop. "
        "The last one must succeed.",
    )


class RunConfig(Section):
    """A complete run."""

    name: Annotated[str, Field(pattern=RUN_NAME_PATTERN)] = Field(
        description="Name of the run folder: letters, digits, _ . and -, 64 at most."
    )
    output_dir: Text = Field(default="runs", description="Folder that holds the run folder.")
    seed: Annotated[int, Field(ge=0, lt=2**63), AsWhole] = Field(
        default=1234, description="Everything random follows from it."
    )
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    finetune: FinetuneConfig | None = Field(
        default=None, description="Train on from weights that are there already; absent: pretraining."
    )
    distill: DistillConfig | None = Field(
        default=None, description="Learn from a teacher beside the data; absent: from the data alone."
    )
    prune: PruneConfig | None = Field(
        default=None, description="Prune weights while training; absent: none is pruned, and no zero is kept."
    )
    quantize: QuantizeConfig | None = Field(
        default=None, description="Train with whole numbers, as `llmtrain compress` writes them; absent: with floats."
    )
    optim: OptimConfig = Field(default_factory=OptimConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    observe: ObserveConfig = Field(default_factory=ObserveConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)

    @property
    def context_exchange(self) -> ContextExchange:
        """How context ranks exchange what attention needs, resolved."""
        chosen, heads, parallel = self.parallel.context_exchange, self.model.num_heads, self.parallel
        if chosen is not None:
            return chosen
        undivided = heads % parallel.tensor == 0 and heads // parallel.tensor % parallel.context != 0
        return "ring" if undivided and not kind_of(self.model.attention).no_ring else "heads"

    @property
    def balances_context(self) -> bool:
        """True where context ranks hold a run from the beginning and one from the end of the sequence each."""
        causal = self.model.family != "encoder"
        rings = self.parallel.context > 1 and self.context_exchange == "ring"
        return rings and causal and kind_of(self.model.attention).widens

    @property
    def method(self) -> Method:
        """How parameters are trained: all of them, or what is added."""
        return self.finetune.method if self.finetune else "full"

    @property
    def lengths(self) -> Lengths:
        """Positions of every sample, padding and a soft prompt included."""
        return self.lengths_of(self.data)

    def lengths_of(self, data: DataConfig) -> Lengths:
        """The same with another section `data`."""
        lengths, prompt = sample_lengths(self.model.family, data), self.prompt_tokens
        return Lengths(lengths.main, lengths.encoder + prompt) if lengths.encoder else Lengths(lengths.main + prompt)

    @property
    def prompt_tokens(self) -> int:
        """Positions that a soft prompt takes before each sample."""
        return self.finetune.prompt.tokens if self.finetune and self.method == "prompt" else 0

    @property
    def frozen(self) -> FrozenNames:
        """The parameters that are not trained."""
        return frozen_by(self.optim.freeze, self.finetune)

    @property
    def run_dir(self) -> Path:
        """The run folder, relative to the working directory where output_dir is."""
        return Path(self.output_dir) / self.name

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; a budget in tokens is rounded up to whole steps. Of epochs nobody knows it
        until the data is read."""
        if self.train.steps is not None:
            return self.train.steps
        if self.train.tokens is None:
            raise ValueError("neither train.steps nor train.tokens is known")
        return self.train.batch_sizes.last_step(-(-self.train.tokens // self.data.seq_len))

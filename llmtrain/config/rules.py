"""The arithmetic between keys: one small function per rule. Pure: imports no torch and touches no storage.

A rule yields what is wrong, names every key that it rests on in `uses`, and suggests legal values. Where a key
stands in a file is filled in by the loader.
"""

from collections.abc import Iterator

from llmtrain.config.names import either
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

MESH_AXES = ("tensor", "pipeline", "context")
"""The axes that a rank has a place on beside data parallel; expert parallel lies within data and context."""

SEARCH_WIDTH = 4096
"""How far from the value legal values are looked for."""

Found = Iterator[Problem]


def arithmetic_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Every rule between keys that a configuration breaks when it runs on `world_size` ranks."""
    problems = [problem for rule in RULES for problem in rule(config)]
    return problems + [problem for rule in WORLD_RULES for problem in rule(config, world_size)]


def nearest_divisors(number: int, value: int, limit: int = 4) -> list[int]:
    """The divisors of `number` nearest to `value`, in ascending order."""
    value = min(value, number)
    # A window around the value, so that an absurdly large number costs no absurdly long search.
    window = range(max(2, value - SEARCH_WIDTH), min(number, value + SEARCH_WIDTH) + 1)
    divisors = [1, *(n for n in window if number % n == 0)]
    return sorted(sorted(divisors, key=lambda n: abs(n - value))[:limit])


def nearest_multiples(unit: int, value: int) -> list[int]:
    """The positive multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def name_is_a_folder(config: RunConfig) -> Found:
    if config.name.strip(".") == "":
        message = "names the run's folder and cannot be dots alone. Try my-run."
        yield Problem("name", message, config.name)


def one_budget(config: RunConfig) -> Found:
    steps, tokens = config.train.steps, config.train.tokens
    if steps is None and tokens is None:
        message = "needs train.steps or train.tokens. Try train.steps=1000."
        yield Problem("train", message, uses=("train.steps", "train.tokens"))
    if steps is not None and tokens is not None:
        message = f"train.steps = {steps} already says how long to train. Remove one of the two."
        yield Problem("train.tokens", message, tokens, uses=("train.steps",))


def heads_divide_hidden_size(config: RunConfig) -> Found:
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_heads:
        tries = either(nearest_divisors(model.hidden_size, model.num_heads))
        message = f"must divide model.hidden_size = {model.hidden_size}, or set model.head_dim. Try {tries}."
        yield Problem("model.num_heads", message, model.num_heads, uses=("model.hidden_size", "model.head_dim"))


def kv_heads_divide_heads(config: RunConfig) -> Found:
    model = config.model
    if model.num_heads % model.kv_heads:
        tries = either(nearest_divisors(model.num_heads, model.kv_heads))
        message = f"must divide model.num_heads = {model.num_heads}. Try {tries}."
        yield Problem("model.num_kv_heads", message, model.num_kv_heads, uses=("model.num_heads",))


def rope_needs_even_heads(config: RunConfig) -> Found:
    model = config.model
    if model.position != "rope" or model.head_size % 2 == 0:
        return
    if model.head_dim is not None:
        message = f"must be even with model.position = rope. Try {either(nearest_multiples(2, model.head_dim))}."
        yield Problem("model.head_dim", message, model.head_dim, uses=("model.position",))
    elif model.hidden_size % model.num_heads == 0:
        # A half of an even width that leaves whole pairs: heads whose size is even divide hidden_size / 2.
        even = nearest_divisors(model.hidden_size // 2, model.num_heads) if model.hidden_size % 2 == 0 else []
        tries = f"Try {either(even)}, or model.position=learned." if even else "Try model.position=learned."
        message = (
            f"gives heads of size {model.head_size} (model.hidden_size = {model.hidden_size}), which must be even "
            f"with model.position = rope. {tries}"
        )
        uses = ("model.hidden_size", "model.head_dim", "model.position")
        yield Problem("model.num_heads", message, model.num_heads, uses=uses)


def rope_scaling_needs_rope(config: RunConfig) -> Found:
    model = config.model
    if model.rope_scaling is None:
        return
    if model.position != "rope":
        message = f"has no effect with model.position = {model.position}. Try null, or model.position=rope."
        yield Problem("model.rope_scaling", message, uses=("model.position",))
    low, high = model.rope_scaling.low_freq_factor, model.rope_scaling.high_freq_factor
    if low >= high:
        message = f"must be less than model.rope_scaling.high_freq_factor = {high:g}. Try {high / 4:g}."
        yield Problem("model.rope_scaling.low_freq_factor", message, low, uses=("model.rope_scaling.high_freq_factor",))


def sample_fits_model(config: RunConfig) -> Found:
    longest = config.model.max_seq_len
    if config.data.seq_len > longest:
        message = (
            f"must be at most model.max_seq_len = {longest}. Try {longest}, or model.max_seq_len={config.data.seq_len}."
        )
        yield Problem("data.seq_len", message, config.data.seq_len, uses=("model.max_seq_len",))


def steps_fit_schedule(config: RunConfig) -> Found:
    """Warm-up ends before the run does, and the decay has its place behind it."""
    if (config.train.steps is None) == (config.train.tokens is None):
        return
    optim, steps = config.optim, config.total_steps
    budget = ("train.tokens", "train.global_batch_size", "data.seq_len")
    uses = budget if config.train.steps is None else ("train.steps",)
    length = f"the run's {steps} steps"
    if optim.warmup_steps >= steps:
        message = f"must be less than {length}. Try {steps // 10}."
        yield Problem("optim.warmup_steps", message, optim.warmup_steps, uses=uses)
    elif optim.decay_steps is None:
        return
    elif optim.schedule == "wsd" and optim.warmup_steps + optim.decay_steps > steps:
        message = (
            f"with optim.warmup_steps = {optim.warmup_steps} must fit into {length}. "
            f"Try {steps - optim.warmup_steps} or less."
        )
        uses = ("optim.warmup_steps", "optim.schedule", *uses)
        yield Problem("optim.decay_steps", message, optim.decay_steps, uses=uses)
    elif optim.schedule != "wsd" and optim.decay_steps <= optim.warmup_steps:
        message = f"must be greater than optim.warmup_steps = {optim.warmup_steps}. Try {steps}."
        uses = ("optim.warmup_steps", "optim.schedule", *uses)
        yield Problem("optim.decay_steps", message, optim.decay_steps, uses=uses)


def lr_falls(config: RunConfig) -> Found:
    optim = config.optim
    if optim.schedule != "constant" and optim.min_lr > optim.lr:
        message = f"must be at most optim.lr = {optim.lr:g}. Try {optim.lr / 10:g}."
        yield Problem("optim.min_lr", message, optim.min_lr, uses=("optim.lr", "optim.schedule"))


def loss_scale_has_room(config: RunConfig) -> Found:
    scale = config.optim.loss_scale
    if scale.initial < scale.minimum:
        message = f"must be at least optim.loss_scale.minimum = {scale.minimum:g}. Try 65536."
        yield Problem("optim.loss_scale.initial", message, scale.initial, uses=("optim.loss_scale.minimum",))


def torch_engine_splits_batch_only(config: RunConfig) -> Found:
    if config.engine.name != "torch":
        return
    for axis in MESH_AXES:
        size = getattr(config.parallel, axis)
        if size > 1:
            message = "engine.name = torch splits the batch only. Try 1."
            yield Problem(f"parallel.{axis}", message, size, uses=("engine.name",))
    if config.engine.zero_stage > 0:
        message = "engine.name = torch shards no optimizer state, gradients or weights. Try 0."
        yield Problem("engine.zero_stage", message, config.engine.zero_stage, uses=("engine.name",))


def experts_need_moe(config: RunConfig) -> Found:
    if config.parallel.expert > 1:
        yield Problem("parallel.expert", "the model has no experts to split. Try 1.", config.parallel.expert)


def chunks_need_pipeline(config: RunConfig) -> Found:
    parallel = config.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        message = "needs parallel.pipeline greater than 1. Try 1."
        yield Problem("parallel.virtual_pipeline", message, parallel.virtual_pipeline, uses=("parallel.pipeline",))


def sequence_needs_tensor(config: RunConfig) -> Found:
    if config.parallel.sequence and config.parallel.tensor == 1:
        message = "needs parallel.tensor greater than 1. Try false."
        yield Problem("parallel.sequence", message, "true", uses=("parallel.tensor",))


def evaluation_needs_data(config: RunConfig) -> Found:
    every = config.evaluate.every_steps
    if every > 0 and not config.data.valid:
        message = "needs data.valid, which is empty. Try 0, or data.valid=[{path: data/shards/valid}]."
        yield Problem("evaluate.every_steps", message, every, uses=("data.valid",))


def best_needs_evaluation(config: RunConfig) -> Found:
    if config.checkpoint.keep_best and config.evaluate.every_steps == 0:
        message = "needs a validation loss, and evaluate.every_steps = 0. Try false, or evaluate.every_steps=50."
        yield Problem("checkpoint.keep_best", message, "true", uses=("evaluate.every_steps",))


def axes_divide_world(config: RunConfig, world_size: int) -> Found:
    grid = _grid_size(config)
    if world_size % grid:
        sizes = " x ".join(f"{axis} {getattr(config.parallel, axis)}" for axis in MESH_AXES)
        message = (
            f"parallel needs a multiple of {sizes} = {grid} ranks. Try {either(nearest_multiples(grid, world_size))}."
        )
        uses = tuple(f"parallel.{axis}" for axis in MESH_AXES)
        yield Problem("launch.num_workers", message, world_size, uses=uses)


def micro_batches_fill_batch(config: RunConfig, world_size: int) -> Found:
    grid = _grid_size(config)
    if world_size % grid:
        return
    data_parallel = world_size // grid
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    unit = micro * data_parallel
    if batch % unit:
        message = (
            f"must be a multiple of train.micro_batch_size x data parallel size = {micro} x {data_parallel} = {unit}. "
            f"Try {either(nearest_multiples(unit, batch))}."
        )
        if batch % data_parallel == 0:
            fitting = either(nearest_divisors(batch // data_parallel, micro))
            message = f"{message[:-1]}, or for train.micro_batch_size {fitting}."
        uses = ("train.micro_batch_size", "launch.num_workers", *(f"parallel.{axis}" for axis in MESH_AXES))
        yield Problem("train.global_batch_size", message, batch, uses=uses)


def _grid_size(config: RunConfig) -> int:
    """Ranks that hold one replica of the model."""
    size = 1
    for axis in MESH_AXES:
        size *= getattr(config.parallel, axis)
    return size


RULES = (
    name_is_a_folder,
    one_budget,
    heads_divide_hidden_size,
    kv_heads_divide_heads,
    rope_needs_even_heads,
    rope_scaling_needs_rope,
    sample_fits_model,
    steps_fit_schedule,
    lr_falls,
    loss_scale_has_room,
    torch_engine_splits_batch_only,
    experts_need_moe,
    chunks_need_pipeline,
    sequence_needs_tensor,
    evaluation_needs_data,
    best_needs_evaluation,
)
WORLD_RULES = (axes_divide_world, micro_batches_fill_batch)

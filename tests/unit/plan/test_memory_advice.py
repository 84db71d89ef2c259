"""What would help when memory runs out: legal, needed less of, in order, and below the text of the failure."""

import errno
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.rank.failure import Failure, failure_text
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import RunConfig
from llmtrain.plan.memory import advice_text, advise, is_out_of_memory, memory_advice
from tests.unit.config.small_run import run

LARGE: dict[str, Any] = {
    "model": {
        "num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "vocab_size": 128256,
        "max_seq_len": 8192,
    },
    "data": {"train": [{"path": "a"}], "seq_len": 8192},
    "train": {"steps": 100, "global_batch_size": 64, "micro_batch_size": 4},
}  # fmt: skip


def large(**sections: Any) -> RunConfig:
    """A run of 8 billion weights, with keys of its sections changed."""
    return run(**{name: {**LARGE.get(name, {}), **sections.get(name, {})} for name in {*LARGE, *sections}})


def lines(config: RunConfig, device: str = "cuda") -> list[str]:
    return [str(advice) for advice in memory_advice(config, device)]


def test_everything_that_one_engine_cannot_do_names_the_engine_that_can() -> None:
    assert lines(large(launch={"num_workers": 8})) == [
        "train.loss_chunk_tokens=1024",
        "train.precision=bf16",
        "engine.name=megatron engine.zero_stage=1",
        "train.micro_batch_size=2",
        "train.recompute=selective",
        "engine.name=deepspeed engine.zero_stage=2",
        "train.recompute=full",
        "engine.name=deepspeed engine.zero_stage=3",
        "engine.name=megatron parallel.tensor=2",
        "engine.name=megatron parallel.context=2",
        "engine.name=megatron parallel.pipeline=2",
        "engine.name=deepspeed engine.zero_stage=1 engine.offload=cpu",
        "engine.name=deepspeed engine.zero_stage=3 engine.offload=nvme engine.nvme_path=/tmp/llmtrain",
        "data.seq_len=4096",
    ]


def test_what_is_done_already_is_left_out() -> None:
    config = large(
        train={"precision": "bf16", "recompute": "full", "micro_batch_size": 1, "loss_chunk_tokens": 128},
        engine={"name": "megatron", "zero_stage": 1},
        parallel={"tensor": 4, "pipeline": 2, "sequence": True},
        launch={"num_workers": 8},
    )
    # One replica fills the ranks: every further split needs more of them.
    assert lines(config) == [
        "parallel.tensor=8 launch.num_workers=16",
        "parallel.context=2 launch.num_workers=16",
        "parallel.pipeline=4 launch.num_workers=16",
        "data.seq_len=4096",
    ]


def test_one_rank_shards_nothing_and_a_cpu_is_offloaded_to_the_disk_only() -> None:
    said = lines(large(), "cpu")
    assert not [line for line in said if "zero_stage" in line and "nvme" not in line]
    assert "engine.name=megatron parallel.tensor=2 launch.num_workers=2" in said
    assert not [line for line in said if "offload=cpu" in line]


def test_sizes_that_divide_nothing_are_passed_over() -> None:
    config = run(
        model={"hidden_size": 96, "num_heads": 6, "num_kv_heads": 6, "vocab_size": 300, "ffn_hidden_size": 384},
        train={"global_batch_size": 12, "micro_batch_size": 6},
        launch={"num_workers": 2},
    )
    said = lines(config)
    assert "train.micro_batch_size=3" in said
    assert "engine.name=megatron parallel.tensor=2" in said
    assert not [line for line in said if "loss_chunk" in line], "64 tokens a micro-batch are no large chunk"


@given(
    workers=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    engine=st.sampled_from([("torch", 0), ("megatron", 0), ("megatron", 1), ("deepspeed", 0), ("deepspeed", 3)]),
    axes=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3),
    batch=st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 8])),
    heads=st.sampled_from([2, 4, 6, 12]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_every_advice_is_legal_and_changes_something(
    workers: int, engine: tuple, axes: tuple, batch: tuple, heads: int, device: str
) -> None:
    config = run(
        model={"num_layers": 4, "hidden_size": 96, "num_heads": heads, "vocab_size": 50000, "ffn_hidden_size": 384},
        train={"global_batch_size": batch[0] * batch[1] * workers, "micro_batch_size": batch[1]},
        engine={"name": engine[0], "zero_stage": engine[1]},
        parallel=dict(zip(("tensor", "pipeline", "context"), axes, strict=True)),
        launch={"num_workers": workers},
    )
    if arithmetic_problems(config, workers):
        return
    for advice in memory_advice(config, device):
        other = config.with_keys(advice.settings)
        assert other != config
        assert arithmetic_problems(other, other.launch.num_workers) == [], str(advice)
        for key in advice.settings:
            assert config.with_keys({key: advice.settings[key]}) != config, f"{key} is so already"


def raised_by_torch() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    return raised.value


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            raise ValueError("a hook failed") from inner
    except ValueError as outer:
        return outer


def test_memory_that_ran_out_is_recognized_however_it_is_said() -> None:
    for error in (
        raised_by_torch(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        wrapped(raised_by_torch()),
    ):
        assert is_out_of_memory(error), repr(error)
    for error in (RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left"), ValueError("out of memory")):
        assert not is_out_of_memory(error), repr(error)


def test_the_failure_ends_with_what_would_help() -> None:
    error = raised_by_torch()
    config = run(model={"vocab_size": 300})
    advise(error, config, "cpu")
    text = failure_text([Failure.of_error(1, error)])
    assert text.endswith(advice_text(config, "cpu"))
    assert "\n  train.micro_batch_size=2 " in text
    other = RuntimeError("shape mismatch")
    advise(other, config, "cpu")
    assert "help" not in failure_text([Failure.of_error(1, other)])

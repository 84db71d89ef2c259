"""Fast: training steps of three sizes beside a bare loop of Hugging Face's models, experts, and where time goes."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import sample_lengths
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.observe.monitor import flops_per_sample, peak_flops
from llmtrain.parallel.layout import Layout
from llmtrain.plan.memory import plan_memory
from llmtrain.values.batch import Batch
from tests.gpu.session import Finding, Machine, attempts, checked

LEARNING_RATE = 1e-4
ENGINE_SECONDS = 120


@dataclass(frozen=True)
class Size:
    """A model and its step. `tiny` has as many kinds of parts, and nothing of the size."""

    name: str
    model: dict[str, Any]
    batch_size: int
    micro_batch_size: int

    def config(self, machine: Machine, changes: dict[str, Any] | None = None) -> RunConfig:
        model, batch, micro = dict(self.model), self.batch_size, self.micro_batch_size
        if machine.tiny:
            model |= {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "max_seq_len": 32}
            model |= {"num_kv_heads": 2} if "num_kv_heads" in model else {}
            model |= {"ffn_hidden_size": 128} if "ffn_hidden_size" in model else {}
            batch = micro = 2
        sections: dict[str, Any] = {
            "model": model,
            "data": {"train": [{"path": "none"}], "seq_len": model["max_seq_len"]},
            "train": {"steps": 1000, "global_batch_size": batch, "micro_batch_size": micro, "precision": "bf16"},
            "optim": {"lr": LEARNING_RATE, "schedule": "constant"},
        }
        for section, keys in (changes or {}).items():
            sections[section] = {**sections.get(section, {}), **keys}
        return RunConfig.model_validate({"name": "gpu", **sections})


GPT2 = {
    "num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 50257, "max_seq_len": 1024, "bias": True,
    "position": "learned", "norm": "layernorm", "activation": "gelu", "tie_embeddings": True,
}  # fmt: skip
SIZES = (
    Size("124M s1024", GPT2, 64, 64),
    Size("1.3B s2048", {**GPT2, "num_layers": 24, "hidden_size": 2048, "num_heads": 16, "max_seq_len": 2048}, 16, 16),
    Size(
        "8B shape, 16 layers, s8192",
        {
            "num_layers": 16, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "ffn_hidden_size": 14336,
            "vocab_size": 128256, "max_seq_len": 8192, "rope_theta": 500000.0, "tie_embeddings": False,
        },
        4, 1,
    ),
)  # fmt: skip


KINDS_OF_STEP: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "compiled": {"compile": True},
    "compiled, fp8": {"compile": True, "precision": "fp8"},
}
"""Keys of `train` by name."""


def random_batch(config: RunConfig, size: int, number: int) -> Batch:
    length = config.data.seq_len
    tokens = torch.randint(config.model.vocabulary, (size, length + 1), generator=torch.Generator().manual_seed(number))
    positions = torch.arange(length).expand(size, -1)
    return Batch(tokens[:, :-1], positions, labels_BS=tokens[:, 1:].clone())


def whole_steps(machine: Machine) -> Iterator[Finding]:
    """Tokens per second, MFU and memory of the torch engine, compiled and not, beside a bare loop."""
    for size in SIZES:
        work: dict[str, Callable[[], Finding]] = {}
        for title, train in KINDS_OF_STEP.items():
            lacks_float8 = train.get("precision") == "fp8" and find_spec("torchao") is None
            if lacks_float8 or (train["compile"] and not machine.on_gpu):
                note = "torchao is not installed" if lacks_float8 else "compiling for the CPU takes a minute"
                yield Finding(f"{size.name}, {title}", "left out", note=note)
                continue
            title = f"{size.name}, {title}"
            work[title] = partial(engine_step, machine, title, size.config(machine, {"train": train}))
        if find_spec("transformers"):
            title = f"{size.name}, Hugging Face in a bare loop"
            work[title] = partial(peer_step, machine, title, size.config(machine))
        yield from attempts(work)


def engine_step(machine: Machine, title: str, config: RunConfig) -> Finding:
    engine, numbers = TorchEngine(config, machine.device), count(1)
    micro = config.train.micro_batch_size
    batches = [random_batch(config, micro, n) for n in range(config.train.global_batch_size // micro)]

    def step() -> None:
        engine.train_step(next(numbers), batches, LEARNING_RATE)

    seconds, peak = machine.seconds(step, repeats=5, warm_up=3), held_bytes(machine, step)
    planned = plan_memory(config, Layout(), sample_lengths(config.model.family, config.data))
    total = planned.held + planned.activations + planned.logits
    return figures(machine, title, config, seconds, f"peak {peak / 1e9:.3g} GB, planned {total / 1e9:.3g} GB")


def held_bytes(machine: Machine, step: Callable[[], None]) -> int:
    """Most that is held during a step, weights and moments included."""
    step_bytes = machine.peak_bytes(step)
    return step_bytes + (torch.cuda.memory_allocated(machine.device) if machine.on_gpu else 0)


def figures(machine: Machine, title: str, config: RunConfig, seconds: float, note: str) -> Finding:
    tokens = config.train.global_batch_size * config.data.seq_len
    lengths = sample_lengths(config.model.family, config.data)
    flops = flops_per_sample(config.model, lengths) * config.train.global_batch_size / seconds
    peak = peak_flops(torch.cuda.get_device_name(machine.device)) if machine.on_gpu else None
    mfu = f"MFU {flops / peak:.1%}, " if peak else ""
    gc.collect()
    if machine.on_gpu:
        torch.cuda.empty_cache()
    return Finding(title, "ok", tokens / seconds, "tokens/s", f"{mfu}{flops / 1e12:.3g} TFLOP/s, {note}")


def peer_step(machine: Machine, title: str, config: RunConfig) -> Finding:
    """transformers' model with its fastest settings: SDPA, compiled, autocast over fp32 weights, fused AdamW."""
    model = hugging_face_model(config).to(machine.device).train()
    run = torch.compile(model) if machine.on_gpu else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    micro = config.train.micro_batch_size
    number = config.train.global_batch_size // micro
    tokens = [random_batch(config, micro, n).tokens_BS.to(machine.device) for n in range(number)]

    def step() -> None:
        for ids in tokens:
            with torch.autocast(machine.device.type, torch.bfloat16):
                loss: Tensor = run(ids, labels=ids).loss / number
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    seconds, peak = machine.seconds(step, repeats=5, warm_up=3), held_bytes(machine, step)
    return figures(machine, title, config, seconds, f"peak {peak / 1e9:.3g} GB")


def hugging_face_model(config: RunConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model = config.model
    if model.position == "learned":
        sizes = {"n_positions": model.max_seq_len, "n_embd": model.hidden_size, "n_layer": model.num_layers}
        plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
        return GPT2LMHeadModel(GPT2Config(vocab_size=model.vocabulary, n_head=model.num_heads, **sizes, **plain))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocabulary, hidden_size=model.hidden_size, intermediate_size=model.ffn_size,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads, num_key_value_heads=model.kv_heads,
            max_position_embeddings=model.max_seq_len, tie_word_embeddings=model.tie_embeddings,
        )
    )  # fmt: skip


def experts(machine: Machine) -> Iterator[Finding]:
    """Mixtures of experts beside a dense model of as many active weights, and how often the host waits in a step."""
    dense = {**SIZES[2].model, "num_layers": 4, "hidden_size": 2048, "num_heads": 16, "max_seq_len": 4096}
    kinds = {
        "dense, 5,632 wide": {"ffn_hidden_size": 5632},
        "8 experts, 2 of them": {"ffn_hidden_size": 2816, "moe": {"num_experts": 8, "top_k": 2}},
        "64 experts, 8 of them": {"ffn_hidden_size": 704, "moe": {"num_experts": 64, "top_k": 8}},
    }
    if machine.tiny:
        kinds = {"8 experts, 2 of them": kinds["8 experts, 2 of them"]}
    work: dict[str, Callable[[], Finding]] = {}
    for name, keys in kinds.items():
        config = Size(name, {**dense, **keys}, 4, 4).config(machine, {"train": {"compile": False}})
        work[name] = partial(engine_step, machine, name, config)
        work[f"{name}: waits"] = partial(waits, machine, name, config)
    yield from attempts(work)


def waits(machine: Machine, name: str, config: RunConfig) -> Finding:
    """Calls in a step that wait for the device, by PyTorch's profiler; one is the step's own."""
    if not machine.on_gpu:
        return Finding(f"{name}: waits", "left out", note="a CPU is not waited for")
    engine = TorchEngine(config, machine.device)
    batch = random_batch(config, config.train.micro_batch_size, 0)
    engine.train_step(1, [batch], LEARNING_RATE)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        engine.train_step(2, [batch], LEARNING_RATE)
    found = sum(event.count for event in profile.key_averages() if "StreamSynchronize" in event.key)
    return Finding(f"{name}: waits in a step of one micro-batch", "ok" if found <= 1 else "wrong", found)


def profiles(machine: Machine) -> Iterator[Finding]:
    """Where a step's time goes: the largest kernels, and the share in which the device does nothing."""
    for size in SIZES if not machine.tiny else SIZES[:1]:
        config = size.config(machine)
        engine = TorchEngine(config, machine.device)
        micro = config.train.micro_batch_size
        batches = [random_batch(config, micro, n) for n in range(config.train.global_batch_size // micro)]
        for step in (1, 2):
            engine.train_step(step, batches, LEARNING_RATE)
        seconds = machine.seconds(partial(engine.train_step, 3, batches, LEARNING_RATE), repeats=2, warm_up=0)
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if machine.on_gpu else []
        with torch.profiler.profile(activities=activities) as profile:
            engine.train_step(4, batches, LEARNING_RATE)
            machine.wait()
        key = "self_device_time_total" if machine.on_gpu else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
        busy = sum(getattr(event, key) for event in events) / 1e6
        if machine.on_gpu:
            yield Finding(f"{size.name}: share of a step without a kernel", "ok", max(0.0, 1 - busy / seconds))
        for event in events[: 5 if machine.tiny else 25]:
            share = getattr(event, key) / 1e6 / max(busy, 1e-9)
            yield Finding(f"{size.name}: {event.key[:40]}", "ok", 100 * share, "%", f"{event.count} calls")
        del engine, profile, events
        gc.collect()


ENGINES = {
    "megatron": {"engine": {"name": "megatron"}},
    "megatron, ZeRO 1": {"engine": {"name": "megatron", "zero_stage": 1}},
    "deepspeed, ZeRO 0": {"engine": {"name": "deepspeed"}},
    "deepspeed, ZeRO 1": {"engine": {"name": "deepspeed", "zero_stage": 1}},
    "deepspeed, ZeRO 3": {"engine": {"name": "deepspeed", "zero_stage": 3}},
}

TINY_ENGINES = ("megatron, ZeRO 1", "deepspeed, ZeRO 3")
"""The others differ in no line that only a GPU would run."""

FEW = {"compile": False, "global_batch_size": 2, "micro_batch_size": 2}


def engines(machine: Machine) -> Iterator[Finding]:
    """Five steps of every other engine with one rank, each in a process of its own: they change what a process is."""
    for name, changes in ENGINES.items():
        if machine.tiny and name not in TINY_ENGINES:
            continue
        command = [sys.executable, "-m", "tests.gpu.steps", json.dumps(changes), machine.device.type, str(machine.tiny)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ENGINE_SECONDS, check=False)
        if done.returncode:
            yield Finding(name, "failed", note=(done.stderr.strip().splitlines() or ["nothing said"])[-1][:300])
            continue
        losses = json.loads(done.stdout.splitlines()[-1])
        config = SIZES[0].config(machine, {"train": FEW})
        theirs = five_losses(TorchEngine(config, machine.device), config)
        error = max(abs(a - b) / b for a, b in zip(losses, theirs, strict=True))
        yield checked(f"{name}: 5 steps beside the torch engine", error, 1e-2)


def five_losses(engine: Any, config: RunConfig) -> list[float]:
    return [engine.train_step(step, [random_batch(config, 2, step)], LEARNING_RATE).loss for step in range(1, 6)]


def be_engine(changes: str, kind: str, tiny: str) -> None:
    """Be one engine's process: print its losses."""
    from launch.rank.place import ALONE
    from launch.rank.rendezvous import lone_store, open_group
    from llmtrain.train.setup import engine_class

    machine = Machine(torch.device(kind, 0) if kind == "cuda" else torch.device(kind), tiny == "True")
    config = SIZES[0].config(machine, {**json.loads(changes), "train": FEW})
    open_group(lone_store(), ALONE, machine.device, 60.0)
    losses = five_losses(engine_class(config.engine.name)(config, machine.device), config)
    print(f"\n{json.dumps(losses)}", flush=True)


if __name__ == "__main__":
    be_engine(*sys.argv[1:])

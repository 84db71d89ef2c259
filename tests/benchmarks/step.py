"""One training step: the torch engine beside a bare PyTorch loop, Hugging Face's GPT-2 in one, and HF Trainer."""

import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.values.batch import Batch
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_torch_thread
from tests.benchmarks.peer_models import PlainGPT, Shape, hugging_face_gpt2, random_tokens

FULL = Shape(num_layers=6, hidden_size=384, num_heads=6, vocab_size=8192, seq_len=256, batch_size=16)
QUICK = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=32, batch_size=4)
LEARNING_RATE = 1e-4
OURS = "llmtrain"


def benchmark(options: Options) -> list[Table]:
    """Tokens per second in fp32 and in bf16; on a CPU in one thread."""
    shape, steps = (QUICK, 1) if options.quick else (FULL, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = f"{shape.batch_size} x {shape.seq_len}"
    sizes = f"{shape.num_layers} layers, {shape.hidden_size} wide, batch {batch}, {device.type}"
    notes = []
    fp32: dict[str, Measurement] = {
        OURS: engine_loop(shape, device, steps, "fp32"),
        "bare PyTorch loop": bare_loop(PlainGPT(shape), plain_loss, shape, device, steps),
        "Hugging Face GPT-2 in a bare loop": bare_loop(
            hugging_face_gpt2(shape), hugging_face_loss, shape, device, steps
        ),
    }
    if find_spec("accelerate"):
        fp32["HF Trainer"] = hugging_face_trainer(shape, device, steps)
    else:
        notes.append("HF Trainer was not run: it needs the package accelerate")
    bf16 = {
        OURS: engine_loop(shape, device, steps, "bf16"),
        "bare PyTorch loop, autocast": bare_loop(PlainGPT(shape), plain_loss, shape, device, steps, autocast=True),
    }
    unit = "tokens/s" if device.type == "cuda" else "tokens per CPU second"
    with one_torch_thread():
        rows = measure(fp32, options.rounds), measure(bf16, options.rounds)
    return [
        Table(f"Training step, fp32 ({sizes})", unit, "higher", OURS, rows[0], tuple(notes)),
        Table(f"Training step, bf16 ({sizes})", unit, "higher", OURS, rows[1]),
    ]


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of the wall on a GPU; on a CPU those that this process computed.

    With one thread that is what the wall would say on a core of our own; time in which other processes have the core
    does not count.
    """
    return time.perf_counter if device.type == "cuda" else time.process_time


def gpt2_run(shape: Shape, changes: Mapping[str, Mapping[str, Any]] | None = None) -> RunConfig:
    """The configuration of the same GPT-2 for our engine; `changes` are keys of sections, set over these."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.num_heads,
            "vocab_size": shape.vocab_size,
            "max_seq_len": shape.seq_len,
            "position": "learned",
            "norm": "layernorm",
            "activation": "gelu",
            "bias": True,
        },
        "data": {"train": [{"path": "none"}], "seq_len": shape.seq_len},
        "train": {"steps": 1_000_000, "global_batch_size": shape.batch_size, "micro_batch_size": shape.batch_size},
        "optim": {"lr": LEARNING_RATE, "schedule": "constant"},
    }
    for section, keys in (changes or {}).items():
        sections[section] = {**sections.get(section, {}), **keys}
    return RunConfig.model_validate({"name": "benchmark", **sections})


def as_batch(tokens: Tensor) -> Batch:
    """Each token predicts the next one."""
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    return Batch(tokens[:, :-1], positions, labels_BS=tokens[:, 1:])


def engine_loop(shape: Shape, device: torch.device, steps: int, precision: str) -> Measurement:
    """Our engine on batches that are there already."""
    engine = TorchEngine(gpt2_run(shape, {"train": {"precision": precision}}), device)
    batches = [[as_batch(tokens)] for tokens in random_tokens(shape, steps)]
    numbers, now = count(1), clock(device)

    def run() -> float:
        started = now()
        for batch in batches:
            engine.train_step(next(numbers), batch, LEARNING_RATE)
        return steps * shape.tokens_per_step / (now() - started)

    return run


Loss = Callable[[nn.Module, Tensor], Tensor]


def plain_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens[:, :-1], tokens[:, 1:])


def hugging_face_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens[:, :-1], labels=tokens[:, :-1]).loss


def bare_loop(
    model: nn.Module, loss_of: Loss, shape: Shape, device: torch.device, steps: int, *, autocast: bool = False
) -> Measurement:
    """Forward, backward, clip, fused AdamW: what a training step is without any framework."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    batches, now = random_tokens(shape, steps), clock(device)

    def run() -> float:
        started = now()
        for tokens in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = loss_of(model, tokens.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        return steps * shape.tokens_per_step / (now() - started)

    return run


def hugging_face_trainer(shape: Shape, device: torch.device, steps: int) -> Measurement:
    """transformers.Trainer with its own loader; the time between its first and last step, set-up left out."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rows = torch.cat(random_tokens(shape, steps + 1))[:, :-1]
    samples = [{"input_ids": row, "labels": row} for row in rows]
    model, now = hugging_face_gpt2(shape), clock(device)

    class StepTimes(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(now())

    def run() -> float:
        times = StepTimes()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=steps + 1, per_device_train_batch_size=shape.batch_size,
                learning_rate=LEARNING_RATE, optim="adamw_torch_fused", logging_strategy="no", save_strategy="no",
                report_to=[], disable_tqdm=True, use_cpu=device.type == "cpu",
            )  # fmt: skip
            trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[times])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return steps * shape.tokens_per_step / (times.ends[-1] - times.ends[0])

    return run

"""A LoRA on all linears of a Llama, beside PEFT in HF Trainer: tokens per second, and memory beyond what is imported.

Each measurement is a process of its own, so that a peak is that of one contender.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.schema import RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from tests.benchmarks.measuring import Measurement, Options, Row, Table, measure
from tests.benchmarks.peer_models import Shape, random_tokens
from tests.benchmarks.step import LEARNING_RATE, OURS, as_batch, clock
from tests.support.readers import PEFT

SMALL = Shape(num_layers=4, hidden_size=128, num_heads=4, vocab_size=2048, seq_len=256, batch_size=8)
LARGE = Shape(num_layers=8, hidden_size=512, num_heads=8, vocab_size=8192, seq_len=256, batch_size=8)
QUICK = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=32, batch_size=4)
SHAPES = {"small": SMALL, "large": LARGE, "quick": QUICK}
STEPS = {"small": 8, "large": 2, "quick": 2}
RANK, ALPHA = 16, 32
PEER = "PEFT in HF Trainer"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def benchmark(options: Options) -> list[Table]:
    """In fp32, in one thread on a CPU."""
    tables = []
    for name in ("quick",) if options.quick else ("small", "large"):
        figures: dict[str, list[dict[str, float]]] = {}
        contenders: dict[str, Measurement] = {OURS: partial(measured, OURS, name, figures)}
        notes = []
        if (PEFT / ".installed").is_file():
            contenders[PEER] = partial(measured, PEER, name, figures)
        else:
            notes.append("PEFT was not run: make readers installs it")
        speeds = measure(contenders, options.rounds, warm_up=0)
        memory = tuple(Row(who, tuple(each["bytes"] / 2**20 for each in figures[who])) for who in contenders)
        shape = SHAPES[name]
        sizes = f"{shape.num_layers} layers, {shape.hidden_size} wide, batch {shape.batch_size} x {shape.seq_len}"
        title = f"rank {RANK} on all linears ({sizes})"
        tables.append(Table(f"LoRA, {title}", "tokens per CPU second", "higher", OURS, speeds, tuple(notes)))
        tables.append(Table(f"Peak memory of a LoRA, {title}", "MiB", "lower", OURS, memory, tuple(notes)))
    return tables


def measured(who: str, shape: str, figures: dict[str, list[dict[str, float]]]) -> float:
    """One process that trains; returns its tokens per second."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if who == PEER:
        environment["PYTHONPATH"] = os.pathsep.join((os.environ.get("PYTHONPATH", ""), str(PEFT)))
    command = [sys.executable, "-m", "tests.benchmarks.finetuning", who, shape]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    figures.setdefault(who, []).append(found)
    return found["tokens_per_second"]


def ours(shape: Shape, steps: int) -> float:
    model: dict[str, Any] = {
        "num_layers": shape.num_layers, "hidden_size": shape.hidden_size, "num_heads": shape.num_heads,
        "vocab_size": shape.vocab_size, "max_seq_len": shape.seq_len, "ffn_hidden_size": 3 * shape.hidden_size,
    }  # fmt: skip
    config = RunConfig.model_validate({
        "name": "benchmark", "model": model, "data": {"train": [{"path": "nowhere"}], "seq_len": shape.seq_len},
        "train": {"steps": steps, "global_batch_size": shape.batch_size, "micro_batch_size": shape.batch_size},
        "finetune": {"method": "lora", "base": "nowhere", "lora": {"rank": RANK, "alpha": float(ALPHA)}},
    })  # fmt: skip
    now, ends = clock(torch.device("cpu")), []
    engine = TorchEngine(config, torch.device("cpu"))
    for step, tokens in enumerate(random_tokens(shape, steps + 1), 1):
        engine.train_step(step, [as_batch(tokens)], LEARNING_RATE)
        ends.append(now())
    return steps * shape.tokens_per_step / (ends[-1] - ends[0])


def peer(shape: Shape, steps: int) -> float:
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    now, ends = clock(torch.device("cpu")), list[float]()

    class StepTimes(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    config = LlamaConfig(
        num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size, num_attention_heads=shape.num_heads,
        vocab_size=shape.vocab_size, max_position_embeddings=shape.seq_len, intermediate_size=3 * shape.hidden_size,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )
    rows = torch.cat(random_tokens(shape, steps + 1))[:, :-1]
    samples = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps + 1, per_device_train_batch_size=shape.batch_size, learning_rate=LEARNING_RATE,
            optim="adamw_torch_fused", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[StepTimes()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return steps * shape.tokens_per_step / (ends[-1] - ends[0])


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def main(who: str, shape: str) -> None:
    torch.set_num_threads(1)
    contender = peer if who == PEER else ours
    contender(QUICK, 1)  # what is imported and made once is no part of the peak
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak counts from here on
    speed = contender(SHAPES[shape], STEPS[shape])
    print(json.dumps({"tokens_per_second": speed, "bytes": resident_bytes("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])

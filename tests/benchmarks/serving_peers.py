"""What serving is measured beside: transformers' `generate`, its continuous batching, and llama.cpp."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from tests.benchmarks.measuring import Measurement
from tests.benchmarks.step import clock
from tests.support.command import llmtrain
from tests.support.readers import GGUF

Prompts = Sequence[Sequence[int]]

PAGE = 32
"""Positions that a page of transformers' continuous batching holds."""
CHUNK = 256
"""Tokens of prompts that it takes in a step: as many as ours."""


def load_peer(folder: Path) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def generate_speed(model: Any, prompts: Prompts, new: int, together: int) -> float:
    """Prompts are padded on the left to the longest of those that go together."""
    now = clock(torch.device("cpu"))
    begin = now()
    for start in range(0, len(prompts), together):
        group = prompts[start : start + together]
        longest = max(map(len, group))
        ids = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in group])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in group])
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return len(prompts) * new / (now() - begin)


@contextmanager
def continuous_batching(folder: Path, slots: int, prompts: Prompts, new: int) -> Iterator[Measurement]:
    """Its threads and memory stay from call to call, so that a measurement has only the texts in it."""
    model = load_peer(folder)
    longest = max(map(len, prompts)) + new
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=slots * -(-longest // PAGE) + 1, max_batch_tokens=CHUNK + slots,
        max_requests_per_batch=slots, allow_block_sharing=False,
    )  # fmt: skip
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    now = clock(torch.device("cpu"))

    def speed() -> float:
        begin = now()
        texts = model.generate_batch(
            [list(prompt) for prompt in prompts], greedy, settings, persistent_manager=True, warmup=False
        )
        seconds = now() - begin
        written = sum(len(text.generated_tokens) for text in texts.values())
        assert written == len(prompts) * new, f"{written} tokens"
        return written / seconds

    yield speed
    model.destroy_cached_continuous_batching_manager()


@contextmanager
def llama_cpp(file: Path, slots: int, prompts: Prompts, new: int) -> Iterator[Measurement]:
    """Its server in a process of its own, which tells how long it computed."""
    environment = {**os.environ, "PYTHONPATH": str(GGUF)}
    job = {"file": str(file), "prompts": [list(prompt) for prompt in prompts], "new": new, "slots": slots}
    command = [sys.executable, "-P", str(Path(__file__).with_name("llama_cpp.py")), json.dumps(job)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        said, heard = process.stdout, process.stdin

        def speed() -> float:
            heard.write("go\n")
            heard.flush()
            return json.loads(next(line for line in said if line.startswith("{")))["tokens_per_second"]

        yield speed
        heard.close()


def gguf_of(folder: Path, dtype: str = "float32") -> Path | None:
    """The model of a Hugging Face folder for llama.cpp in a type of `export --dtype`; None where that is not installed.
    Its random weights make no text better or worse, so whatever rounding does to their perplexity is right."""
    if not (GGUF / ".installed").is_file():
        return None
    export = ("export", "imported", "for-llama.cpp", "--to", "gguf", "--dtype", dtype)
    for line in (("import", folder, "imported"), (*export, "--max-perplexity-increase", "1000000")):
        done = llmtrain(*line, folder=folder.parent)
        assert done.returncode == 0, done.stderr
    return next((folder.parent / "for-llama.cpp").glob("*.gguf"))

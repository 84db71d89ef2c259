"""A folder in which every verb has something to work on: texts, a tokenizer, data, a run, checkpoints, an export."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.command import Server

RUN = """\
name: tiny
model: {num_layers: 1, hidden_size: 32, num_heads: 2, max_seq_len: 32}
data:
  train: [{path: data/train}]
  valid: [{path: data/valid}]
  seq_len: 32
train: {steps: 4, global_batch_size: 4, micro_batch_size: 4}
evaluate: {every_steps: 2, steps: 1}
checkpoint: {every_steps: 2, async_save: false}
observe: {wandb: "off", tensorboard: false}
launch: {threads_per_worker: 1, max_stalled_attempts: 0, device: cpu}
"""

PIPELINE = """\
name: corpus
read: [{path: texts}]
steps: [normalize, exact_dedup]
tokenizer: tokenizer.model
run: {workers: 1}
"""

TASKS = """\
tasks:
  - {name: next, kind: cloze, data: asked.jsonl, prompt: '{text}', answer: '{word}'}
  - {name: say, kind: exact_match, data: asked.jsonl, prompt: '{text}', answer: '{word}', max_tokens: 4}
"""

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards box five dozen jugs of liquid ink"
WORDS = SENTENCE.split(" ")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "torch_dtype": "float32",
}

STEPS = (
    ("data", "tokenizer", "texts", "tokenizer.model", "--vocab-size", "300"),
    ("data", "shards", "texts", "data", "--tokenizer", "tokenizer.model", "--valid-fraction", "0.3"),
    ("train", "run.yaml"),
)


def make_good_things(server: Server, folder: Path) -> None:
    """Fill an empty folder, by the command itself where it can."""
    (folder / "texts").mkdir()
    for number in range(30):
        line = " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(60))
        (folder / "texts" / f"{number}.txt").write_text(line)
    rows = [json.dumps({"text": " ".join(WORDS[n:] + WORDS[:n])}) for n in range(len(WORDS))]
    (folder / "texts" / "more.jsonl").write_text("\n".join(rows) + "\n")
    talks = [json.dumps({"prompt": " ".join(WORDS[:n]), "completion": WORDS[n]}) for n in range(1, len(WORDS))]
    (folder / "chats.jsonl").write_text("\n".join(talks) + "\n")
    labels = [json.dumps({"text": " ".join(WORDS[n:]), "label": WORDS[n % 3]}) for n in range(len(WORDS))]
    (folder / "labels.jsonl").write_text("\n".join(labels) + "\n")
    asked = [json.dumps({"text": " ".join(WORDS[:n]), "word": WORDS[n]}) for n in range(1, len(WORDS))]
    (folder / "asked.jsonl").write_text("\n".join(asked) + "\n")
    (folder / "tasks.yaml").write_text(TASKS)
    (folder / "run.yaml").write_text(RUN)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    for arguments in STEPS:
        ending = server.run(arguments, folder, cpu_seconds=60, more_bytes=4_000_000_000)
        assert ending.code == 0, ending.output
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(LLAMA))
    save_file(_llama_tensors(), folder / "hf" / "model.safetensors", {"format": "pt"})
    (folder / "output.txt").unlink()


def _llama_tensors() -> dict[str, torch.Tensor]:
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (300, 16),
        "model.norm.weight": (16,),
        f"{layer}.input_layernorm.weight": (16,),
        f"{layer}.post_attention_layernorm.weight": (16,),
        **{f"{layer}.self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": (32, 16),
        f"{layer}.mlp.up_proj.weight": (32, 16),
        f"{layer}.mlp.down_proj.weight": (16, 32),
    }
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}

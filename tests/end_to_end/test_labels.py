"""From an encoder of tokens to a classifier, by the commands: labels, a base without a head, metrics, and an export."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.parameters import declare_parameters
from llmtrain.config.reading.load import load_config
from llmtrain.models.init import initial_tensor
from llmtrain.runs.metrics_file import read_rows
from llmtrain.values.fragment import Box
from tests.support.command import llmtrain

ENCODER = """\
name: encoder
model:
  {family: encoder, num_layers: 2, hidden_size: 64, num_heads: 4, max_seq_len: 64, position: learned, norm: layernorm,
   norm_position: post, activation: gelu, bias: true, token_types: 2, embedding_norm: true, head: mlm}
data: {train: [{path: data/train}], seq_len: 64, objective: masked}
train: {steps: 2, global_batch_size: 16, micro_batch_size: 8}
observe: {wandb: "off", tensorboard: false}
launch: {threads_per_worker: 1}
"""
CLASSIFIER = """\
base: encoder.yaml
name: classifier
model: {head: classifier}
finetune: {base: runs/encoder}
data: {objective: labels, train: [{path: labels/train}], valid: [{path: labels/valid}]}
train: {steps: 150}
optim: {lr: 1e-3}
evaluate: {every_steps: 50, steps: 10}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """An encoder of two steps, and texts whose first word says their label."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "data").symlink_to(shards / "data")
    (folder / "encoder.yaml").write_text(ENCODER, "utf-8")
    (folder / "classifier.yaml").write_text(CLASSIFIER, "utf-8")
    words = {"def": "code", "import": "use", "return": "result"}
    texts = [
        {"text": f"{word} name_{n} of {n * 7}", "label": label} for n in range(80) for word, label in words.items()
    ]
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts), "utf-8")
    for arguments in (
        ("train", "encoder.yaml"),
        ("data", "labels", "texts.jsonl", "labels", "--tokenizer", "data/tokenizer.model", "--task", "classification"),
    ):
        done = llmtrain(*arguments, folder=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_an_encoder_becomes_a_classifier(folder: Path) -> None:
    done = llmtrain("train", "classifier.yaml", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (
        "has no pooler.dense.weight, pooler.dense.bias, classifier.weight, classifier.bias: drawn by the seed"
        in done.stderr
    )
    assert "mlm.bias, mlm.dense.bias, mlm.dense.weight, mlm.norm.bias, mlm.norm.weight: of its head" in done.stderr
    assert "accuracy 1.0000, macro f1 1.0000" in done.stderr
    *_, row = [row for row in read_rows(folder / "runs" / "classifier" / "metrics.jsonl") if "valid_loss" in row]
    assert row["valid_accuracy"] == row["valid_micro_f1"] == 1.0 and "valid_perplexity" not in row
    config = load_config(folder / "runs" / "classifier" / "config.yaml", []).config
    assert config.model.labels == ("code", "result", "use")

    shown = llmtrain("data", "show", "labels/valid", "--run", "classifier.yaml", folder=folder).stdout
    label = shown.splitlines()[-1].removeprefix("<cls>: ")
    assert label in config.model.labels and {"code": "def", "use": "import", "result": "return"}[label] in shown
    refused = llmtrain("generate", "runs/classifier", "--prompt", "def", folder=folder)
    assert refused.returncode == 2 and "model.head = classifier: the model says what a text is" in refused.stderr
    out = llmtrain("export", "runs/classifier", "out", "--to", "hf", folder=folder)
    assert out.returncode == 0, out.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    with torch.no_grad():
        best = model(**tokenizer("import name_500 of 9", return_tensors="pt")).logits.argmax(-1)
    assert model.config.id2label[int(best)] == "use"
    pair = tokenizer("a b", "c d", return_tensors="pt")
    assert (
        pair["input_ids"][0, 0] == tokenizer.cls_token_id and (pair["input_ids"] == tokenizer.sep_token_id).sum() == 2
    )
    assert (
        pair["token_type_ids"][0].tolist()
        == sorted(pair["token_type_ids"][0].tolist())
        != [0] * len(pair["input_ids"][0])
    )


def test_the_head_of_a_base_without_one_is_drawn_by_name_and_index(folder: Path) -> None:
    options = (
        "name=none",
        "train.steps=1",
        "optim.lr=1e-30",
        "optim.min_lr=0",
        "evaluate.every_steps=0",
        "optim.weight_decay=0",
    )
    done = llmtrain("train", "classifier.yaml", *options, folder=folder)
    assert done.returncode == 0, done.stderr
    config = load_config(folder / "runs" / "none" / "config.yaml", []).config
    saved = open_checkpoint(folder / "runs" / "none" / "checkpoints" / "step-00000001")
    base = open_checkpoint(folder / "runs" / "encoder" / "checkpoints" / "step-00000002")
    for name, declared in declare_parameters(config.model).items():
        box = Box.whole(declared.shape)
        held = base.global_shape(name, "master") is not None
        expected = base.read(name, "master", box) if held else initial_tensor(declared, config.model, config.seed)
        assert torch.allclose(saved.read(name, "master", box), expected, atol=1e-20), name


def test_wrong_settings_are_refused_before_anything_starts(folder: Path) -> None:
    options = ("name=wrong", "model.head=token_classifier", "data.seq_len=8", "--dry-run")
    done = llmtrain("train", "classifier.yaml", *options, folder=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "model.head = token_classifier (command line): the labels of labels/train are of classification" in done.stderr
    )


@pytest.mark.whole_grid
@pytest.mark.parametrize(
    ("preset", "kind", "task"),
    [("classification", "classes", "classification"), ("tagging", "tags", "tagging"), ("qa", "answers", "qa")],
)
def test_presets_run_on_the_data_that_is_made_for_them(folder: Path, preset: str, kind: str, task: str) -> None:
    script = Path(__file__).parents[2] / "docs" / "examples" / "code_texts.py"
    texts = sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))
    subprocess.run([sys.executable, script, kind, f"{kind}.jsonl", *texts], cwd=folder, check=True)
    made = ("data", "labels", f"{kind}.jsonl", kind, "--tokenizer", "data/tokenizer.model", "--task", task)
    sources = f"data: {{train: [{{path: {kind}/train}}], valid: [{{path: {kind}/valid}}], seq_len: 64}}\n"
    begin = (
        f"base: [encoder.yaml, 'llmtrain:finetune/{preset}.yaml']\nname: {preset}\nfinetune: {{base: runs/encoder}}\n"
    )
    (folder / f"{preset}.yaml").write_text(f"{begin}{sources}train: {{steps: null, epochs: 1}}\n", "utf-8")
    drop = ("--max-tokens", "64", "--too-long", "drop")
    for arguments in (
        (*made, *drop),
        ("train", f"{preset}.yaml", "evaluate.every_steps=1", "checkpoint.every_steps=1"),
    ):
        done = llmtrain(*arguments, folder=folder)
        assert done.returncode == 0, done.stderr
    metric = load_config(folder / f"{preset}.yaml").config.evaluate.metric
    evaluations = [row for row in read_rows(folder / f"runs/{preset}/metrics.jsonl") if f"valid_{metric}" in row]
    assert evaluations and f"validation {metric.replace('_', ' ')}" in done.stderr

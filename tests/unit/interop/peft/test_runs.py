"""Runs to adapters' folders and back, as a user calls it: `llmtrain export --to peft`, `--to hf`, `llmtrain import`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.saved_run import saved_finetune
from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.cli.app import app
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.errors import ConfigError
from llmtrain.finetune.base_weights import BaseWeights
from llmtrain.finetune.rounding import rounding_error
from llmtrain.infer.model import find_checkpoint_model, logits_of
from llmtrain.interop.peft.writing import TrainedAdapter
from llmtrain.interop.proof import load_theirs, their_inputs
from llmtrain.values.fragment import Box, Fragment
from tests.support.datasets import UNREAD_TOKENIZER, random_documents, write_dataset
from tests.support.samples import tiny_run
from tests.support.small_runs import rows_of, small_run, train_here
from tests.unit.interop.models import random_example
from tests.unit.interop.peft.adapters import MODELS, adapted_logits, held_by, random_adapter, write_base

CPU = torch.device("cpu")
LORA = {"method": "lora", "lora": {"rank": 4, "alpha": 8}}
Cut = Callable[[torch.Tensor], int]


def fragments(adapter: TrainedAdapter, parts: int) -> Iterator[list[Fragment]]:
    """What so many ranks would hold of all weights: rows of every tensor, and of one row all of it on the first."""
    held: list[list[Fragment]] = [[] for _ in range(parts)]
    for name, tensor in held_by(adapter).items():
        size = -(-len(tensor) // parts)
        for rank, start in enumerate(range(0, len(tensor), size)):
            piece = tensor[start : start + size]
            box = Box((start, *[0] * (tensor.dim() - 1)), tuple(piece.shape))
            held[rank].append(Fragment(name, "master", tuple(tensor.shape), box, piece))
    yield from held


def write_run(path: Path, adapter: TrainedAdapter, tokenizer: Path, parts: int = 1) -> Path:
    """A run folder with one checkpoint, as so many ranks would save it."""
    config = tiny_run(adapter.model).with_keys({"finetune": adapter.finetune})
    objective = {"bert": "masked", "t5": "span_corruption"}.get(adapter.family.config_class.model_type)
    if objective:
        special = {"mask": 4, "pad": 0, "sentinels": list(range(290, 300))}
        needed = {"masked": ("mask",), "span_corruption": ("pad", "sentinels")}[objective]
        data = {"objective": objective, "special_tokens": {key: special[key] for key in needed}}
        config = config.with_keys({"data": config.data.with_keys(data)})
    state = {"train": {"step": 40, "samples": 160, "tokens": 5120}, "engine": {}}
    unfinished = start_checkpoint(path / "checkpoints", 40)
    written = [write_rank_files(unfinished, rank, held) for rank, held in enumerate(fragments(adapter, parts))]
    publish(unfinished, written, Contents(40, state, to_yaml(config), {}), lambda: None)
    (path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return path


def call(*arguments: str | Path) -> tuple[int, str]:
    """Exit code, and all that is printed; an error as a text."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception
    code = getattr(error, "exit_code", result.exit_code)
    return code, result.output + (str(error) if error and not isinstance(error, SystemExit) else "")


@pytest.fixture(scope="session")
def model_file(small_tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of that tokenizer."""
    return next(tmp_path_factory.getbasetemp().glob("tokenizer*/tokenizer.model"))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_every_layout_of_a_checkpoint_gives_the_same_bytes(tmp_path: Path, model_file: Path, name: str) -> None:
    adapter = random_adapter(name, LORA)
    files = []
    for parts in (1, 2, 3):
        run = write_run(tmp_path / f"run-{parts}", adapter, model_file, parts)
        code, said = call("export", run, tmp_path / f"out-{parts}", "--to", "peft", "--base", "our-base")
        assert code == 0, said
        folder = tmp_path / f"out-{parts}"
        files.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert files[0] == files[1] == files[2] and len(files[0]) == 3
    assert b"our-base" in files[0]["README.md"] and b"5,120" in files[0]["README.md"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_an_adapter_and_its_base_become_a_run_that_computes_the_same(
    tmp_path: Path, model_file: Path, name: str
) -> None:
    """What is drawn for a finetuning that begins there is not drawn: the adapter has it."""
    adapter, example = random_adapter(name, LORA), random_example(MODELS[name])
    run = write_run(tmp_path / "run", adapter, model_file)
    base = write_base(tmp_path / "base", name)
    assert call("export", run, tmp_path / "adapter", "--to", "peft")[0] == 0
    code, said = call("import", tmp_path / "adapter", tmp_path / "imported", "--base", base)
    assert code == 0, said
    trained = find_checkpoint_model(tmp_path / "imported").read(CPU)
    wanted = adapted_logits(adapter.source, adapter.model, adapter.finetune, example)
    with torch.no_grad():
        assert torch.equal(logits_of(trained.model, example), wanted)
    checkpoint = find_checkpoint(tmp_path / "imported")
    assert saved_finetune(checkpoint) == adapter.finetune.with_keys({"lora.targets": ("attention", "mlp")})
    begins = BaseWeights(checkpoint, tiny_run(adapter.model).with_keys({"finetune": adapter.finetune}))
    for key, tensor in held_by(adapter).items():
        if "lora" in key:
            assert torch.equal(begins.read(key, "master", Box.whole(tensor.shape)), tensor)


def test_merged_it_is_a_plain_model_and_the_card_says_what_rounding_has_eaten(tmp_path: Path, model_file: Path) -> None:
    adapter, example = random_adapter("llama", LORA), random_example(MODELS["llama"])
    run = write_run(tmp_path / "run", adapter, model_file)
    code, said = call("export", run, tmp_path / "out", "--to", "hf")
    assert code == 0, said
    with torch.no_grad():
        theirs = load_theirs(tmp_path / "out", MODELS["llama"])(**their_inputs(example)).logits
    ours = adapted_logits(adapter.source, adapter.model, adapter.finetune, example)
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert "low-rank updates in fp32; rounding to float32 has changed the updates by 0.00%" in (
        tmp_path / "out/README.md"
    ).read_text("utf-8")


def shrunk(adapter: TrainedAdapter, factor: float) -> TrainedAdapter:
    """The same adapter with smaller updates."""
    for name, tensor in held_by(adapter).items():
        if name.endswith("lora_b"):
            tensor.mul_(factor)
    return adapter


def test_small_updates_are_lost_in_bf16_and_said_to_be(tmp_path: Path, model_file: Path) -> None:
    """The smaller they are beside the weights, the more; in fp32 they are there."""
    errors = {}
    for factor in (10.0, 1.0, 0.1, 0.01):
        adapter = shrunk(random_adapter("llama", LORA), factor)
        errors[factor] = rounding_error(adapter.source, adapter.model, adapter.finetune, torch.bfloat16)
        exact = rounding_error(adapter.source, adapter.model, adapter.finetune, torch.float32)
        assert exact < 1e-3 * errors[factor]
    assert list(errors.values()) == sorted(errors.values()) and errors[10.0] < 0.1 and errors[0.01] > 0.5
    nothing = shrunk(random_adapter("llama", LORA), 0.0)
    assert rounding_error(nothing.source, nothing.model, nothing.finetune, torch.bfloat16) == 0.0
    run = write_run(tmp_path / "run", shrunk(random_adapter("llama", LORA), 0.01), model_file)
    code, said = call("export", run, tmp_path / "out", "--dtype", "bfloat16")
    assert code == 1 and "--max-rounding = 0.1" in said and "--to peft" in said
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_experts_is_measured_expert_by_expert() -> None:
    adapter = random_adapter("mixtral", LORA)
    error = rounding_error(adapter.source, adapter.model, adapter.finetune, torch.bfloat16)
    lost = whole = 0.0
    for linear, (a, b) in adapter.pairs().items():
        name = linear if linear in held_by(adapter) else f"{linear}.weight"
        weight, update = held_by(adapter)[name], adapter.finetune.lora.scale * (b @ a)
        rounded = (weight + update).bfloat16().double() - weight.bfloat16().double()
        lost += float((rounded - update).square().sum())
        whole += float(update.square().sum())
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("finetune", "arguments", "code", "says"),
    [
        ({"method": "full"}, ["--to", "peft"], 2, "the whole model was trained"),
        ({"method": "adapter"}, ["--to", "peft"], 2, "PEFT has no bottlenecks"),
        ({"method": "adapter"}, ["--to", "hf"], 2, "Try --to adapterhub"),
        ({"method": "prompt"}, [], 2, "Try --to peft"),
        (LORA, ["--to", "adapterhub"], 2, "Try --to peft"),
        (LORA, ["--to", "peft", "--tokenizer", "x"], 2, "--tokenizer: goes with --to hf"),
        (LORA, ["--to", "peft", "--proof", "full"], 2, "--proof: goes with --to hf"),
        (LORA, ["--base", "x"], 2, "goes with --to peft"),
        (LORA, ["--to", "peft", "--family", "gpt2"], 2, "No Hugging Face family"),
    ],
)
def test_exports_that_are_refused(
    tmp_path: Path, model_file: Path, finetune: dict[str, Any], arguments: list[str], code: int, says: str
) -> None:
    run = write_run(tmp_path / "run", random_adapter("llama", finetune), model_file)
    found = call("export", run, tmp_path / "out", *arguments)
    assert found[0] == code and says in found[1], found
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize(
    ("finetune", "to"), [({"method": "adapter", "adapter": {"size": 5}}, "adapterhub"), ({"method": "prompt"}, "peft")]
)
def test_bottlenecks_and_prompts_are_written_too(
    tmp_path: Path, model_file: Path, finetune: dict[str, Any], to: str
) -> None:
    run = write_run(tmp_path / "run", random_adapter("llama", finetune), model_file)
    code, said = call("export", run, tmp_path / "out", "--to", to, "--json", "--dtype", "bfloat16")
    assert code == 0, said
    told = json.loads(said)
    assert told["format"] == to and 0 < told["max_relative_difference_read_again"] < 0.01
    assert (tmp_path / "out/adapter_config.json").is_file()


def test_only_an_adapter_is_replaced(tmp_path: Path, model_file: Path) -> None:
    run = write_run(tmp_path / "run", random_adapter("llama", LORA), model_file)
    export = ("export", run, tmp_path / "out", "--to", "peft")
    assert call(*export)[0] == 0
    assert "--overwrite" in call(*export)[1]
    assert call(*export, "--overwrite")[0] == 0
    (tmp_path / "out/adapter_config.json").unlink()
    assert "is no export to peft" in call(*export, "--overwrite")[1]


def test_imports_say_what_they_need(tmp_path: Path, model_file: Path) -> None:
    run = write_run(tmp_path / "run", random_adapter("llama", LORA), model_file)
    assert call("export", run, tmp_path / "adapter", "--to", "peft", "--base", "org/base")[0] == 0
    code, said = call("import", tmp_path / "adapter", tmp_path / "out")
    assert code == 2 and "'org/base'" in said and "--base FOLDER" in said
    base = write_base(tmp_path / "gpt2", "gpt2")
    code, said = call("import", tmp_path / "adapter", tmp_path / "out", "--base", base)
    assert code == 3 and "another base" in said
    code, said = call("import", base, tmp_path / "out", "--base", base)
    assert code == 2 and "holds no adapter_config.json" in said
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_a_run_goes_on_training_an_imported_adapter(tmp_path: Path, model_file: Path) -> None:
    """Its first evaluation, of weights that have hardly moved, is the adapter's, which is not the base's."""
    adapter = random_adapter("llama", LORA)
    run, base = write_run(tmp_path / "run", adapter, model_file), write_base(tmp_path / "base", "llama")
    assert call("export", run, tmp_path / "adapter", "--to", "peft")[0] == 0
    assert call("import", tmp_path / "adapter", tmp_path / "imported", "--base", base)[0] == 0
    assert call("import", base, tmp_path / "plain")[0] == 0
    for name, seed in (("train", 0), ("valid", 1)):
        shards = [random_documents(100, seed)]
        write_dataset(tmp_path / name, shards, tokenizer=UNREAD_TOKENIZER, vocab_size=adapter.model.vocabulary)
    losses = {}
    for name in ("imported", "plain"):
        finetune = adapter.finetune.with_keys({"base": str(tmp_path / name)})
        settings = {"train": {"steps": 1}, "evaluate": {"every_steps": 1}, "optim": {"lr": 1e-9, "min_lr": 0.0}}
        config = small_run(tmp_path, **settings).with_keys({"model": adapter.model, "finetune": finetune, "name": name})
        assert train_here(config) == 0
        losses[name] = next(row["valid_loss"] for row in rows_of(config) if "valid_loss" in row)
        checkpoint = find_checkpoint(config.run_dir)
        trained = {tensor.name for tensor in checkpoint.tensors() if tensor.kind == "master"}
        assert trained == {f"{linear}.lora_{which}" for linear in adapter.pairs() for which in "ab"}
    assert abs(losses["imported"] - losses["plain"]) > 1e-3
    other = adapter.finetune.with_keys({"base": str(tmp_path / "imported"), "lora.rank": 5})
    with pytest.raises(ConfigError, match="Train it on with the same section finetune"):
        train_here(small_run(tmp_path).with_keys({"model": adapter.model, "finetune": other, "name": "other"}))
    assert call("export", tmp_path / "runs/imported", tmp_path / "again", "--to", "peft")[0] == 0
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.allclose(first[name], again[name], atol=1e-7) for name in first)

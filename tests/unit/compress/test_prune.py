"""Pruned models as folders that runs begin from: proved, measured, and the same numbers in transformers."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from llmtrain.checkpoint.find import open_newest
from llmtrain.checkpoint.pruned import PRUNED, pruning_record
from llmtrain.checkpoint.saved_run import saved_architecture
from llmtrain.checkpoint.start_folder import write_start_folder
from llmtrain.cli.app import app
from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.prune import Pruned, prune
from llmtrain.compress.pruning_plan import PruningSettings
from llmtrain.compress.smaller import SmallerModel
from llmtrain.compress.source import open_source
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import num_parameters, parameter_shapes
from llmtrain.config.reading.rendering import plain_yaml
from llmtrain.errors import CheckpointError, ConfigError, ExportError
from llmtrain.infer.hugging_face import export_checkpoint, folder_special_tokens, start_config
from llmtrain.infer.model import checkpoint_tensors
from llmtrain.infer.tokenizer import FolderTokenizer
from llmtrain.interop.hf_export import ExportSettings
from llmtrain.values.fragment import Fragment
from llmtrain.values.tokenizer import Tokenizer
from tests.unit.compress.quantized import digest
from tests.unit.interop.models import BERT, GPT2, LLAMA, MIXTRAL, SWITCH, T5, T5_V11, random_model

NAMED = {"llama": LLAMA, "gpt2": GPT2, "mixtral": MIXTRAL, "bert": BERT, "t5": T5, "t5 v1.1": T5_V11, "switch": SWITCH}
CLASSES = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, "encoder_decoder": AutoModelForSeq2SeqLM}
REFUSED = {
    **dict.fromkeys([("t5", "heads"), ("t5 v1.1", "heads"), ("switch", "heads")], "gives each head its own positions"),
    **dict.fromkeys([("mixtral", "ffn"), ("switch", "ffn")], "the model has experts"),
    ("switch", "layers"): "one layer in 2 has experts",
}
HERE_ONLY = {("gpt2", "heads"), ("bert", "heads")}
"""What transformers' classes cannot have: heads that do not fill the width of the model."""
QUICK = {
    ("llama", "heads"),
    ("llama", "2:4"),
    ("gpt2", "ffn"),
    ("mixtral", "weights"),
    ("bert", "layers"),
    ("t5", "ffn"),
}
GRID = [
    pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.whole_grid)
    for name in NAMED
    for kind in ("weights", "2:4", "heads", "ffn", "layers")
    if (name, kind) not in REFUSED.keys() | HERE_ONLY
]


def folder_of(config: ModelConfig, tokenizer: Tokenizer, out: Path) -> Path:
    """A run folder with random weights, as if they had been imported."""
    kept = FolderTokenizer(tokenizer.path.name, tokenizer.path.read_bytes(), tokenizer.roles, tokenizer, ())
    weights = random_model(config).named_parameters()
    fragments: Iterator[Fragment] = (Fragment.whole(name, "master", weight.detach()) for name, weight in weights)
    said = start_config(config, tokenizer)
    if config.family == "encoder_decoder":  # so small a tokenizer has no sentinels
        said["data"] = {"objective": "prefix", "special_tokens": folder_special_tokens(config, tokenizer)}
    write_start_folder(out, fragments, plain_yaml(said), {"imported": "random", **kept.about()}, kept.write)
    return out


def pruned(source: Path, out: Path, text: Path, kind: str, **asked) -> Pruned:
    whole = {"evaluate": str(text), "samples": 8, **asked}
    return prune(open_source(source, None), out, PruningSettings(kind, **whole), lambda said: None)


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_it_exports_with_the_same_logits(name, kind, small_tokenizer, text_file, tmp_path):
    method = {"method": "wanda", "calibrate": str(text_file)} if kind in ("2:4", "ffn", "layers") else {}
    done = pruned(folder_of(NAMED[name], small_tokenizer, tmp_path / "in"), tmp_path / "out", text_file, kind, **method)
    assert done.notes == () and done.max_difference <= 1e-4
    checkpoint, export = export_checkpoint(tmp_path / "out", tmp_path / "hf", None, ExportSettings(dtype="float32"))
    assert export.proof.max_difference <= 1e-4 and export.proof.num_greedy_tokens > 0
    told = f"{kind} by {method.get('method', 'magnitude')}; perplexity {done.before:.4f} before, {done.after:.4f} after"
    assert f"| Pruned | {told}: " in (tmp_path / "hf/README.md").read_text("utf-8")
    record = checkpoint.about[PRUNED]
    assert (record["perplexity_before"], record["perplexity_after"]) == (done.before, done.after)
    theirs = CLASSES[NAMED[name].family].from_pretrained(tmp_path / "hf")
    assert saved_architecture(checkpoint) == done.model
    assert theirs.num_parameters() == done.parameters == num_parameters(done.model)
    if kind in ("weights", "2:4"):
        assert done.model == NAMED[name] and done.zeros == pytest.approx(0.5, abs=0.01)
    else:
        assert done.parameters < done.parameters_before and done.zeros == 0


@pytest.mark.parametrize(("name", "kind"), sorted(REFUSED))
def test_what_cannot_be_left_out_is_refused_by_name(name, kind, small_tokenizer, text_file, tmp_path):
    folder_of(NAMED[name], small_tokenizer, tmp_path / "in")
    with pytest.raises(ConfigError, match=REFUSED[name, kind]):
        pruned(tmp_path / "in", tmp_path / "out", text_file, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("name", "kind"), sorted(HERE_ONLY))
def test_what_no_class_of_transformers_has_is_told(name, kind, small_tokenizer, text_file, tmp_path):
    done = pruned(folder_of(NAMED[name], small_tokenizer, tmp_path / "in"), tmp_path / "out", text_file, kind)
    assert "`llmtrain export` will refuse it" in done.notes[0] and "head_dim" in done.notes[0]
    with pytest.raises(ConfigError, match="No Hugging Face family"):
        export_checkpoint(tmp_path / "out", tmp_path / "hf", None, ExportSettings())


def test_an_export_is_pruned_as_its_run_is_and_to_the_same_bytes(small_tokenizer, text_file, tmp_path):
    folder_of(LLAMA, small_tokenizer, tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "hf", None, ExportSettings(dtype="float32"))
    one, two, three = (
        pruned(tmp_path / source, tmp_path / out, text_file, "heads")
        for source, out in (("in", "one"), ("in", "two"), ("hf", "three"))
    )
    assert digest(one.checkpoint) == digest(two.checkpoint) and one.model == three.model
    first, third = (
        checkpoint_tensors(open_newest(path), one.model, torch.float32) for path in (one.checkpoint, three.checkpoint)
    )
    assert all(torch.equal(first(name), third(name)) for name in parameter_shapes(one.model))


def test_a_part_in_a_wrong_place_is_caught(small_tokenizer, text_file, tmp_path, monkeypatch):
    def shifted(self, larger):
        read = cut(self, larger)
        return lambda name, expert=None: read(name).roll(1, 0) if name.endswith("mlp.up.weight") else read(name)

    cut = SmallerModel.cut
    monkeypatch.setattr(SmallerModel, "cut", shifted)
    folder_of(LLAMA, small_tokenizer, tmp_path / "in")
    with pytest.raises(ExportError, match="gives other logits than the model without what was pruned"):
        pruned(tmp_path / "in", tmp_path / "out", text_file, "ffn")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("bound", "fits"), [(None, True), (0.5, True), (0.1, False)])
def test_a_perplexity_that_grows_too_much_gets_no_name(bound, fits, small_tokenizer, text_file, tmp_path, monkeypatch):
    measured = iter((10.0, 12.0))
    monkeypatch.setattr(LayeredModel, "perplexity", lambda model, batches: next(measured))
    folder_of(LLAMA, small_tokenizer, tmp_path / "in")
    if not fits:
        with pytest.raises(ExportError, match=r"--max-perplexity-increase 0\.1: .*\+20\.00%\. Nothing is written"):
            pruned(tmp_path / "in", tmp_path / "out", text_file, "ffn", max_increase=bound)
    else:
        assert pruned(tmp_path / "in", tmp_path / "out", text_file, "ffn", max_increase=bound).after == 12.0
    assert (tmp_path / "out").exists() == fits


@pytest.mark.parametrize(("numbers", "when"), [((math.inf,), "before"), ((10.0, math.inf), "after")])
def test_a_perplexity_that_is_no_number_gets_no_name(numbers, when, small_tokenizer, text_file, tmp_path, monkeypatch):
    measured = iter(numbers)
    monkeypatch.setattr(LayeredModel, "perplexity", lambda model, batches: next(measured))
    folder_of(LLAMA, small_tokenizer, tmp_path / "in")
    with pytest.raises(ExportError, match=f"The perplexity {when} pruning is no number"):
        pruned(tmp_path / "in", tmp_path / "out", text_file, "ffn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [{"perplexity_after": "low"}, {"targets": 0}, {"kind": 4}])
def test_a_damaged_record_of_pruning_is_refused_by_key(damage):
    whole = {"kind": "ffn", "method": "wanda", "perplexity_before": 10.0, "perplexity_after": 12.5, "targets": 1000}
    record = pruning_record(Path("step-0"), {PRUNED: whole})
    assert record and record.told() == "ffn by wanda; perplexity 10.0000 before, 12.5000 after: +25.00%, 1,000 targets"
    with pytest.raises(CheckpointError, match=rf"step-0: the manifest's about\.pruned: {next(iter(damage))} = "):
        pruning_record(Path("step-0"), {PRUNED: {**whole, **damage}})


@pytest.mark.parametrize(
    ("kind", "asked", "says"),
    [
        ("ffn", {"calibrate": "x"}, "goes with --method wanda"),
        ("ffn", {"keep": ("mlp",)}, "--keep: goes with --prune weights and 2:4"),
        ("2:4", {"sparsity": 0.6}, r"--sparsity 0\.6: of 2:4 it is 0\.5"),
        ("ffn", {"evaluate": None}, "--evaluate: is needed"),
        ("weights", {"method": "wanda"}, "--calibrate: is needed"),
    ],
)
def test_wrong_values(kind, asked, says, small_tokenizer, text_file, tmp_path):
    folder_of(LLAMA, small_tokenizer, tmp_path / "in")
    with pytest.raises(ConfigError, match=says):
        pruned(tmp_path / "in", tmp_path / "out", text_file, kind, **asked)


def test_routers_with_biases_are_refused(small_tokenizer, text_file, tmp_path):
    folder_of(MIXTRAL.with_keys({"moe.bias_update_rate": 0.01}), small_tokenizer, tmp_path / "in")
    with pytest.raises(ConfigError, match=r"bias_update_rate = 0\.01"):
        pruned(tmp_path / "in", tmp_path / "out", text_file, "layers")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scheme", "w8a16", "--prune", "ffn"], "--scheme or --prune: one of them, not both"),
        (["--prune", "ffn", "--group", "8"], "--group: goes with --scheme, and has no effect with --prune"),
        (["--scheme", "w8a16", "--sparsity", "0.5"], "--sparsity: goes with --prune"),
        (["--sparsity", "0.5"], "--sparsity: goes with --prune, and has no effect without it"),
        (
            ["--prune", "ffn", "--method", "gptq"],
            "--method gptq: goes with --scheme. Of --prune try magnitude or wanda",
        ),
        (["--scheme", "w4a16", "--method", "wanda"], "--method wanda: goes with --prune"),
    ],
)
def test_options_of_the_other_way_to_compress(options, says, tmp_path):
    done = CliRunner().invoke(app, ["compress", "in", str(tmp_path / "out"), *options])
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output

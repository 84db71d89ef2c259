"""Quantized models load in transformers with the numbers that llmtrain reads; what is not so gets no name."""

import json
import math
import resource
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, product

import pytest
import torch

from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.quantize import Compression, compress
from llmtrain.compress.source import open_source
from llmtrain.errors import ConfigError, ExportError
from llmtrain.interop.compressed import tensors
from llmtrain.interop.compressed.choice import choose
from llmtrain.interop.hf import family_for, hf_config
from llmtrain.interop.hf_export import DTYPES, ExportSettings
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.name_table import pairings
from llmtrain.interop.proof import AUTO_CLASSES
from llmtrain.interop.text.special_tokens import named_tokens
from llmtrain.models.head import Objective
from llmtrain.models.transformer import chosen_from
from llmtrain.values.quantization import round_to_nearest
from tests.support.hf_folders import write_t5
from tests.support.mortality import die_at, in_child, on_file_operations
from tests.unit.compress.quantized import digest, quantize, random_text, source_of
from tests.unit.interop.models import (
    BERT,
    GPT2,
    LLAMA,
    MIXTRAL,
    MODELS,
    SWITCH,
    T5,
    T5_V11,
    random_model,
)

NAMED = {"llama": LLAMA, "gpt2": GPT2, "mixtral": MIXTRAL, "bert": BERT, "t5": T5, "switch": SWITCH, "t5 v1.1": T5_V11}
SCHEMES = ("w8a16", "w4a16", "w8a8")
REFUSED = {("gpt2", "w8a8"), ("mixtral", "w8a8"), ("switch", "w8a8")}
QUICK = {
    ("llama", "w4a16", "bfloat16"),
    ("llama", "w8a8", "float32"),
    ("gpt2", "w8a16", "bfloat16"),
    ("mixtral", "w8a16", "bfloat16"),
    ("bert", "w8a8", "float16"),
    ("t5", "w4a16", "bfloat16"),
}
GRID = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.whole_grid)
    for case in product(NAMED, SCHEMES, DTYPES)
    if case[:2] not in REFUSED
]


@pytest.mark.parametrize(("name", "scheme", "dtype"), GRID)
def test_transformers_computes_what_was_promised(name, scheme, dtype, small_tokenizer, text_file, tmp_path):
    model, stored_as = random_model(NAMED[name]), DTYPES[dtype]
    done = quantize(model, small_tokenizer, tmp_path / "out", text_file, scheme, dtype=dtype)
    proof = done.export.proof
    assert proof.unread is None and proof.num_tokens > 50
    if scheme != "w8a8":
        assert proof.max_difference <= 1e-4 and proof.num_greedy_tokens > 0
    folder = open_hf_folder(tmp_path / "out")
    assert bool(folder.rounded_inputs) == (scheme == "w8a8")
    # What stays is there bit for bit, and what was quantized is what rounding gives.
    choice = choose(model.config, folder.family, scheme, 16 if scheme == "w4a16" else None, ())
    for key, parameter in model.named_parameters():
        expected = parameter.detach().to(stored_as).float()
        if choice.is_quantized(key):
            flat = parameter.detach().flatten(0, -2)
            made = round_to_nearest(flat, choice.form.grid(flat.shape[1]), stored_as)
            expected = made.dequantized().view_as(expected)
            assert key in folder.quantized
            stored = [
                folder.whole_numbers(key, each) for each in (range(len(expected)) if expected.dim() > 2 else [None])
            ]
            assert torch.equal(torch.cat([each.numbers_OI for each in stored]), made.numbers_OI), key
            assert torch.equal(torch.cat([each.scale_OG for each in stored]), made.scale_OG.float()), key
        assert torch.equal(folder.tensor(key), expected), key


OWN_TYPE = [pytest.param(name, marks=() if name in ("gpt2", "mixtral") else pytest.mark.whole_grid) for name in NAMED]


@pytest.mark.parametrize("name", OWN_TYPE)
def test_transformers_computes_it_in_its_own_type(name, small_tokenizer, text_file, tmp_path):
    """As most people load it: everything in bfloat16, which rounds what each layer computes to 8 bits."""
    out = tmp_path / "out"
    quantize(random_model(NAMED[name]), small_tokenizer, out, text_file, "w8a16", dtype="bfloat16")
    example = random_text(NAMED[name])
    given = {"input_ids": example.tokens_BS}
    if example.encoder_tokens_BT is not None:
        given = {"input_ids": example.encoder_tokens_BT, "decoder_input_ids": example.tokens_BS}
    family = AUTO_CLASSES[NAMED[name].family]
    wide, narrow = (family.from_pretrained(out, dtype=dtype).eval() for dtype in ("float32", "auto"))
    assert {weight.dtype for weight in narrow.parameters() if weight.is_floating_point()} == {torch.bfloat16}
    with torch.no_grad():
        expected, found = (model(**given).logits.float() for model in (wide, narrow))
    # Of what bf16 rounds; and it may tip the choice between two experts, at a position or two.
    assert (found - expected).square().median() < 1e-2 * expected.square().median()


@pytest.mark.parametrize("keep", [(), ("attention.q",)], ids=["none", "queries"])
@pytest.mark.parametrize("name", [name for name in NAMED if name != "gpt2"])  # its modules are no linears
def test_ignored_are_the_linears_of_transformers_that_are_not_quantized(name, keep, small_tokenizer):
    """One that is in neither list would be taken for a quantized one."""
    model, family = NAMED[name], family_for(NAMED[name])
    table, choice = family.tables_for(model)[0], choose(model, family, "w8a16", None, keep)
    with torch.device("meta"):
        theirs = AUTO_CLASSES[model.family].from_config(hf_config(model, named_tokens(small_tokenizer)))
    linears = {place for place, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = (pairing.theirs for pairing in pairings(table, model) if choice.is_quantized(pairing.ours[0]))
    ignored = set(choice.ignored(table, model))
    assert linears - {name.removesuffix(".weight") for name in chosen} == ignored & linears
    # Of Mixtral's routers the files' name: its class has another, and no linears there; other readers have that one.
    unknown = ignored - {place for place, _ in theirs.named_modules()}
    assert all(place.endswith("block_sparse_moe.gate") for place in unknown), "a name that is none would hide a fault"


def test_samples_have_as_many_spans_as_there_are_sentinels(text_file, tmp_path):
    """Of 64 tokens T5 would take four spans."""
    source = open_source(write_t5(tmp_path / "t5"), None)
    section = source.config["data"]
    for number in (8, 3, 1):
        special = {**section["special_tokens"], "sentinels": section["special_tokens"]["sentinels"][:number]}
        told = replace(source, config={"data": {**section, "special_tokens": special}})
        (batch, *_) = told.batches("valid", "--evaluate", str(text_file), 4)
        spans = (batch.encoder_tokens_BT[0][:, None] == torch.tensor(special["sentinels"])).sum()
        assert 0 < spans <= number


@pytest.mark.parametrize("allowed", [0, 1 << 16])
def test_a_full_disk_leaves_nothing(allowed, small_tokenizer, text_file, tmp_path):
    """The kernel refuses a write in the middle: of the first file, of the weights."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, resource.RLIM_INFINITY))
        with pytest.raises(ExportError, match=r"could not be written: .*File too large"):
            quantize(random_model(LLAMA), small_tokenizer, tmp_path / "out", text_file, "w4a16")

    assert in_child(child) == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.whole_grid
def test_death_at_any_file_operation_leaves_the_old_folder_or_the_new_one(small_tokenizer, text_file, tmp_path):
    """What a killed one has left under other names, the next one does not mind."""
    model, out = random_model(LLAMA), tmp_path / "out"
    quantize(model, small_tokenizer, out, text_file, "w8a16")
    old = digest(out)
    (tmp_path / "wanted").mkdir()
    quantize(model, small_tokenizer, tmp_path / "wanted" / out.name, text_file, "w4a16")  # its card has its name
    new, seen = digest(tmp_path / "wanted" / out.name), set[str]()

    def again() -> None:
        quantize(model, small_tokenizer, out, text_file, "w4a16", overwrite=True)

    for moment in count(1):

        def dying(moment=moment) -> None:
            on_file_operations(die_at(moment))
            again()

        if in_child(dying) == 0:
            break
        assert not out.exists() or digest(out) in (old, new)
        seen.add(digest(out) if out.exists() else "between the two names")
    assert {old, new} <= seen
    again()
    assert digest(out) == new


def test_a_load_in_transformers_draws_no_bars(small_tokenizer, text_file, tmp_path, capfd):
    quantize(random_model(LLAMA), small_tokenizer, tmp_path / "out", text_file, "w4a16")
    assert "it/s" not in capfd.readouterr().err


@pytest.mark.parametrize(("name", "scheme"), sorted(REFUSED))
def test_what_a_class_of_transformers_cannot_read_is_refused_by_name(
    name, scheme, small_tokenizer, text_file, tmp_path
):
    with pytest.raises(ConfigError, match="Try w8a16"):
        quantize(random_model(NAMED[name]), small_tokenizer, tmp_path / "out", text_file, scheme)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.whole_grid)])
def test_a_proof_by_layers_and_layers_that_stay(name, small_tokenizer, text_file, tmp_path):
    keep = ("decoder.layers.1.attention.*", "attention.q")
    done = quantize(
        random_model(NAMED[name]), small_tokenizer, tmp_path / "out", text_file, "w4a16", proof="layers", keep=keep
    )
    assert done.export.proof.num_parts == 2 and done.export.proof.max_difference <= 1e-4
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"} <= set(ignored)
    assert "model.layers.0.self_attn.o_proj" not in ignored


def test_the_same_bytes_twice(small_tokenizer, text_file, tmp_path):
    model = random_model(LLAMA)
    for place in ("one", "two"):
        quantize(
            model,
            small_tokenizer,
            tmp_path / place / "out",
            text_file,
            "w4a16",
            method="gptq",
            calibrate=str(text_file),
        )
    assert digest(tmp_path / "one" / "out") == digest(tmp_path / "two" / "out")


def test_a_wrong_order_of_numbers_is_caught(small_tokenizer, text_file, tmp_path, monkeypatch):
    """Both sides of ours agree on it, so only the other program can see it."""
    pack, unpack = tensors.packed, tensors.unpacked
    monkeypatch.setattr(tensors, "packed", lambda numbers, bits: pack(numbers.flip(1), bits))
    monkeypatch.setattr(tensors, "unpacked", lambda words, bits, inputs: unpack(words, bits, inputs).flip(1))
    with pytest.raises(ExportError, match="other logits"):
        quantize(random_model(LLAMA), small_tokenizer, tmp_path / "out", text_file, "w8a16")
    assert not any(tmp_path.iterdir())


def test_inputs_that_are_not_rounded_are_caught(small_tokenizer, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtrain.compress.quantize.round_inputs", lambda model, linears: None)
    with pytest.raises(ExportError, match="other logits"):
        quantize(random_model(LLAMA), small_tokenizer, tmp_path / "out", text_file, "w8a8")


@pytest.mark.parametrize(("after", "fits"), [(10.19, True), (10.21, False), (float("nan"), False), (math.inf, False)])
def test_a_perplexity_that_grows_too_much_gets_no_name(after, fits, small_tokenizer, text_file, tmp_path, monkeypatch):
    measured = iter((10.0, after))
    monkeypatch.setattr(LayeredModel, "perplexity", lambda model, batches: next(measured))
    with nullcontext() if fits else pytest.raises(ExportError, match=r"--max-perplexity-increase 0\.02.*Nothing is"):
        quantize(random_model(BERT), small_tokenizer, tmp_path / "out", text_file, "w8a16", max_increase=0.02)
    assert any(tmp_path.iterdir()) == fits


def test_figures_are_in_the_card(small_tokenizer, text_file, tmp_path):
    done = quantize(random_model(BERT), small_tokenizer, tmp_path / "out", text_file, "w8a16", dtype="bfloat16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{done.before:.4f} before, {done.after:.4f} after" in card and "w8a16 by rtn" in card


def test_without_the_judge_it_says_so(small_tokenizer, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtrain.interop.compressed.writing.find_spec", lambda name: None)
    done = quantize(random_model(LLAMA), small_tokenizer, tmp_path / "out", text_file, "w8a16")
    assert done.export.proof.unread is not None
    assert (
        "transformers did not: compressed-tensors is not installed here" in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"scheme": "w4a16", "group": 7}, r"--group 7: does not divide the 48 inputs of .*Try 16"),
        ({"scheme": "w4a16", "group": None}, r"--group 128: does not divide the 48 inputs"),
        ({"scheme": "w8a8", "group": 16}, "goes with w8a16 and w4a16"),
        ({"scheme": "w8a16", "keep": ("mpl",)}, "fits none of the matrices"),
        ({"scheme": "w8a16", "keep": ("attention", "mlp")}, "leaves nothing"),
        ({"scheme": "w8a16", "calibrate": "x"}, "goes with --method gptq"),
        ({"scheme": "w8a16", "evaluate": None}, "--evaluate: is needed"),
    ],
)
def test_wrong_options(asked, told, small_tokenizer, text_file, tmp_path):
    whole = {"evaluate": str(text_file), **asked}
    with pytest.raises(ConfigError, match=told):
        compress(
            source_of(random_model(LLAMA), small_tokenizer),
            tmp_path / "o",
            Compression(**whole),
            ExportSettings(),
            print,
        )
    assert not any(tmp_path.iterdir())


def test_parts_of_one_matrix_are_kept_together(small_tokenizer, text_file, tmp_path):
    for model, keep in ((GPT2, "attention.q"), (MIXTRAL, "experts")):
        with pytest.raises(ConfigError, match=r"--keep: .*(keep all of them|Keep others)"):
            quantize(random_model(model), small_tokenizer, tmp_path / "out", text_file, "w8a16", keep=(keep,))


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "t5", "llama yarn", "gpt2 untied"])
def test_layer_after_layer_is_the_whole_model(name, small_tokenizer, text_file):
    model = random_model(MODELS[name])
    source = source_of(model, small_tokenizer)
    batches = source.text().batches(str(text_file), 12)
    layered = LayeredModel(model.config, source.read)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            objective = Objective(1.0, 1 << 20, chosen_from(model.config))
            total += float(model.loss(model(batch)[0], batch.labels_BS, objective, batch)[1])
            count += batch.num_valid_tokens
    assert layered.perplexity(batches) == pytest.approx(float(torch.tensor(total / count).double().exp()), rel=1e-5)
    layers = [layer for stack in layered.model.stacks for layer in stack.layers.values()]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters()), "none is kept"

"""`llmtrain export --to gguf` and `llmtrain import FILE.gguf` as a user calls them."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.model import build_from, find_checkpoint_model, find_model, logits_of
from llmtrain.interop.gguf.file_format import TensorType
from llmtrain.interop.hf_export import ExportSettings, write_export
from llmtrain.values.fragment import Box
from tests.support.readers import read_by, require_reader
from tests.unit.interop.gguf.files import without_llama_cpp
from tests.unit.interop.models import (
    GPT2,
    LLAMA,
    MIXTRAL,
    QWEN3,
    SCALING,
    model_for,
    random_example,
    random_model,
    weights_of,
)
from tests.unit.interop.test_command import CPU, DAMAGED, USAGE, _call, _json, _run_folder
from tests.unit.interop.test_readers import JOB, MODELS_READ, TEXTS

LLAMA3 = LLAMA.with_keys({"rope_scaling": SCALING})


@pytest.mark.parametrize(
    "config",
    [LLAMA3, *(pytest.param(config, marks=pytest.mark.whole_grid) for config in (MIXTRAL, QWEN3, GPT2))],
    ids=["llama3", "mixtral", "qwen3", "gpt2"],
)
def test_export_and_import(config, small_tokenizer, tmp_path, monkeypatch):
    without_llama_cpp(monkeypatch)
    run = _run_folder(tmp_path / "run", config, small_tokenizer.path)
    told = _json("export", run, tmp_path / "out", "--to", "gguf")
    assert told["proof"].startswith("not proved: llama.cpp is not installed")
    assert told["perplexity_trained"] == told["perplexity_written"]
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| Training steps | 40 |" in card and str(tmp_path) not in card

    told = _json("import", tmp_path / "out", tmp_path / "back")
    original, back = find_checkpoint_model(run).read(CPU), find_checkpoint_model(tmp_path / "back").read(CPU)
    assert all(
        torch.equal(one, other) for one, other in zip(original.model.parameters(), back.model.parameters(), strict=True)
    )
    tokenizer = back.tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == small_tokenizer.encode(text), text
    assert (tokenizer.eos_id, tokenizer.bos_ids) == (small_tokenizer.eos_id, ())
    assert back.model.config.rope_scaling == config.rope_scaling
    greedy = ("--prompt", "def a", "--temperature", "0", "--max-tokens", "5")
    answers = [_call("generate", tmp_path / place, *greedy) for place in ("out", "out/out.gguf", "back")]
    assert all(answer.exit_code == 0 for answer in answers), [answer.stderr for answer in answers]
    assert len({answer.stdout for answer in answers}) == 1, "a file in place writes what its import writes"
    asked = Request(tuple(small_tokenizer.encode("def a")), 12, Sampling(0))
    tokens = [list(iter_tokens(find_model(tmp_path / place).read(CPU), asked)) for place in ("run", "out")]
    assert tokens[0] == tokens[1] != []

    # And out again: the tokenizer is a tokenizer.json now.
    again = _json("export", tmp_path / "back", tmp_path / "again", "--to", "gguf")
    assert again["perplexity_written"] == told.get("perplexity_written", again["perplexity_trained"])


def test_a_file_in_place_is_what_its_import_is(small_tokenizer, tmp_path, monkeypatch):
    """Also over ranks, which read boxes; and a file whose tokenizer cannot be read has none."""
    without_llama_cpp(monkeypatch)
    run = _run_folder(tmp_path / "run", LLAMA3, small_tokenizer.path)
    _json("export", run, tmp_path / "out", "--to", "gguf", "--dtype", "q8_0", "--max-perplexity-increase", "1000000")
    _json("import", tmp_path / "out", tmp_path / "back")
    found, back = find_model(tmp_path / "out" / "out.gguf"), find_model(tmp_path / "back")
    for name, parameter in back.read(CPU).model.named_parameters():
        box = Box(tuple(size // 2 for size in parameter.shape), tuple(size - size // 2 for size in parameter.shape))
        assert torch.equal(found.weights.read(name, "master", box), back.weights.read(name, "master", box))
    ours, theirs = found.read(CPU).tokenizer(), back.read(CPU).tokenizer()
    assert all(ours.encode(text) == theirs.encode(text) for text in TEXTS)
    assert (ours.eos_id, ours.bos_ids) == (theirs.eos_id, theirs.bos_ids)
    assert find_model(tmp_path / "out").identity == found.identity != back.identity
    named = _call(
        "generate", tmp_path / "out", "--prompt", "a", "--max-tokens", "1", "--tokenizer", small_tokenizer.path
    )
    assert named.exit_code == 0, named.stderr
    refused = _call("generate", tmp_path / "out", "--prompt", "a", "--base", tmp_path / "back")
    assert refused.exit_code == USAGE and "needs none" in refused.stderr
    missing = _call("generate", tmp_path / "nothing.gguf", "--prompt", "a")
    assert missing.exit_code == USAGE and "no such file" in missing.stderr
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "out" / "out.gguf").read_bytes()[:4000])
    damaged = _call("generate", tmp_path / "cut.gguf", "--prompt", "a")
    assert damaged.exit_code == DAMAGED and "Traceback" not in damaged.stderr


def test_the_proof_is_told(llama_cpp, small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", LLAMA3, small_tokenizer.path)
    told = _json("export", run, tmp_path / "out", "--to", "gguf")
    assert told["proof"].startswith("llama.cpp (xllamacpp") and told["greedy_tokens_equal"] == 32
    _json("import", tmp_path / "out" / "out.gguf", tmp_path / "back")
    again = _json("export", tmp_path / "back", tmp_path / "again", "--to", "gguf")
    assert again["greedy_tokens_equal"] == 32 and again["text_characters_equal"] == told["text_characters_equal"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "gguf", "--dtype", "bfloat16"), "--dtype bfloat16: must be float32, float16 or q8_0"),
        (("--to", "hf", "--dtype", "q8_0"), "--dtype q8_0: must be float32, bfloat16 or float16"),
        (("--to", "gguf", "--proof", "layers"), "--proof: goes with --to hf"),
        (("--to", "gguf", "--base", "x"), "--base: goes with --to peft"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments, told, small_tokenizer, tmp_path):
    run = _run_folder(tmp_path / "run", LLAMA, small_tokenizer.path)
    result = _call("export", run, tmp_path / "out", *arguments)
    assert result.exit_code == USAGE and told in result.stderr


def test_damaged_files_end_with_their_code(small_tokenizer, tmp_path, monkeypatch):
    without_llama_cpp(monkeypatch)
    run = _run_folder(tmp_path / "run", LLAMA, small_tokenizer.path)
    _json("export", run, tmp_path / "out", "--to", "gguf")
    file = tmp_path / "out" / "out.gguf"
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-100] ^= 1
    file.write_bytes(changed)
    result = _call("import", tmp_path / "out", tmp_path / "back")
    assert result.exit_code == DAMAGED and "is not what was exported" in result.stderr
    for place, damage in (("cut", content[:-100]), ("none", b"GGML"), ("empty", b"")):
        path = tmp_path / f"{place}.gguf"
        path.write_bytes(damage)
        result = _call("import", path, tmp_path / "back")
        assert result.exit_code == DAMAGED and str(path) in result.stderr, place
    assert not (tmp_path / "back").exists()


def test_a_file_read_by_other_programs(llama_cpp, small_tokenizer, tmp_path):
    """llama.cpp's package for its files finds the keys and numbers that our own reader finds."""
    from llmtrain.interop.gguf.importing import open_gguf

    config = LLAMA.with_keys({"hidden_size": 64, "ffn_hidden_size": 96, "rope_scaling": SCALING})
    run = _run_folder(tmp_path / "run", config, small_tokenizer.path)
    for dtype in ("float32", "q8_0"):
        out = tmp_path / dtype
        _json("export", run, out, "--to", "gguf", "--dtype", dtype, "--max-perplexity-increase", "100")
        from gguf import GGUFReader  # pyright: ignore[reportMissingImports]
        from gguf.quants import dequantize  # pyright: ignore[reportMissingImports]

        header = open_gguf(out / f"{dtype}.gguf").header
        theirs = GGUFReader(out / f"{dtype}.gguf")
        assert {tensor.name for tensor in theirs.tensors} == header.tensors.keys()
        for tensor in theirs.tensors:
            found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(found.reshape(-1), header.tensor(tensor.name).reshape(-1)), tensor.name
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                assert field.contents() == header.metadata[key], key


@pytest.mark.whole_grid
@pytest.mark.parametrize("type", [TensorType.F32, TensorType.Q8_0])
def test_transformers_reads_llama(type, llama_cpp, small_tokenizer, tmp_path, monkeypatch):
    """Its `gguf_file`; of Qwen3 and GPT-2 it takes published sizes alone, whatever the file says."""
    without_llama_cpp(monkeypatch)
    from llmtrain.interop.gguf.importing import open_gguf
    from tests.unit.interop.gguf.files import written

    config = LLAMA.with_keys({"hidden_size": 64, "ffn_hidden_size": 96})
    file = written(tmp_path / "out", config, small_tokenizer, type).file
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file, dtype=torch.float32).eval()
    ours = build_from(config, open_gguf(tmp_path / "out" / file).tensor)
    example = random_example(config)
    with torch.no_grad():
        apart = float((theirs(example.tokens_BS).logits - logits_of(ours, example)).abs().max())
    assert apart <= 1e-4


@pytest.mark.whole_grid
def test_files_of_llama_cpps_converter_are_read(llama_cpp, small_tokenizer, tmp_path):
    """Written by its own tool from our exports; tokens and weights are those of the run."""
    require_reader("llama_cpp")
    import subprocess
    import sys

    from tests.support.readers import READERS

    for name in ("llama", "llama tied", "mixtral", "llama yarn", "llama biases"):
        folder, file = tmp_path / name.replace(" ", "-"), tmp_path / f"{name.replace(' ', '-')}.gguf"
        config = MODELS_READ[name]
        model = random_model(config)
        write_export(folder, model_for(config, small_tokenizer), weights_of(model), ExportSettings())
        script = str(READERS / "llama.cpp" / "convert_hf_to_gguf.py")
        for type in ("f32", "f16", "bf16", "q8_0") if name == "llama" else ("f32",):
            file.unlink(missing_ok=True)
            command = [sys.executable, script, str(folder), "--outfile", str(file), "--outtype", type]
            subprocess.run(command, check=True, capture_output=True, env=os.environ)
            out = tmp_path / f"back-{type}-{name.replace(' ', '-')}"
            _json("import", file, out)
            back = find_checkpoint_model(out).read(CPU)
            for one, other in zip(model.state_dict().values(), back.model.state_dict().values(), strict=True):
                apart = float((one - other).abs().max()) / float(one.abs().max())
                assert apart <= {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-7}[type], (name, type)
            assert back.tokenizer().encode("def f(x):\n\t") == small_tokenizer.encode("def f(x):\n\t")


@pytest.mark.whole_grid
def test_another_build_of_llama_cpp_reads_our_files(small_tokenizer, tmp_path, monkeypatch):
    """llama-cpp-python's, which another compiler made."""
    require_reader("llama_cpp")
    without_llama_cpp(monkeypatch)
    from tests.unit.interop.gguf.files import written
    from tests.unit.interop.test_readers import _require_equal

    files = {name: tmp_path / name.replace(" ", "-") for name in ("llama", "qwen3", "mixtral", "llama scaled", "gpt2")}
    for name, folder in files.items():
        written(folder, MODELS_READ[name], small_tokenizer)
    paths = [folder / f"{folder.name}.gguf" for folder in files.values()]
    answers = read_by("llama_cpp", paths, JOB)
    for name, path in zip(files, paths, strict=True):
        _require_equal(answers[path], name, small_tokenizer, ("a\u2581b",))


@pytest.mark.whole_grid
@pytest.mark.parametrize("name", ["llama-bpe", "gpt-2", "qwen2", "starcoder", "refact"])
def test_published_vocabularies_give_the_published_ids(name, tmp_path):
    """Those that llama.cpp's tests use, with the ids that Hugging Face's tokenizers give."""
    from llmtrain.interop.gguf.reading import read_header
    from llmtrain.interop.gguf.tokenizer_files import write_tokenizer_files
    from tests.support.readers import READERS

    require_reader("llama_cpp")
    path = Path(READERS, "llama.cpp", "models", f"ggml-vocab-{name}.gguf")
    header = read_header(path)
    assert write_tokenizer_files(tmp_path, header.metadata, path) == []
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    texts = path.with_name(f"{path.name}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    expected = [list(map(int, line.split())) for line in path.with_name(f"{path.name}.out").read_text().splitlines()]
    assert len(texts) > 30
    different = [
        text for text, ids in zip(texts, expected, strict=False) if tokenizer.encode(text) != ids and text.strip("\n")
    ]
    assert different == []


@pytest.mark.whole_grid
def test_pieces_of_equal_scores_have_no_tokenizer_json(tmp_path):
    """Llama 2's: which of two is joined first rests on their places in a text."""
    from llmtrain.interop.gguf.reading import read_header
    from llmtrain.interop.gguf.tokenizer_files import write_tokenizer_files
    from tests.support.readers import READERS

    require_reader("llama_cpp")
    path = Path(READERS, "llama.cpp", "models", "ggml-vocab-llama-spm.gguf")
    notes = write_tokenizer_files(tmp_path, read_header(path).metadata, path)
    assert notes == ["the tokenizer is not kept: two pieces have the same score"] and list(tmp_path.iterdir()) == []

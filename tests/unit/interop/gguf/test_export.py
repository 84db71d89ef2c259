"""What is written as GGUF is the model in llama.cpp itself, or is refused by name."""

import errno
import json
from dataclasses import replace

import pytest
import torch

from llmtrain.errors import ConfigError, ExportError
from llmtrain.interop.gguf import architectures, export, vocabulary
from llmtrain.interop.gguf.architectures import ARCHITECTURES
from llmtrain.interop.gguf.export import GgufSettings, write_gguf
from llmtrain.interop.gguf.file_format import TensorType
from llmtrain.interop.gguf.importing import open_gguf
from llmtrain.interop.gguf.proof import ALLOWED, ALLOWED_BY_TABLE
from llmtrain.interop.name_table import Shape
from llmtrain.interop.text.proof import NUM_GREEDY
from llmtrain.models.transformer import counted_positions
from llmtrain.values.batch import ModelInputs
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece
from tests.unit.interop.gguf.files import without_llama_cpp, written
from tests.unit.interop.models import GPT2, LLAMA, MIXTRAL, MODELS, QWEN3, model_for, random_model, scaled, weights_of

REFUSED = {
    "gpt2 exact gelu": "gelu with tanh",
    "gpt2 relu": "gelu with tanh",
    "llama yarn with factor": "beta_fast",
    "qwen3 llama3": "llama.cpp's qwen3 has no factors of frequencies",
    "bert": "This is a BERT model",
    "t5": "This is a T5 model",
    "switch_transformers": "This is a Switch Transformers model",
}
MODELS_REFUSED = {**MODELS, "qwen3 llama3": scaled("llama3").with_keys({"qk_norm": True, "head_dim": 16})}
MODELS_WRITTEN = {
    **{name: config for name, config in MODELS.items() if not name.startswith(("bert", "t5", "switch", *REFUSED))},
    "llama yarn factor": scaled("yarn", attention_factor=1.3),
    "llama ntk": scaled("ntk"),
    # Rows of whole blocks, so that every matrix is Q8_0.
    "llama wide": LLAMA.with_keys({"hidden_size": 64, "ffn_hidden_size": 96}),
    "qwen3 wide": QWEN3.with_keys({"hidden_size": 64, "ffn_hidden_size": 96}),
    "mixtral wide": MIXTRAL.with_keys({"hidden_size": 64, "ffn_hidden_size": 96}),
    "gpt2 wide": GPT2.with_keys({"hidden_size": 64, "ffn_hidden_size": 96}),
}
F32, F16, Q8_0 = TensorType.F32, TensorType.F16, TensorType.Q8_0
SHORT = [("llama scaled", F32), ("qwen3 tied window", F32), ("mixtral", F32), ("gpt2", F32), ("mixtral wide", Q8_0)]
REST = [(name, type) for name in MODELS_WRITTEN for type in (F32, F16, Q8_0) if (name, type) not in SHORT]


@pytest.mark.parametrize(
    ("name", "type"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.whole_grid) for case in REST)]
)
def test_llama_cpp_computes_the_model(name, type, llama_cpp, small_tokenizer, tmp_path):
    config = MODELS_WRITTEN[name]
    found = written(tmp_path / "out", config, small_tokenizer, type)
    proof, by_table = found.proof, ALLOWED_BY_TABLE * (config.activation == "gelu")
    assert proof is not None and proof.max_difference <= 3 * max(ALLOWED[type], by_table)
    assert proof.num_tipped == 0 or (config.moe is not None and type is not F32)
    assert proof.num_likelihoods > 60 or config.attention.window
    assert proof.num_text_characters > 3000
    if type is F32 and config.activation != "gelu":
        expected = NUM_GREEDY if config.attention.window is None else 8
        assert proof.num_greedy_tokens == proof.num_greedy_compared == expected
    record = json.loads((tmp_path / "out" / "llmtrain.json").read_text("utf-8"))
    assert record["proved"]["num_greedy_tokens"] == proof.num_greedy_tokens
    assert "Before it had its name, llama.cpp" in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(name, small_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=REFUSED[name]):
        written(tmp_path / "out", MODELS_REFUSED[name], small_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_head_for_labels_is_refused(small_tokenizer, tmp_path):
    config = LLAMA.with_keys({"head": "classifier", "num_labels": 3})
    with pytest.raises(ConfigError, match=r"model\.head = classifier"):
        written(tmp_path / "out", config, small_tokenizer)


def test_a_unigram_tokenizer_is_refused(tmp_path):
    model = train_sentencepiece(["a b c abc cab bca\n"] * 50, "unigram", 300)
    tokenizer = saved_tokenizer(tmp_path / "tokenizer.model", model)
    with pytest.raises(ExportError, match=r"llama\.cpp has no such tokenizer"):
        written(tmp_path / "out", LLAMA, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("type", [F32, Q8_0])
def test_the_same_bytes_twice(type, small_tokenizer, tmp_path, monkeypatch):
    without_llama_cpp(monkeypatch)
    for name in ("one", "two"):
        written(tmp_path / name / "model", MIXTRAL, small_tokenizer, type)
    for file in ("model.gguf", "README.md", "llmtrain.json"):
        assert (tmp_path / "one/model" / file).read_bytes() == (tmp_path / "two/model" / file).read_bytes()


def test_without_llama_cpp_it_says_so(small_tokenizer, tmp_path, monkeypatch):
    without_llama_cpp(monkeypatch)
    assert written(tmp_path / "out", LLAMA, small_tokenizer).proof is None
    assert "**Not proved in llama.cpp**" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert json.loads((tmp_path / "out" / "llmtrain.json").read_text("utf-8"))["proved"] is None


@pytest.mark.parametrize("name", ["llama scaled", "mixtral", "qwen3", "gpt2", "llama biases", "llama yarn factor"])
def test_f32_is_read_again_bit_by_bit(name, small_tokenizer, tmp_path, monkeypatch):
    without_llama_cpp(monkeypatch)
    config = MODELS_WRITTEN[name]
    file = tmp_path / "out" / written(tmp_path / "out", config, small_tokenizer).file
    read = open_gguf(file)
    own = dict(random_model(config).named_parameters())
    found = {key: tensor for key, _, tensor in read.iter_tensors()}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)
    if (scaling := config.rope_scaling) is not None:
        assert read.model.rope_scaling is not None
        assert read.model.rope_scaling.model_dump() == pytest.approx(scaling.model_dump())
    assert (read.model.moe is None) == (config.moe is None)


def _plain_rows() -> architectures.Architecture:
    llama = ARCHITECTURES["llama"]
    rows = tuple(replace(row, shape=Shape.SAME) if row.shape is Shape.INTERLEAVED else row for row in llama.table)
    return replace(llama, table=rows)


def _gate_for_up() -> architectures.Architecture:
    llama = ARCHITECTURES["llama"]
    names = {"blk.{n}.ffn_gate": "blk.{n}.ffn_up", "blk.{n}.ffn_up": "blk.{n}.ffn_gate"}
    rows = tuple(replace(row, theirs=names.get(row.theirs, row.theirs)) for row in llama.table)
    return replace(llama, table=rows)


@pytest.mark.parametrize("broken", [_plain_rows, _gate_for_up])
def test_a_wrong_table_is_caught(broken, llama_cpp, small_tokenizer, tmp_path, monkeypatch):
    """Wrong both ways, so that our own reader does not see it."""
    monkeypatch.setitem(ARCHITECTURES, "llama", broken())
    with pytest.raises(ExportError, match=r"llama\.cpp computes another model"):
        written(tmp_path / "out", LLAMA, small_tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "type"), [("llama", F32), ("mixtral wide", Q8_0)])
def test_a_wrong_theta_is_caught(name, type, llama_cpp, small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "stretched_theta", lambda model: model.rope_theta * 2)
    with pytest.raises(ExportError, match=r"llama\.cpp computes another model"):
        written(tmp_path / "out", MODELS_WRITTEN[name], small_tokenizer, type)


@pytest.mark.parametrize("key", ["tokenizer.ggml.add_space_prefix", "tokenizer.ggml.scores"])
def test_a_wrong_tokenizer_is_caught(key, llama_cpp, small_tokenizer, tmp_path, monkeypatch):
    right = vocabulary.file_vocabulary

    def wrong(*arguments):
        found = right(*arguments)
        value = found.keys[key]
        changed = not value if isinstance(value, bool) else [*reversed(value)]
        return replace(found, keys={**found.keys, key: changed})

    monkeypatch.setattr(export, "file_vocabulary", wrong)
    with pytest.raises(ExportError, match=r"llama\.cpp gives other ids"):
        written(tmp_path / "out", LLAMA, small_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_does_not_take_is_told_in_its_words(llama_cpp, small_tokenizer, tmp_path, monkeypatch):
    right = vocabulary.file_vocabulary

    def short(*arguments):
        found = right(*arguments)
        cut = {key: value[:-1] if isinstance(value, list) else value for key, value in found.keys.items()}
        return replace(found, keys=cut)

    monkeypatch.setattr(export, "file_vocabulary", short)
    with pytest.raises(ExportError, match=r"llama\.cpp does not take the file"):
        written(tmp_path / "out", LLAMA, small_tokenizer)


def test_other_weights_are_caught_in_f32(small_tokenizer, tmp_path, monkeypatch):
    """Whatever llama.cpp computes of them."""
    without_llama_cpp(monkeypatch)
    right = export.GgufPart
    monkeypatch.setattr(
        export, "GgufPart", lambda name, shape, type, read: right(name, shape, type, lambda: read() * 1.001)
    )
    with pytest.raises(ExportError, match="holds other weights"):
        written(tmp_path / "out", LLAMA, small_tokenizer)


def test_perplexity_is_bounded(small_tokenizer, tmp_path, monkeypatch):
    """A model that knows a text by heart, with a column of outliers that a norm takes back: it computes the same, but
    in Q8_0 all else in the blocks of that column is lost."""
    without_llama_cpp(monkeypatch)
    config = LLAMA.with_keys({"hidden_size": 64, "ffn_hidden_size": 96})
    model = random_model(config)
    ids_S = torch.randint(8, 300, (48,), generator=torch.Generator().manual_seed(2))
    inputs = ModelInputs(ids_S[None], counted_positions(ids_S[None]), None)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model.logits(model(inputs)[0], inputs)[0, :-1], ids_S[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp_norm.weight"):
                parameter[::32] /= 4096
            if name.endswith(("mlp.gate.weight", "mlp.up.weight")):
                parameter[:, ::32] *= 4096
    settings = GgufSettings(Q8_0, 0.02, held_out=[ids_S.tolist()])
    with pytest.raises(ExportError, match="perplexity grows from"):
        write_gguf(tmp_path / "out", model_for(config, small_tokenizer), weights_of(model), settings)
    assert list(tmp_path.iterdir()) == []
    found = write_gguf(
        tmp_path / "out", model_for(config, small_tokenizer), weights_of(model), replace(settings, type=F32)
    )
    assert found.perplexities[0] == found.perplexities[1] < 100


@pytest.mark.parametrize("when", ["write_file", "sha256_of"])
def test_a_full_disk_leaves_nothing(when, small_tokenizer, tmp_path, monkeypatch):
    without_llama_cpp(monkeypatch)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(export, when, full)
    with pytest.raises(ExportError, match="No space left on device"):
        written(tmp_path / "out", LLAMA, small_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_only_such_an_export_is_replaced(small_tokenizer, tmp_path, monkeypatch):
    without_llama_cpp(monkeypatch)
    weights = weights_of(random_model(LLAMA))
    written(tmp_path / "out", LLAMA, small_tokenizer)
    with pytest.raises(ConfigError, match="exists already"):
        write_gguf(tmp_path / "out", model_for(LLAMA, small_tokenizer), weights, GgufSettings())
    written(tmp_path / "out", LLAMA, small_tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="is no export to gguf"):
        written(tmp_path / "mine", LLAMA, small_tokenizer)

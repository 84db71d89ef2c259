"""Files that are not what they say: each is refused by what is wrong with it, and nothing is made for it before."""

import struct
from pathlib import Path

import pytest
import torch

from llmtrain.errors import ConfigError, DataError
from llmtrain.interop.gguf.file_format import MAGIC, TensorType
from llmtrain.interop.gguf.importing import open_gguf
from llmtrain.interop.gguf.reading import read_header
from llmtrain.interop.gguf.writing import GgufPart, write_file
from tests.support.memory import peak_growth
from tests.unit.interop.gguf.files import header, rewritten, row, text, without_llama_cpp, written
from tests.unit.interop.models import LLAMA, MIXTRAL, QWEN3, scaled

HUGE = 2**62
U32, STRING, ARRAY, BOOL = 4, 8, 9, 7
NUMBER = text(b"a") + struct.pack("<II", U32, 1)

SPOILED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "other": (b"PK\x03\x04" * 20, "is no GGUF file"),
    "magic alone": (MAGIC, "the version"),
    "cut in the counts": (MAGIC + struct.pack("<IQ", 3, 0), "the number of keys"),
    "tensors beyond the file": (header(HUGE), "the number of tensors is"),
    "keys beyond the file": (header(0, num_pairs=HUGE), "the number of keys is"),
    "a key beyond the file": (header(0, struct.pack("<Q", HUGE) + bytes(40), 1), "at most 1,024"),
    "a text beyond the file": (header(0, text(b"a") + struct.pack("<IQ", STRING, 2**40) + bytes(9), 1), "at most"),
    "a list beyond the file": (header(0, text(b"a") + struct.pack("<IIQ", ARRAY, U32, HUGE), 1), "too short"),
    "texts beyond the file": (header(0, text(b"a") + struct.pack("<IIQ", ARRAY, STRING, HUGE), 1), "too short"),
    "lists in lists": (header(0, text(b"a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(30), 1), "lists in lists"),
    "an unknown kind": (header(0, text(b"a") + struct.pack("<II", 99, 1), 1), "the kind 99"),
    "a truth of two": (header(0, text(b"a") + struct.pack("<IB", BOOL, 2), 1), "true or false"),
    "a key twice": (header(0, NUMBER + NUMBER, 2), "twice"),
    "no UTF-8": (header(0, text(b"\xff\xfe") + struct.pack("<II", U32, 1), 1), "UTF-8"),
    "alignment of three": (header(0, text(b"general.alignment") + struct.pack("<II", U32, 3), 1), "power of two"),
    "alignment of zero": (header(0, text(b"general.alignment") + struct.pack("<II", U32, 0), 1), "power of two"),
    "a shape of none": (header(1, rows=row(b"t", (), 0, 0) + bytes(99)), "0 dimensions"),
    "a shape of ninety": (header(1, rows=row(b"t", (1,) * 90, 0, 0)), "90 dimensions"),
    "a size of zero": (header(1, rows=row(b"t", (4, 0), 0, 0) + bytes(99)), "has the shape"),
    "a size that overflows": (header(1, rows=row(b"t", (2**33, 2**33), 0, 0) + bytes(99)), "cut off"),
    "behind the end": (header(1, rows=row(b"t", (4,), 0, 2**40) + bytes(99)), "cut off"),
    "not aligned": (header(1, rows=row(b"t", (4,), 0, 3) + bytes(99)), "no multiple of 32"),
    "over each other": (
        header(2, rows=row(b"t", (16,), 0, 0) + row(b"u", (4,), 0, 32) + bytes(299)),
        "inside of another",
    ),
    "a tensor twice": (header(2, rows=row(b"t", (4,), 0, 0) * 2 + bytes(299)), "twice"),
    "blocks cut": (header(1, rows=row(b"t", (33,), 8, 0) + bytes(99)), "blocks of 32"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_damaged_files_are_refused(name, tmp_path):
    content, told = SPOILED[name]
    (tmp_path / "file.gguf").write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        read_header(tmp_path / "file.gguf")
    assert str(tmp_path / "file.gguf") in str(caught.value)


def test_what_is_not_read_is_named(tmp_path):
    path = tmp_path / "file.gguf"
    for kind, told in ((2, "Q4_0"), (14, "Q6_K"), (77, "unknown type, 77")):
        path.write_bytes(header(1, rows=row(b"t", (256,), kind, 0) + bytes(999)))
        with pytest.raises(ConfigError, match=told):
            read_header(path)
    for version, told in ((1, "version 1"), (3 << 24, "big-endian")):
        path.write_bytes(MAGIC + struct.pack("<IQQ", version, 0, 0))
        with pytest.raises(ConfigError, match=told):
            read_header(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(DataError, match="folder"):
        read_header(tmp_path)


def test_nothing_is_made_for_what_a_file_only_says(tmp_path):
    for number, (content, _) in enumerate(SPOILED.values()):
        (tmp_path / f"{number}.gguf").write_bytes(content)

    def read_all() -> None:
        for number in range(len(SPOILED)):
            with pytest.raises(DataError):
                read_header(tmp_path / f"{number}.gguf")

    assert peak_growth(read_all) < 8 << 20


@pytest.fixture(scope="module")
def good(small_tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        without_llama_cpp(patch)
        return {
            name: place / name / written(place / name, config, small_tokenizer).file
            for name, config in (("llama", LLAMA), ("llama3", scaled("llama3")), ("mixtral", MIXTRAL), ("qwen3", QWEN3))
        }


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    content = good["llama"].read_bytes()
    begin = read_header(good["llama"]).begin
    for size in (*range(0, begin, 997), begin, begin + 1, len(content) - 40, (begin + len(content)) // 2):
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:size])
        with pytest.raises(DataError):
            open_gguf(path)


def test_changed_bytes_of_the_header_are_refused_or_read(good, tmp_path):
    """Each of many single changes gives an error of ours, or a model; never another exception."""
    content = bytearray(good["llama3"].read_bytes())
    begin = read_header(good["llama3"]).begin
    path, refused = tmp_path / "changed.gguf", 0
    for place in range(4, begin, 61):
        for value in (0, 0xFF, content[place] ^ 0x40):
            changed = bytes([*content[:place], value]) + bytes(content[place + 1 :])
            path.write_bytes(changed)
            try:
                open_gguf(path)
            except (ConfigError, DataError) as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 30


def _tensors(path: Path, **shapes: tuple[int, ...]) -> list[GgufPart]:
    found = read_header(path)
    changed = {name: shapes.get(name.replace(".", "_"), info.shape) for name, info in found.tensors.items()}
    return [
        GgufPart(name, shape, TensorType.F32, lambda shape=shape: torch.zeros(shape)) for name, shape in changed.items()
    ]


CHANGES = {
    "general.architecture": ("gemma", ConfigError, "can import llama, qwen3, gpt2"),
    "llama.block_count": (2**31, DataError, "block_count"),
    "llama.embedding_length": ([48, 48], ConfigError, "embedding_length"),
    "llama.attention.head_count": (0, ConfigError, "num_heads|heads"),
    "llama.attention.head_count_kv": ([2, 1], ConfigError, "same for every layer"),
    "llama.attention.key_length": (16, ConfigError, "llmtrain has one size"),
    "llama.attention.layer_norm_rms_epsilon": (float("nan"), ConfigError, "layer_norm_rms_epsilon|norm_eps"),
    "llama.attention.sliding_window": (16, ConfigError, "does not know what it changes"),
    "llama.rope.scaling.type": ("longrope", ConfigError, "can import none, linear and yarn"),
    "llama.rope.freq_base": (float("inf"), ConfigError, "rope_theta"),
    "llama.expert_count": (3, DataError, "do not fit"),
    "split.count": (4, ConfigError, "several parts"),
    "llama.feed_forward_length": (None, ConfigError, "is missing"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_keys_that_do_not_fit_are_refused(key, good, tmp_path):
    value, kind, told = CHANGES[key]
    original = read_header(good["llama"])
    path = rewritten(tmp_path / "x.gguf", original, {key: value}, _tensors(good["llama"]))
    with pytest.raises(kind, match=told):
        open_gguf(path)


def test_tensors_that_do_not_fit_are_refused(good, tmp_path):
    original = read_header(good["llama"])
    for tensors, told in (
        (_tensors(good["llama"], blk_0_attn_q_weight=(48, 40)), "attn_q.weight: has the shape"),
        (_tensors(good["llama"])[:-1], "is missing"),
        ([*_tensors(good["llama"]), GgufPart("x", (4,), TensorType.F32, lambda: torch.zeros(4))], "x: the keys do"),
    ):
        path = rewritten(tmp_path / "x.gguf", original, {}, tensors)
        with pytest.raises(DataError, match=told):
            open_gguf(path)


def test_factors_of_no_rule_are_refused(good, tmp_path):
    original = read_header(good["llama3"])
    with pytest.raises(ConfigError, match="by no rule"):
        open_gguf(rewritten(tmp_path / "x.gguf", original, {}, _tensors(good["llama3"])))


def test_numbers_that_are_none_are_refused_when_they_are_read(good, tmp_path):
    content = bytearray(good["llama"].read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    path = tmp_path / "nan.gguf"
    path.write_bytes(content)
    file = open_gguf(path)
    with pytest.raises(DataError, match="NaN"):
        list(file.iter_tensors())


def test_a_vocabulary_alone_is_no_model(tmp_path):
    keys = {"block_count": 0, "context_length": 9, "embedding_length": 8, "feed_forward_length": 8}
    keys |= {"attention.head_count": 2}
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    metadata |= {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    write_file(tmp_path / "x.gguf", metadata, [])
    with pytest.raises(DataError, match="vocabulary alone"):
        open_gguf(tmp_path / "x.gguf")

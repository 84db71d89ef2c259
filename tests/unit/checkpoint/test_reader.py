"""What is written is what is read, in any cut; what is not the manifest's is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.checkpoint import writer
from llmtrain.checkpoint.manifest import CheckpointUnusableError, manifest_hash_line
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.values.fragment import Box, Fragment
from tests.unit.checkpoint.saved import CONFIG_TEXT, STATE, bits, cut, save, state_fragments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@st.composite
def cuts(draw: st.DrawFn, box: Box) -> list[Box]:
    """The box cut up at random: along an axis, then the parts again."""
    wide = [axis for axis, size in enumerate(box.shape) if size > 1]
    if not wide or not draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(wide))
    at = draw(st.integers(1, box.shape[axis] - 1))

    def part(start: int, size: int) -> Box:
        offsets, shape = list(box.offsets), list(box.shape)
        offsets[axis] += start
        shape[axis] = size
        return Box(tuple(offsets), tuple(shape))

    return draw(cuts(part(0, at))) + draw(cuts(part(at, box.shape[axis] - at)))


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offsets, tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offsets, strict=True)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_box_of_any_cut_over_any_ranks_is_read_bit_by_bit(tmp_path: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    fragments = cut("w", "master", tensor, data.draw(cuts(Box.whole(shape))))
    owners = [data.draw(st.integers(0, 2)) for _ in fragments]
    writing = start_checkpoint(tmp_path, 3)
    parts = [
        write_rank_files(writing, rank, [item for item, owner in zip(fragments, owners, strict=True) if owner == rank])
        for rank in range(3)
    ]
    reader = open_checkpoint(publish(writing, parts, Contents(3, {}, "", {}), lambda: None))
    for box in [Box.whole(shape), *(data.draw(boxes_in(shape)) for _ in range(4))]:
        found = reader.read("w", "master", box)
        assert (found.dtype, tuple(found.shape)) == (dtype, box.shape)
        assert bits(found) == bits(tensor[box.slices_in(Box.whole(shape))])


def test_everything_handed_in_comes_back(tmp_path: Path) -> None:
    reader = open_checkpoint(save(tmp_path, 7))
    assert (reader.step, reader.state, reader.config_text) == (7, STATE, CONFIG_TEXT)
    assert reader.about == {"layout": {"dp": 1}}
    assert reader.global_shape("scale", "master") == ()
    assert reader.global_shape("scale", "exp_avg") is None
    assert {(item.name, item.kind) for item in reader.tensors()} == {(f.name, f.kind) for f in state_fragments()}
    assert sum(item.size_bytes for item in reader.tensors()) == sum(f.tensor.nbytes for f in state_fragments())


def test_what_is_read_is_the_callers_own_memory(tmp_path: Path) -> None:
    path, box = save(tmp_path, 7), Box.whole((5, 3))
    reader = open_checkpoint(path)
    reader.read("decoder.layers.0.mlp.up", "master", box).zero_()
    assert reader.read("decoder.layers.0.mlp.up", "master", box).any()
    open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "kind", "box", "words"),
    [
        ("missing", "master", Box((), ()), "has no master of missing"),
        ("scale", "exp_avg", Box((), ()), "has no exp_avg of scale"),
        ("counts", "buffer", Box((2,), (3,)), r"shape \[4\]"),
        ("counts", "buffer", Box((-1,), (1,)), r"shape \[4\]"),
        ("counts", "buffer", Box((0, 0), (1, 1)), r"shape \[4\]"),
    ],
)
def test_a_box_that_is_not_there_is_refused(tmp_path: Path, name: str, kind: str, box: Box, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(save(tmp_path, 7)).read(name, kind, box)


def test_a_path_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        open_checkpoint(tmp_path / "step-00000001")


def forge(path: Path, **changes: object) -> None:
    """Change the manifest and give it a hash that fits, as someone with bad intentions would."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = manifest
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        place[last] = value
    content = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(content)
    (path / "manifest.json.sha256").write_bytes(manifest_hash_line(content))


COUNTS = "tensors__counts__buffer__"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {"../../etc/passwd": {"size_bytes": 1, "sha256": "0" * 64}}}, "passwd"),
        ({"files": {"/etc/passwd": {"size_bytes": 1, "sha256": "0" * 64}}}, "passwd"),
        ({"files": {}}, "is not listed"),
        ({COUNTS + "dtype": "F64"}, "in the manifest"),
        ({COUNTS + "dtype": "PICKLE"}, "dtype PICKLE"),
        ({COUNTS + "global_shape": [1 << 60]}, "hold 4 of"),
        ({COUNTS + "global_shape": [2, 2]}, "not inside"),
        ({COUNTS + "global_shape": [-4]}, "not a manifest of a checkpoint"),
        ({COUNTS + "fragments__0__file": "rank-00001.safetensors"}, "not listed among the files"),
        ({COUNTS + "fragments__0__file": "state.json"}, "is no .safetensors file"),
        ({COUNTS + "fragments__0__key": "other"}, "absent"),
        ({COUNTS + "fragments__0__shape": [4, 1]}, "differ in length"),
        ({"tensors__counts": {}}, "absent"),
        ({"step": "7"}, "step"),
        ({"extra": 1}, "extra"),
        ({"schema_version": "new"}, "schema_version"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = save(tmp_path, 7)
    forge(path)
    open_checkpoint(path)
    forge(path, **change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_a_newer_format_is_named_and_is_no_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    forge(path, schema_version=99, tensors=None)
    with pytest.raises(CheckpointUnusableError, match="schema_version = 99 is newer"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"schema_version": 1}'])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 7)
    (path / "manifest.json").write_bytes(content)
    (path / "manifest.json.sha256").write_bytes(manifest_hash_line(content))
    with pytest.raises(CheckpointError, match="is not a manifest of a checkpoint"):
        open_checkpoint(path)


def test_fragments_that_miss_or_repeat_an_element_are_not_published(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    for step, boxes in enumerate([[Box((0,), (5,))], [Box((0,), (4,)), Box((3,), (3,))]]):
        writing = start_checkpoint(tmp_path, step)
        part = write_rank_files(writing, 0, cut("w", "master", tensor, boxes))
        with pytest.raises(ValueError, match="master of w"):
            publish(writing, [part], Contents(step, {}, "", {}), lambda: None)
    assert not list(tmp_path.glob("step-*"))


def test_ranks_that_disagree_are_not_published(tmp_path: Path) -> None:
    writing = start_checkpoint(tmp_path, 1)
    halves = [torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)]
    parts = [
        write_rank_files(writing, rank, [Fragment("w", "master", (4,), Box((2 * rank,), (2,)), half)])
        for rank, half in enumerate(halves)
    ]
    with pytest.raises(ValueError, match="disagree on master of w"):
        publish(writing, parts, Contents(1, {}, "", {}), lambda: None)
    with pytest.raises(ValueError, match="two ranks wrote rank-00000"):
        publish(start_checkpoint(tmp_path, 1), [parts[0], parts[0]], Contents(1, {}, "", {}), lambda: None)


def test_no_pickle_is_read_on_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch.serialization, "load", refuse)
    with pytest.raises(AssertionError, match="a pickle was read"):
        torch.load(tmp_path / "x")
    reader = open_checkpoint(save(tmp_path, 7))
    for item in reader.tensors():
        reader.read(item.name, item.kind, Box.whole(item.shape))


def test_a_rank_that_holds_much_writes_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SMALL_FILE_BYTES", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3), raising=False)
    path = save(tmp_path, 7)
    files = {file.name: file.stat().st_size for file in path.glob("rank-*")}
    assert sorted(files) == ["rank-00000-1.safetensors", "rank-00000.safetensors"]
    reader = open_checkpoint(path)
    for item in state_fragments(7):
        assert bits(reader.read(item.name, item.kind, item.box)) == bits(item.tensor)

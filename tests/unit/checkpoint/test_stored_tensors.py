"""Any box of a stored tensor, into any memory, with no more bytes read than it needs."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from llmtrain.checkpoint import stored_tensors
from llmtrain.checkpoint.stored_tensors import Scratch, StoredTensors
from llmtrain.checkpoint.tensor_file import PAGE_BYTES, write_tensor_file
from llmtrain.errors import CheckpointError
from llmtrain.values.fragment import Box
from tests.unit.checkpoint.saved import bits
from tests.unit.checkpoint.test_reader import boxes_in


def stored(path: Path, **tensors: torch.Tensor) -> StoredTensors:
    path.unlink(missing_ok=True)
    write_tensor_file(path, {"before": torch.zeros(3), **tensors}, {"note": "x"})
    return StoredTensors(path, Scratch())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_box_arrives_whatever_the_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Pages and scratch memory of a few bytes send small tensors through every path that large ones take."""
    monkeypatch.setattr(stored_tensors, "PAGE_BYTES", data.draw(st.sampled_from([1, 6, 40, PAGE_BYTES])))
    monkeypatch.setattr(stored_tensors, "SCRATCH_BYTES", data.draw(st.sampled_from([1, 30, 8 << 20])))
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    file = stored(tmp_path / "x.safetensors", w=tensor)
    for _ in range(3):
        box = data.draw(boxes_in(shape))
        wider = torch.zeros([size + 1 for size in box.shape], dtype=dtype)
        scattered = wider[tuple(slice(0, size) for size in box.shape)]
        for target in (torch.empty(box.shape, dtype=dtype), scattered):
            file.read("w", box, target)
            assert bits(target) == bits(tensor[box.slices_in(Box.whole(shape))])
        scattered.zero_()
        assert not wider.any(), "what lies beside the target was written"


@pytest.mark.parametrize(
    ("box", "most"),
    [
        (Box((0, 0), (64, 8192)), 1.0),  # all
        (Box((32, 0), (32, 8192)), 1.0),  # rows
        (Box((0, 4096), (64, 4096)), 1.0),  # columns, 16 KiB apart
        (Box((0, 7168), (64, 1024)), 1.0),  # columns, a page each
        (Box((3, 5), (1, 8000)), 1.0),  # part of a row, as ZeRO has it
        (Box((0, 0), (64, 7680)), 1.07),  # 2 KiB between rows: not worth a call
    ],
)
@pytest.mark.parametrize("scattered", [False, True])
def test_bytes_read_are_those_needed(tmp_path: Path, box: Box, most: float, scattered: bool) -> None:
    tensor = torch.randn(64, 8192)
    file = stored(tmp_path / "x.safetensors", w=tensor)
    target = torch.empty(box.shape[0], box.shape[1] + scattered)[:, : box.shape[1]]
    count = file.read("w", box, target)
    assert torch.equal(target, tensor[box.slices_in(Box.whole(tensor.shape))])
    assert target.nbytes <= count <= most * target.nbytes


def test_a_file_that_was_cut_meanwhile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    file = stored(path, w=torch.zeros(100))
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(CheckpointError, match=r"x.safetensors: ends at byte .*, inside a tensor"):
        file.read("w", Box.whole((100,)), torch.empty(100))


def test_its_descriptor_is_closed_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed = [], []
    file = stored(tmp_path / "x.safetensors", w=torch.zeros(1))
    monkeypatch.setattr(os, "open", lambda *args, _open=os.open: opened.append(_open(*args)) or opened[-1])
    monkeypatch.setattr(
        os, "close", lambda descriptor, _close=os.close: (closed.append(descriptor), _close(descriptor))
    )
    file = StoredTensors(file.path, Scratch())
    assert (len(opened), closed) == (1, [])
    del file
    assert closed == opened


def with_header(path: Path, header: object, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({"a": entry(0, 4, [1])}, None),  # bytes after the last tensor
        ({"a": entry(0, 12, [3])}, None),  # a tensor behind the end
        ({"a": entry(4, 8, [1])}, None),  # a hole
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, None),  # an overlap
        ({"a": entry(0, 8, [1])}, None),  # more bytes than elements
        ({"a": entry(0, 8, [2], "F31")}, None),
        ({"a": entry(0, 8, [-2])}, None),
        ({"a": {**entry(0, 8, [2]), "module": "os"}}, None),
        ({"a": 1}, None),
        ([], None),
        (b"{", None),
        (b"\xff\xff", None),
        (b"[" * 100_000, None),
        ({"a": entry(0, 8, [2])}, 1 << 62),
        ({"a": entry(0, 8, [2])}, 0),
        (b"", None),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, length: int | None) -> None:
    """The stock library refuses the same files."""
    path = tmp_path / "x.safetensors"
    assert StoredTensors(with_header(path, {"a": entry(0, 8, [2])}), Scratch()).tensors["a"].shape == (2,)
    with_header(path, header, length=length)
    with pytest.raises((ValueError, RecursionError)):
        StoredTensors(path, Scratch())
    if not (isinstance(header, dict) and "module" in str(header)):
        with pytest.raises(SafetensorError):
            safe_open(path, framework="pt")

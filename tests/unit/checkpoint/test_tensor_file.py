"""The files that we write are those of the stock safetensors library."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmtrain.checkpoint.tensor_file import DTYPE_NAMES, PAGE_BYTES, iter_chunks, tensor_file_header, write_tensor_file
from tests.unit.checkpoint.saved import bits


def sample_tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    tensors = {name: torch.randint(0, 2, (3, 5), generator=draw).to(dtype) for dtype, name in DTYPE_NAMES.items()}
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    tensors["transposed"] = torch.randn(4, 6, generator=draw).t()
    tensors["strided"] = torch.randn(8, 6, generator=draw)[::2, 1:4]
    tensors["learned"] = torch.randn(3, generator=draw).requires_grad_()
    tensors['a "name" with \\ and é'] = torch.arange(7, dtype=torch.int8)
    return tensors


def test_the_stock_library_reads_every_type_and_shape(tmp_path: Path) -> None:
    tensors, path = sample_tensors(), tmp_path / "x.safetensors"
    written = write_tensor_file(path, tensors, {"format": "pt", "note": "é"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(loaded[key]) == bits(tensor.detach()), key
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    content = path.read_bytes()
    assert (written.size_bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_data_has_the_place_that_the_stock_library_gives_it(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.arange(3.0), "c": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "stock.safetensors")
    write_tensor_file(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    stock, ours = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("stock", "ours"))
    assert stock[8 + int.from_bytes(stock[:8], "little") :] == ours[8 + int.from_bytes(ours[:8], "little") :]


def test_contiguous_memory_is_not_copied() -> None:
    tensor = torch.arange(1024.0)
    chunks = list(iter_chunks({"x": tensor}, {}))
    tensor[0] = 77.0
    assert torch.frombuffer(chunks[1], dtype=torch.float32)[0] == 77.0


def test_header_is_aligned_and_bounded_by_its_length() -> None:
    for size in range(1, 12):
        header = tensor_file_header({"x" * size: torch.zeros(1)}, {})
        assert len(header) % PAGE_BYTES == 0
        assert int.from_bytes(header[:8], "little") == len(header) - 8


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_tensor_file(path, {"x": torch.zeros(1)}, {})
    assert path.read_bytes() == b"precious"

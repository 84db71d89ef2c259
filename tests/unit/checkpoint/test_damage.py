"""Every byte counts: what happens to a checkpoint on storage is found before it is used."""

import random
from pathlib import Path

import pytest

from llmtrain.checkpoint.find import find_newest_valid
from llmtrain.checkpoint.manifest import CheckpointUnusableError
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.errors import CheckpointError
from tests.unit.checkpoint.saved import save


def test_a_hundred_random_flips_over_all_files_are_all_detected(tmp_path: Path) -> None:
    path, draw = save(tmp_path, 7), random.Random(5)
    files = sorted(path.iterdir())
    assert {file.name for file in files} == {
        "rank-00000.safetensors", "config.yaml", "state.json", "manifest.json", "manifest.json.sha256",
    }  # fmt: skip
    for turn in range(100):
        file = files[turn % len(files)]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"sha256 is [0-9a-f]{64}, .* says "):
            open_checkpoint(path)
        file.write_bytes(content)
    open_checkpoint(path)


def test_a_flip_in_a_tensor_is_named_with_both_hashes(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(file) in str(caught.value)
    assert "checkpoint list" in str(caught.value)
    # Other ranks rely on the one that hashed; headers are intact, so only the hash can tell.
    open_checkpoint(path, verify=False)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "config.yaml", "state.json", "manifest.json"])
def test_truncated_and_missing_files_are_detected(tmp_path: Path, name: str, verify: bool) -> None:
    path = save(tmp_path, 7)
    file = path / name
    content = file.read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(path, verify=verify)
    file.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path, verify=verify)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: is missing"):
        open_checkpoint(path, verify=verify)


def test_small_files_are_hashed_even_without_verify(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("1792", "1793"))
    with pytest.raises(CheckpointError, match="sha256"):
        open_checkpoint(path, verify=False)


def test_files_that_the_manifest_does_not_list_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    for name in ("rank-00001.safetensors", ".hidden", "notes.txt"):
        (path / name).write_text("")
        with pytest.raises(CheckpointError, match=f"{name}: is not listed"):
            open_checkpoint(path)
        (path / name).unlink()
    (path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder: is not listed"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "manifest.json", "manifest.json.sha256"])
def test_a_folder_in_place_of_a_file_is_damage(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    file = save(tmp_path, 7) / name
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: (is not a plain file|cannot be read)") as caught:
        open_checkpoint(tmp_path / "step-00000007")
    assert not isinstance(caught.value, CheckpointUnusableError)
    reader, damaged = find_newest_valid(tmp_path, lambda _: None)
    assert reader is not None
    assert (reader.step, [path.name for path, _ in damaged]) == (5, ["step-00000007"])


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    file = path / "rank-00000.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not a plain file"):
        open_checkpoint(path)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    (path / "extra").write_text("")
    (path / "config.yaml").unlink()
    (path / "state.json").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert all(name in str(caught.value) for name in ("extra", "config.yaml", "state.json"))

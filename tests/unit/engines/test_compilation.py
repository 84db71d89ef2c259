"""Compiled layers: nothing is unpickled from disk, and nobody else's files are used."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import nn

from llmtrain.engines.compilation import compile_layers
from llmtrain.models.compiled_graphs import CACHE_VARIABLE


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home without a cache, and PyTorch's settings as they are by default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.delenv(CACHE_VARIABLE)
    with inductor_config.patch(fx_graph_cache=True), functorch_config.patch(enable_autograd_cache=True):
        yield tmp_path / "llmtrain" / "compiled"


def test_no_graph_is_unpickled_and_kernels_lie_in_a_private_folder(untouched: Path) -> None:
    compile_layers([nn.Linear(2, 2)])
    assert not inductor_config.fx_graph_cache
    assert not functorch_config.enable_autograd_cache
    assert os.environ[CACHE_VARIABLE] == str(untouched)
    assert untouched.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_to_is_closed(untouched: Path) -> None:
    untouched.mkdir(parents=True)
    untouched.chmod(0o777)
    compile_layers([])
    assert untouched.stat().st_mode & 0o777 == 0o700


def test_the_users_own_folder_is_used(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/scratch/compiled")
    compile_layers([])
    assert os.environ[CACHE_VARIABLE] == "/scratch/compiled"
    assert not untouched.exists()

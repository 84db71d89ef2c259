"""A tokenizer whose ids fit the tiny models, and a text to measure them on."""

import sysconfig
from pathlib import Path

import pytest

from tests.support.readers import use_compressed_tensors
from tests.unit.interop.conftest import few_texts, small_tokenizer

__all__ = ["few_texts", "small_tokenizer"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text("utf-8").encode("ascii", "ignore").decode()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(letter for letter in text if letter in "abcdefghij \n")[:4000], "utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def judge() -> None:
    use_compressed_tensors()

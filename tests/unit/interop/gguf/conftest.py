"""llama.cpp where it is installed, and little text to compare on."""

import pytest

from llmtrain.interop import hf_export
from llmtrain.interop.gguf import export
from tests.support.readers import use_llama_cpp


@pytest.fixture(autouse=True)
def few_texts_for_gguf(few_texts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "real_texts", lambda: hf_export.real_texts())


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    use_llama_cpp(monkeypatch)

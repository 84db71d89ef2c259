import pytest


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even in short sequences, of which the last is not whole."""
    monkeypatch.setattr("llmtrain.models.attention.patterns.QUERY_BLOCK", 7)
    monkeypatch.setattr("llmtrain.models.attention.linear.CHUNK", 7)

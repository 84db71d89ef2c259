"""Ids of special tokens and the size of the vocabulary are filled in before a run, or said to be wrong."""

import shutil
from pathlib import Path

import pytest
import tokenizers

from llmtrain.config.reading.load import load_config
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.manifest import file_sha256
from llmtrain.errors import ConfigError, DataError
from llmtrain.preflight.resolve import resolve
from llmtrain.preflight.storage import check_storage, load_run
from tests.support.run_files import write_data_set, write_good_run
from tests.support.tokenizers import train_sentencepiece
from tests.unit.train.saved_run import save_of_run

PLAIN = 300
MASKED, T5, FIM = (
    ("model.family=encoder", "data.objective=masked"),
    ("model.family=encoder_decoder", "data.objective=span_corruption"),
    ("data.objective=fim",),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["some text to be learned, and some more"] * 20, "bpe", PLAIN))
    return path


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    use_tokenizer(model)
    return tmp_path


def use_tokenizer(path: Path, vocab_size: int = PLAIN) -> None:
    """Write the good run's data set anew, as if made with a tokenizer, which lies beside it."""
    shutil.rmtree("shards")
    write_data_set(Path("shards/train"), vocab_size=vocab_size, tokenizer_sha256=file_sha256(path))
    shutil.copyfile(path, Path("shards") / f"tokenizer{path.suffix}")


def use_json(path: Path, names: list[str]) -> int:
    """A word-level tokenizer.json with special tokens; returns the size of its vocabulary."""
    plain = [f"word{number}" for number in range(20)]
    vocabulary = {piece: number for number, piece in enumerate([*plain, "</s>", *names])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.add_special_tokens(["</s>", *names])
    tokenizer.save(str(path))
    use_tokenizer(path, len(vocabulary))
    return len(vocabulary)


def filled(*overrides: str) -> RunConfig:
    """As `train` makes it."""
    return load_run(Path("run.yaml"), overrides).config


def problems(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        filled(*overrides)
    return {problem.key: problem.message for problem in raised.value.problems}


def test_causal_needs_none(folder: Path) -> None:
    config = filled()
    assert config.model.vocab_size == PLAIN
    assert config.data.special_tokens.model_dump() == {"mask": None, "pad": None, "sentinels": None}


def test_the_mask_is_the_tokenizer_s(folder: Path) -> None:
    config = filled(*MASKED)
    assert (config.model.vocab_size, config.data.special_tokens.mask) == (PLAIN, 4)
    assert config.data.special_tokens.sentinels is None


def test_sentinels_lie_above_the_pieces(folder: Path) -> None:
    config = filled(*T5)
    assert config.data.special_tokens.sentinels == tuple(range(PLAIN, PLAIN + 100))
    assert (config.model.vocab_size, config.data.special_tokens.pad) == (PLAIN + 100, 0)
    assert (filled(*FIM).model.vocab_size, filled(*FIM).data.special_tokens.pad) == (PLAIN + 3, None)


def test_what_is_saved_says_them_and_means_the_same(folder: Path) -> None:
    config = filled(*T5)
    Path("saved.yaml").write_text(to_yaml(config), "utf-8")
    saved = load_run(Path("saved.yaml"), ()).config
    assert saved == config == resolve(saved).config


def test_more_sentinels_than_a_hundred_where_they_are_needed(folder: Path) -> None:
    config = filled(
        *T5, "data.seq_len=400", "model.max_seq_len=1024", "data.span_corruption={density: 0.5, mean_length: 1.0}"
    )
    assert config.data.special_tokens.sentinels == tuple(range(PLAIN, PLAIN + 200))


def test_ids_of_the_user_are_kept(folder: Path) -> None:
    """T5's own: a hundred from 32099 down, in a vocabulary of 32128."""
    ids = list(range(32099, 31999, -1))
    given = (*T5, f"data.special_tokens.sentinels={ids}", "model.vocab_size=32128")
    config = filled(*given)
    assert config.data.special_tokens.sentinels == tuple(ids) and config.model.vocab_size == 32128
    assert filled(*given[:-1]).model.vocab_size == 32100
    message = problems(*given[:-1], "model.vocab_size=32099")["model.vocab_size"]
    assert f"has {PLAIN} tokens" in message and "ids up to 32099. Try model.vocab_size=32100" in message


def test_a_vocabulary_must_have_the_sentinels(folder: Path) -> None:
    message = problems(*T5, "model.vocab_size=300")["model.vocab_size"]
    assert "data.objective = span_corruption uses ids up to 399. Try model.vocab_size=400, or null" in message


def test_a_sentinel_is_no_piece_of_text(folder: Path) -> None:
    message = problems(*T5, "data.special_tokens.sentinels=[300, 301, 299]")["data.special_tokens.sentinels"]
    assert message.startswith("299 is the piece ") and "which texts contain" in message and "one from 300 on" in message
    assert "ends every document" in problems(*MASKED, "data.special_tokens.mask=3")["data.special_tokens.mask"]
    assert filled(*MASKED, "data.special_tokens.mask=5").data.special_tokens.mask == 5
    assert filled(*T5, "data.special_tokens.pad=3").data.special_tokens.pad == 3, "as good a start as any"


def test_a_tokenizer_without_mask_or_pad(folder: Path) -> None:
    size = use_json(folder / "tokenizer.json", [])
    for overrides, name in ((MASKED, "mask"), (T5, "pad")):
        message = problems(*overrides)[f"data.special_tokens.{name}"]
        assert f"needs a {name} token" in message and f"Try data.special_tokens.{name}={size}" in message
        config = filled(*overrides, f"data.special_tokens.{name}={size}")
        if name == "mask":
            assert config.model.vocab_size == size + 1
        else:
            assert config.data.special_tokens.sentinels == tuple(range(size + 1, size + 101))


def test_sentinels_of_a_tokenizer_are_found_by_name(folder: Path) -> None:
    size = use_json(folder / "tokenizer.json", ["<pad>", *(f"<extra_id_{number}>" for number in reversed(range(100)))])
    config = filled(*T5)
    assert config.data.special_tokens.sentinels == tuple(range(size - 1, size - 101, -1))
    assert config.model.vocab_size == size
    size = use_json(folder / "tokenizer.json", ["<fim_suffix>", "<fim_prefix>", "<fim_middle>"])
    assert filled(*FIM).data.special_tokens.sentinels == (size - 2, size - 1, size - 3)


def test_the_tokenizer_must_be_there_and_the_right_one(folder: Path) -> None:
    Path("shards/tokenizer.model").write_text("another")
    with pytest.raises(DataError, match=r"shards/tokenizer.model: expected sha256 \w+, actual"):
        filled(*MASKED)
    named = (*MASKED, "data.tokenizer=shards/tokenizer.model")
    assert "is not the tokenizer that" in problems(*named)["data.tokenizer"]
    Path("shards/tokenizer.model").unlink()
    for overrides in (MASKED, ()):
        assert "neither it nor the folder above holds one of" in problems(*overrides)["data.tokenizer"]


def test_a_run_goes_on_with_the_special_tokens_of_its_checkpoint(folder: Path) -> None:
    """What is filled in is compared, and what cannot be filled in is no difference."""
    save_of_run(10, *T5)
    assert check_storage(load_config(Path("run.yaml"), T5).config).problems == []
    changed = load_config(Path("run.yaml"), (*T5, "data.special_tokens.pad=5")).config
    (problem,) = check_storage(changed).problems
    assert problem.key == "data.special_tokens.pad" and "has 0. Set it back" in problem.message
    Path("shards/tokenizer.model").unlink()
    assert [problem.key for problem in check_storage(load_config(Path("run.yaml"), T5).config).problems] == [
        "data.tokenizer"
    ]
    shutil.rmtree("shards")
    assert [problem.key for problem in check_storage(load_config(Path("run.yaml"), T5).config).problems] == [
        "data.train.0.path"
    ]

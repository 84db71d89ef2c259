"""What a run was trained on: data sets and tokenizer are known by their content, wherever they lie."""

import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from llmtrain.config.reading.load import load_config
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.data.storage.manifest import ShardEntry, file_sha256, read_manifest, write_manifest
from llmtrain.errors import ConfigError
from llmtrain.preflight import differences
from llmtrain.preflight.data_identity import data_record
from llmtrain.preflight.resolve import ResolvedRun, resolve
from llmtrain.runs.audit import iter_events
from llmtrain.runs.folder import RunFolder
from llmtrain.train.start import find_start
from tests.support.datasets import UNREAD_TOKENIZER
from tests.support.run_files import write_data_set, write_good_run
from tests.unit.checkpoint.saved import save
from tests.unit.train.saved_run import check, save_import, save_of_run, start

TOKENIZER = sha256(UNREAD_TOKENIZER).hexdigest()[:12]

NEWEST = "runs/small/checkpoints/step-00000010"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The good run with a checkpoint of step 10."""
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    save_of_run(10)
    return tmp_path


def rewrite_shards(folder: Path, *shards: ShardEntry) -> None:
    """Other shards in a data set's manifest."""
    write_manifest(folder, replace(read_manifest(folder), shards=shards))


def shard(number: int, content: str) -> ShardEntry:
    return ShardEntry(f"{number}.tar", 1, content * 64, f"{number}.idx", "0" * 64, samples=10, tokens=1000)


def test_a_moved_data_set_is_no_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(folder / "shards", folder / "elsewhere")
    entry = read_manifest(folder / "elsewhere/train").shards[0]
    rewrite_shards(folder / "elsewhere/train", replace(entry, file="renamed.tar", index_file="renamed.idx"))
    moved = "data.train.0.path=elsewhere/train"
    assert check(capsys, moved) == (0, "")
    assert start(moved).step == 10


@pytest.mark.parametrize("change", ["one more", "one less", "other order", "other tokens"])
def test_a_changed_data_set_is_refused(change: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three = [shard(0, "a"), shard(1, "b"), shard(2, "c")]
    rewrite_shards(folder / "shards/train", *three)
    save_of_run(20)
    assert check(capsys) == (0, "")
    after = {
        "one more": [*three, shard(3, "d")],
        "one less": three[:2],
        "other order": [three[1], three[0], three[2]],
        "other tokens": [*three[:2], shard(2, "d")],
    }
    rewrite_shards(folder / "shards/train", *after[change])
    code, err = check(capsys)
    assert code == 2
    assert err.startswith("error: data.train.0.path = shards/train (run.yaml:8): its content has sha256 ")
    assert "the checkpoint runs/small/checkpoints/step-00000020 was trained on shards/train with " in err
    assert err.endswith("1 problem in run.yaml; nothing was started.\n")
    with pytest.raises(ConfigError, match="its content has sha256"):
        start()
    for allowed in ("data.train", "data.train.0.path", "data"):
        assert check(capsys, f"checkpoint.allow_change=[{allowed}]") == (0, "")


def test_a_mixture_s_sources_shares_and_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data_set(folder / "shards/more", tokens=2000)

    def mixture(*sources: tuple[str, int]) -> str:
        return f"data.train=[{', '.join(f'{{path: shards/{name}, weight: {weight}}}' for name, weight in sources)}]"

    save_of_run(20, mixture(("train", 2), ("more", 4)))
    assert check(capsys, mixture(("train", 1), ("more", 2))) == (0, "")

    code, err = check(capsys, mixture(("train", 1), ("more", 3)))
    assert code == 2 and "data.train.0.weight = 1" in err and "step-00000020 has 4." in err
    code, err = check(capsys, mixture(("more", 2), ("train", 4)))
    assert code == 2 and "data.train.0.path = shards/more" in err and "data.train.1.path = shards/train" in err
    code, err = check(capsys)
    assert code == 2 and 'was trained on ["shards/train", "shards/more"]' in err
    assert "allow_change=[data.train]." in err


def test_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = folder / "other.model"
    tokenizer.write_text("other pieces")
    write_data_set(folder / "shards/other", vocab_size=301, tokenizer_sha256=file_sha256(tokenizer))
    others = ("data.train.0.path=shards/other", "data.tokenizer=other.model")
    code, err = check(capsys, *others)
    assert code == 2
    told = file_sha256(tokenizer)[:12]
    assert f"data.tokenizer = other.model (command line): the tokenizer of shards/other has sha256 {told}" in err
    assert f"that of the checkpoint {NEWEST} has {TOKENIZER}. " in err
    assert "model.vocab_size = 301 (default): the checkpoint" in err
    assert err.endswith("3 problems in run.yaml; nothing was started.\n")


def test_imported_weights_need_their_shape_and_tokenizer_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(Path("run.yaml"), ["model.vocab_size=300"]).config
    save_import(folder / "weights", to_yaml(config))
    resume = ("name=tuned", "checkpoint.resume=weights")
    assert check(capsys, *resume, "seed=7", "data.seq_len=32", "model.dropout=0.1") == (0, "")
    with RunFolder(Path("runs/tuned")) as held:
        find_start(resolved(*resume, "seed=7", "model.dropout=0.1"), held)
    assert "model.dropout 0.0 -> 0.1\n" in capsys.readouterr().err
    assert list(iter_events(Path("runs/tuned"))) == []

    code, err = check(capsys, *resume, "model.num_layers=3")
    assert code == 2 and "model.num_layers = 3 (command line): the checkpoint" in err
    (folder / "weights/tokenizer.json").write_text("{}")
    code, err = check(capsys, *resume)
    assert code == 2 and f"the tokenizer of shards/train has sha256 {TOKENIZER}" in err
    write_data_set(folder / "fitting", tokenizer_sha256=file_sha256(folder / "weights/tokenizer.json"))
    fitting = ("data.train.0.path=fitting", "data.tokenizer=weights/tokenizer.json")
    assert check(capsys, *resume, *fitting) == (0, "")


def test_without_the_hashes_a_changed_data_set_would_go_unseen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the tests above see refused is refused for its content, and for nothing else."""
    rewrite_shards(folder / "shards/train", shard(0, "b"))
    assert check(capsys)[0] == 2
    monkeypatch.setattr(differences, "_source_differences", lambda origin, config, manifests: [])
    assert check(capsys) == (0, "")
    assert start().step == 10


def test_what_an_address_hides_is_not_written_down() -> None:
    config = load_config(Path("run.yaml"), ["data.train.0.path='https://me:secret@host/shards'"]).config
    record = data_record(config, [read_manifest("shards/train")])
    assert "host/shards" in record["sources"][0]["path"]
    assert "secret" not in str(record)


def resolved(*overrides: str) -> ResolvedRun:
    return resolve(load_config(Path("run.yaml"), overrides).config)


def save_before_windows(folder: Path) -> None:
    """A checkpoint of step 20 as it was written when data.windows was no key."""
    text = to_yaml(resolved().config)
    assert "  windows: continuous\n" in text
    config_text = text.replace("  windows: continuous\n", "")
    save(Path("runs/small/checkpoints"), 20, config_text=config_text, about=start_about(folder))


def test_a_run_from_before_windows_crossed_shards_goes_on_with_its_samples(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, and it is not told to set a key; new runs of the same file cross the ends of shards."""
    assert resolved().config.data.windows == "continuous"
    save_before_windows(folder)
    assert check(capsys) == (0, "")
    again = resolved()
    assert again.config.data.windows == "per_shard"
    assert resolved("name=new").config.data.windows == "continuous"
    with RunFolder(Path("runs/small")) as held:
        assert find_start(again, held).step == 20
    save(Path("runs/small/checkpoints"), 30, config_text=to_yaml(again.config), about=start_about(folder))
    assert resolved().config.data.windows == "per_shard"  # and says so from then on


def test_other_windows_than_before_are_refused_until_allowed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_before_windows(folder)
    code, err = check(capsys, "data.windows=continuous")
    assert code == 2
    assert "data.windows = continuous (command line): the checkpoint " in err and "has per_shard" in err
    assert check(capsys, "data.windows=continuous", "checkpoint.allow_change=[data.windows]") == (0, "")
    with pytest.raises(ConfigError, match="has per_shard"):  # a rank looks for itself
        start("data.windows=continuous")


def start_about(folder: Path) -> dict[str, object]:
    return {"data": data_record(load_config(Path("run.yaml")).config, [read_manifest(folder / "shards/train")])}

"""What a run misses on storage is found before it starts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.cli import main
from llmtrain.config.parameters import num_parameters
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.manifest import ShardEntry, file_sha256, read_manifest, write_manifest
from llmtrain.data.stream import DataUse
from llmtrain.errors import ConfigError, DataError
from llmtrain.preflight.dry_run import plan_dry_run
from llmtrain.preflight.resolve import resolve
from llmtrain.preflight.source_use import source_uses
from llmtrain.preflight.storage import check_storage, load_run, storage_warnings
from tests.support.http_folder import serve
from tests.support.run_files import write_data_set, write_good_run
from tests.unit.train.saved_run import save_import, save_of_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    return tmp_path


def run(*overrides: str) -> RunConfig:
    return load_config(Path("run.yaml"), overrides).config


def problems(*overrides: str) -> dict[str, str]:
    return {problem.key: problem.message for problem in check_storage(run(*overrides)).problems}


def test_a_good_run_misses_nothing(folder: Path) -> None:
    assert problems() == {}


def test_a_folder_without_manifest(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "no manifest.json" in problems("data.train.0.path=empty")["data.train.0.path"]


def test_the_folder_above_a_data_set_leads_to_it(folder: Path) -> None:
    assert "Try shards/train." in problems("data.train.0.path=shards")["data.train.0.path"]


def test_a_file_is_no_data_set(folder: Path) -> None:
    assert "is a file" in problems("data.train.0.path=run.yaml")["data.train.0.path"]


def test_a_damaged_manifest_is_no_fault_of_the_config(folder: Path) -> None:
    (folder / "shards/train/manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json"):
        problems()


def test_every_source_needs_one_sample(folder: Path) -> None:
    write_data_set(folder / "short", tokens=54)  # with the ends of 10 documents one token less than 65
    write_data_set(folder / "enough", tokens=55)
    found = problems("data.valid=[{path: short}, {path: enough}]")
    assert list(found) == ["data.valid.0.path"]
    assert "Try data.seq_len=63 or less" in found["data.valid.0.path"]
    shards = [ShardEntry(f"{n}.tar", 1, "0" * 64, f"{n}.idx", "0" * 64, samples=1, tokens=39) for n in range(2)]
    write_manifest(folder / "short", replace(read_manifest(folder / "short"), shards=tuple(shards)))
    assert list(problems("data.valid=[{path: short}]")) == []  # two shards of 40 tokens hold one sample of 65
    found = problems("data.valid=[{path: short}]", "data.windows=per_shard")
    assert "holds no shard with the 65 tokens" in found["data.valid.0.path"]
    assert "Try data.seq_len=39 or less" in found["data.valid.0.path"]


@pytest.mark.parametrize("change", [{"vocab_size": 301}, {"tokenizer_sha256": "b" * 64}])
def test_sources_must_share_a_tokenizer(folder: Path, change: dict[str, Any]) -> None:
    write_data_set(folder / "other", **change)
    found = problems("data.valid=[{path: other}]")
    assert "data.train.0.path = shards/train" in found["data.valid.0.path"]


def test_vocab_size_must_be_the_data_s(folder: Path) -> None:
    assert problems("model.vocab_size=300") == {}
    assert "Try model.vocab_size=300" in problems("model.vocab_size=299")["model.vocab_size"]


def test_the_tokenizer_must_be_there_and_the_right_one(folder: Path) -> None:
    (folder / "shards/tokenizer.model").write_text("pieces")
    assert "Try shards/tokenizer.model." in problems("data.tokenizer=tokenizer.model")["data.tokenizer"]
    assert "not the tokenizer" in problems("data.tokenizer=shards/tokenizer.model")["data.tokenizer"]
    write_data_set(folder / "other", tokenizer_sha256=file_sha256(folder / "shards/tokenizer.model"))
    assert problems("data.tokenizer=shards/tokenizer.model", "data.train.0.path=other") == {}


def test_output_dir_must_be_a_folder_that_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "run.yaml is a file" in problems("output_dir=run.yaml/runs")["output_dir"]
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the rights of a test's user are not ours to choose
    assert "may not be written" in problems()["output_dir"]


def test_resume_names_something_that_exists(folder: Path) -> None:
    assert "no such checkpoint" in problems("checkpoint.resume=gone")["checkpoint.resume"]
    assert "neither a checkpoint nor a run" in problems("checkpoint.resume=shards/train")["checkpoint.resume"]


@pytest.mark.parametrize(
    ("resume", "near"),
    [
        ("runs/good", None),
        ("runs/good/checkpoints", None),
        ("runs/good/checkpoints/step-00000020", None),
        ("runs/good/checkpoints/step-00000030", "runs/good/checkpoints/step-00000020"),
        ("runs/good/checkpoints/step-00000099", "runs/good/checkpoints/step-00000100"),
        ("runs/good/checkpoints/newest", "runs/good/checkpoints/step-00000100"),
        ("runs/good/checkpoints/step-00000020/manifest.json", "runs/good/checkpoints/step-00000020"),
        ("runs/god", "runs/good"),
        ("runs/god/checkpoints/step-00000020", "runs/good"),
        ("runs", "runs/good"),
    ],
)
def test_resume_leads_to_the_nearest_checkpoint(folder: Path, resume: str, near: str | None) -> None:
    for step in (20, 100):
        (folder / f"runs/good/checkpoints/step-{step:08d}").mkdir(parents=True)
    (folder / "runs/empty").mkdir()
    found = problems(f"checkpoint.resume={resume}")
    assert found == {} if near is None else f"Try {near}." in found["checkpoint.resume"]


def test_resume_from_a_hugging_face_folder_names_the_import(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text("{}")
    assert "llmtrain import hf OUT" in problems("checkpoint.resume=hf")["checkpoint.resume"]


def test_vocab_size_comes_from_the_manifest(folder: Path) -> None:
    config = run()
    assert config.model.vocab_size is None
    assert resolve(config).config.model.vocab_size == 300
    assert resolve(run("model.vocab_size=7")).config.model.vocab_size == 7


def test_outline(folder: Path) -> None:
    outline = plan_dry_run(resolve(run("train.global_batch_size=16", "launch.num_workers=2")))
    assert (outline.data_parallel_size, outline.micro_batches_per_rank) == (2, 2)
    assert outline.tokens == 10 * 16 * 64
    assert outline.run_folder == "runs/small"


def test_what_a_run_makes_of_its_data(folder: Path) -> None:
    """1,010 tokens with ends of sequence, in samples of 64: 80 samples of the run are five times through."""
    write_data_set(folder / "more", tokens=3000)
    two = "data.train=[{path: shards/train}, {path: more, weight: 3}]"
    config = run(two, "data.valid=[{path: shards/train}]", "evaluate.steps=1")
    first, second, valid = source_uses(resolve(config))
    assert (first.use.tokens, first.use.samples, first.use.unused_tokens) == (1010, 1010 / 64, 0)
    assert (first.epochs, second.epochs) == (pytest.approx(20 * 64 / 1010), pytest.approx(60 * 64 / 3010))
    assert (valid.split, valid.epochs) == ("valid", pytest.approx(8 * 64 / 1010))
    first, second = source_uses(resolve(run(two, "data.windows=per_shard")))
    assert first.use == DataUse(tokens=1010, samples=15, unused_tokens=1010 - 15 * 64 - 1)
    assert second.use == DataUse(tokens=3010, samples=47, unused_tokens=3010 - 47 * 64 - 1)


def test_the_outline_tells_sizes_that_are_those_of_the_files(folder: Path) -> None:
    """Weights and moments, with the rows that pad the vocabulary, as they lie in a checkpoint."""
    outline = plan_dry_run(resolve(run()))
    padding = (384 - 300) * 64
    assert outline.checkpoint_bytes == 12 * (outline.parameters + padding)
    assert outline.memory.held == 16 * outline.parameters


def test_a_dry_run_says_where_the_run_would_begin(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def starts(*overrides: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["train", "run.yaml", "--dry-run", *overrides])
        out, err = capsys.readouterr()
        assert ended.value.code in (0, None), err
        return next(line for line in out.splitlines() if line.startswith("starts")).partition(" ")[2].strip()

    assert starts() == "at step 1, from new weights"
    save_of_run(6, state=state_after(6))
    newest = save_of_run(8, state=state_after(8))
    assert starts() == f"at step 9: continues {newest}"
    assert starts("train.steps=8") == f"nothing is left to do: {newest} is at step 8. More than 8 steps go on"
    assert starts("name=other") == "at step 1, from new weights"
    assert starts("name=other", f"checkpoint.resume={newest}") == f"at step 9: continues {newest} of another run"
    (newest / "manifest.json").unlink()
    assert "at step 7" in starts(), "the one before, as a start would"
    imported = save_import(Path("imported"), (newest / "config.yaml").read_text())
    assert starts("name=tuned", "checkpoint.resume=imported") == f"at step 1, with the weights of {imported}"


def state_after(step: int) -> dict[str, Any]:
    return {"train": {"step": step, "samples": 8 * step, "tokens": 512 * step}, "engine": {}}


def test_checkpoints_that_do_not_fit_are_told_with_their_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(run("train.steps=100", "checkpoint.every_steps=10", "checkpoint.keep=3")).config
    size = 12 * num_parameters(config.model)

    def free(count: float) -> tuple[dict[str, str], list[str]]:
        usage = SimpleNamespace(free=int(count * size))
        monkeypatch.setattr("llmtrain.checkpoint.folders.shutil.disk_usage", lambda _: usage)
        return {problem.key: problem.message for problem in check_storage(config).problems}, storage_warnings(config)

    found, _ = free(1.9)
    assert list(found) == ["output_dir"]
    for part in (f"{2 * size:,} bytes", f"{size:,} bytes", f"{int(1.9 * size):,} bytes", "runs/small/checkpoints"):
        assert part in found["output_dir"]
    found, warnings = free(3.9)
    assert found == {}
    assert f"{4 * size:,} bytes) more" in warnings[0]
    assert "checkpoint.keep" in warnings[0]
    assert free(4) == ({}, [])

    (folder / "runs/small/checkpoints/step-00000010").mkdir(parents=True)
    assert list(free(0.9)[0]) == ["output_dir"]
    assert free(1)[0] == {}
    (folder / "runs/small/checkpoints/step-00000100").mkdir(parents=True)
    assert free(0) == ({}, []), "a finished run saves nothing"


def test_a_remote_manifest_is_read_and_a_missing_one_is_told_as_a_local_one(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("llmtrain.data.storage.remote.FIRST_PAUSE_SECONDS", 0.001)
    served = tmp_path_factory.mktemp("served")
    (served / "tokenizer.model").write_text("pieces")
    write_data_set(served / "train", tokenizer_sha256=file_sha256(served / "tokenizer.model"))
    with serve(served) as server:
        cache = f"data.cache_dir={folder / 'cache'}"
        assert problems(f"data.train.0.path={server.url}/train", cache) == {}
        assert resolve(run(f"data.train.0.path={server.url}/train", cache)).config.model.vocab_size == 300

        secret = server.url.replace("//", "//user:canary@") + "/gone?key=canary"
        with pytest.raises(ConfigError) as raised:
            load_run(Path("run.yaml"), [f"data.train.0.path={secret}", cache])
        (problem,) = raised.value.problems
        assert problem.key == "data.train.0.path" and problem.where == "command line"
        assert problem.value == f"{server.url}/gone" and "404" in problem.message and "canary" not in str(raised.value)

        server.forever["manifest.json"] = "500"
        found = problems(f"data.train.0.path={server.url}/train", cache, "data.fetch_attempts=2")
        assert "answers 500 (2 attempts)" in found["data.train.0.path"]
        server.forever.clear()
        (served / "tokenizer.model").unlink()
        found = problems(f"data.train.0.path={server.url}/train", f"data.cache_dir={folder / 'other'}")
        assert "Set data.tokenizer" in found["data.tokenizer"]


@pytest.mark.parametrize("path", ["pipe:cat shards", "ftp://host/data", "file:///data"])
def test_other_schemes_are_refused_before_anything_is_opened(folder: Path, path: str) -> None:
    found = problems(f"data.train.0.path={path}", f"data.valid=[{{path: '{path}'}}]")
    assert list(found) == ["data.train.0.path", "data.valid.0.path"]
    assert "Allowed are https://, http://, s3://, gs://, hf://" in found["data.train.0.path"]

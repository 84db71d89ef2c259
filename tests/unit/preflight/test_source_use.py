"""Whether sources last, when they leave the mixture, and what a run that continues may change of it."""

from pathlib import Path

import pytest

from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.preflight.dry_run import find_continuation, plan_dry_run
from llmtrain.preflight.resolve import resolve
from llmtrain.preflight.source_use import source_uses, use_notes
from llmtrain.preflight.storage import check_storage
from tests.support.datasets import UNREAD_TOKENIZER, random_documents, write_dataset
from tests.support.run_files import write_data_set, write_good_run
from tests.unit.train.saved_run import check, save_of_run

RAMP = "train.batch_ramp=[{from_step: 5, global_batch_size: 16}]"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten steps of eight samples of 64 tokens, on 1,010 tokens and on 3,010."""
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    write_data_set(tmp_path / "more", tokens=3000)
    return tmp_path


def run(*overrides: str) -> RunConfig:
    return load_config(Path("run.yaml"), overrides).config


def problems(*overrides: str) -> dict[str, str]:
    return {problem.key: problem.message for problem in check_storage(run(*overrides)).problems}


def two(first: str, second: str = "") -> str:
    return f"data.train=[{{path: shards/train{first}}}, {{path: more{second}}}]"


def test_a_source_that_ends_leaves_the_others(folder: Path) -> None:
    config = run(two(", max_samples: 20, weight: 3"))
    first, second = source_uses(resolve(config))
    assert (first.epochs, second.epochs) == (20 / (1010 / 64), 60 / (3010 / 64))
    assert (first.leaves_at_step, second.leaves_at_step) == (4, None)  # its last sample is number 25
    assert list(use_notes([first, second])) == [
        "shards/train: has given all that it may in step 4; the others go on without it"
    ]
    assert problems(two(", max_samples: 20, weight: 3")) == {}
    assert source_uses(resolve(run(two(", max_samples: 200"))))[0].leaves_at_step is None


@pytest.mark.parametrize(
    ("limit", "samples", "fitting"),
    [
        ("max_samples: 41", 41, 5),
        ("max_epochs: 2", (2 * 1010 - 1) // 64, 3),
        ("max_tokens: 5000", 5000 // 64, 9),
        ("max_tokens: 5000, max_epochs: 3, max_samples: 1000", (3 * 1010 - 1) // 64, 5),
    ],
)
def test_sources_that_do_not_last_are_refused_with_figures(limit: str, samples: int, fitting: int) -> None:
    alone = f"data.train=[{{path: shards/train, {limit}}}]"
    message = problems(alone)["data.train"]
    assert f"give {samples} samples" in message and "takes 80, up to step 10" in message
    assert f"set train.steps={fitting}." in message
    assert problems(alone, f"train.steps={fitting}") == {}
    assert "data.train" in problems(alone, f"train.steps={fitting + 1}")


def test_a_phase_that_only_ended_sources_have_is_refused() -> None:
    """From step 6 on the mixture would be the first source alone, which has given its 21 samples by then."""
    schedule = "data.schedule=[{from_step: 6, weights: [1, 0]}]"
    assert "give 41 samples" in problems(two(", max_samples: 21"), schedule)["data.train"]
    assert problems(two(", max_samples: 60"), schedule) == {}


def test_a_ramp_takes_more_samples_and_tokens() -> None:
    alone = "data.train=[{path: shards/train, max_samples: 127}]"
    assert "takes 128, up to step 10" in problems(alone, RAMP)["data.train"]
    assert problems(alone.replace("127", "128"), RAMP) == {}
    plan = plan_dry_run(resolve(run(RAMP)))
    assert (plan.tokens, plan.batch_ramp) == (128 * 64, ((5, 16),))
    assert plan_dry_run(resolve(run(RAMP, "train.steps=null", "train.tokens=4100"))).steps == 7


def test_less_than_a_sample_is_no_limit() -> None:
    key = "data.train.0.max_tokens"
    assert "allows less than one sample" in problems("data.train=[{path: shards/train, max_tokens: 63}]")[key]


def test_what_is_left_counts_from_the_checkpoint(folder: Path) -> None:
    """Of 100 samples 60 were read in 6 steps, and four steps of eight follow."""
    state = {"train": {"step": 6, "samples": 70, "tokens": 1, "data_tokens": 70 * 64, "first_step_tokens": 640}}
    alone = "data.train=[{path: shards/train, max_samples: %d}]"
    save_of_run(6, alone % 101, state={**state, "engine": {"updates": 6, "loss_scale": None}})
    assert "takes 102, up to step 10" in problems(alone % 101)["data.train"]
    allowed = "checkpoint.allow_change=[data.train]"
    assert problems(alone % 102, allowed) == {}
    plan = plan_dry_run(resolve(run(alone % 102, allowed)), find_continuation(run(alone % 102, allowed)))
    assert plan.tokens == 102 * 64


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ((), ("data.schedule=[{from_step: 9, weights: [2]}]",), "data.schedule"),
        (("data.schedule=[{from_step: 9, weights: [2]}]",), (), "data.schedule"),
        ((), ("data.packing=best_fit",), "data.packing"),
        ((), ("data.train=[{path: shards/train, max_epochs: 20}]",), "data.train.0.max_epochs"),
        (("data.train=[{path: shards/train, max_epochs: 21}]",), (), "data.train.0.max_epochs"),
    ],
)
def test_a_run_goes_on_with_its_samples(
    folder: Path, capsys: pytest.CaptureFixture[str], before: tuple[str, ...], now: tuple[str, ...], key: str
) -> None:
    if "data.packing=best_fit" in now:
        write_dataset(folder / "shards" / "real", [random_documents(60)], tokenizer=UNREAD_TOKENIZER)
        place = ("data.train.0.path=shards/real", f"data.cache_dir={folder / 'cache'}")
        before, now = (*before, *place), (*now, *place)
    save_of_run(10, *before)
    code, err = check(capsys, *before)
    assert (code, err) == (0, ""), err
    code, err = check(capsys, *now)
    assert code == 2 and f"{key}" in err and "the checkpoint runs/small" in err
    assert check(capsys, *now, f"checkpoint.allow_change=[{key}]")[0] == 0


def test_a_step_of_the_schedule_means_the_samples_that_it_meant(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "data.schedule=[{from_step: 9, weights: [2]}]"
    assert resolve(run(schedule)).config.data.schedule[0].from_sample == 64
    assert resolve(run(schedule, RAMP)).config.data.schedule[0].from_sample == 96
    save_of_run(10, schedule)
    assert check(capsys, schedule) == (0, "")
    code, err = check(capsys, schedule, "train.global_batch_size=16")
    assert code == 2 and "data.schedule" in err and "64" in err and "128" in err
    fixed = "data.schedule=[{from_sample: 64, weights: [2]}]"
    assert check(capsys, fixed, "train.global_batch_size=16")[0] == 0
    assert check(capsys, fixed, RAMP)[0] == 0, "the batch may change"


def test_the_dry_run_tells_of_all_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(folder / "real", [random_documents(200)], tokenizer=UNREAD_TOKENIZER)
    keys = ["data.train=[{path: real, max_samples: 9}, {path: real}]", "data.packing=best_fit", RAMP]
    code, err, out = *check(capsys, *keys, f"data.cache_dir={folder / 'cache'}"), ""
    assert (code, err) == (0, "")
    with pytest.raises(SystemExit):
        from llmtrain.cli import main

        main(["train", "run.yaml", *keys, f"data.cache_dir={folder / 'cache'}", "--dry-run"])
    out = capsys.readouterr().out
    assert "then none: from step 3 on the others go on without it" in out
    assert "from step 5 on 16" in out and "% padding, 0 documents cut" in out

"""A configuration is changed with the checks that a file goes through."""

from pathlib import Path

import pytest

from llmtrain.config.schema import ParallelConfig
from llmtrain.errors import ConfigError
from tests.unit.config.small_run import run


def test_keys_within_and_whole_sections() -> None:
    config = run(optim={"lr": 0.5})
    other = config.with_keys(
        {
            "train.steps": 7,
            "launch.watchdog.step_seconds": 9.0,
            "model.moe.num_experts": 4,
            "parallel": {"tensor": 2},
            "data.train": [{"path": "b"}, {"path": "c", "weight": 2}],
        }
    )
    assert (other.train.steps, other.launch.watchdog.step_seconds) == (7, 9.0)
    assert other.model.moe is not None and other.model.moe.num_experts == 4
    assert other.parallel == ParallelConfig(tensor=2)
    assert [(source.path, source.weight) for source in other.data.train] == [("b", 1), ("c", 2)]
    assert other.optim == config.optim and other.train.global_batch_size == config.train.global_batch_size
    assert config == run(optim={"lr": 0.5}), "the one before is as it was"


def test_a_whole_section_and_a_key_of_it() -> None:
    other = run().with_keys({"parallel": {"tensor": 2}, "parallel.pipeline": 3})
    assert other.parallel == ParallelConfig(tensor=2, pipeline=3)


def test_no_keys_change_nothing() -> None:
    config = run()
    assert config.with_keys({}) == config
    assert config.with_keys({}).model_fields_set == config.model_fields_set


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"train.stepz": 5}, "train.stepz"),
        ({"trian.steps": 5}, "trian"),
        ({"train.steps": "5"}, "train.steps"),
        ({"train.steps": 0}, "train.steps"),
        ({"train.steps.more": 1}, "train.steps"),
        ({"launch.watchdog.step_second": 1.0}, "launch.watchdog.step_second"),
        ({"data.train": []}, "data.train"),
        ({"data.train": [{"path": "a", "wieght": 1}]}, "data.train.0.wieght"),
        ({"engine": {"name": "torhc"}}, "engine.name"),
        ({"output_dir": "a" * 5000}, "output_dir"),
    ],
)
def test_what_a_file_may_not_say_is_refused(keys: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        run().with_keys(keys)
    assert [problem.key for problem in error.value.problems] == [key]


def test_every_problem_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        run().with_keys({"seed": -1, "name": "a b"})
    assert sorted(problem.key for problem in error.value.problems) == ["name", "seed"]


def test_a_section_alone() -> None:
    assert run().train.with_keys({"steps": 3}).steps == 3
    with pytest.raises(ConfigError, match=r"^steps = x: "):
        run().train.with_keys({"steps": "x"})


@pytest.mark.parametrize(("output_dir", "folder"), [("runs", "runs/small"), ("./a/", "a/small"), ("/", "/small")])
def test_the_run_folder(output_dir: str, folder: str) -> None:
    assert run(output_dir=output_dir).run_dir == Path(folder)

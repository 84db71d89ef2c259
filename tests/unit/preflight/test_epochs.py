"""`train.epochs`: the samples of so many epochs, counted before the run; and what cannot be counted is refused."""

from pathlib import Path

import pytest

from llmtrain.config.budget import Budget, Seen
from llmtrain.config.reading.load import load_config
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import build_stream
from llmtrain.preflight.dry_run import find_continuation, plan_dry_run
from llmtrain.preflight.resolve import resolve
from llmtrain.preflight.storage import check_storage
from tests.support.datasets import chat_record, random_conversations, write_target_dataset
from tests.support.run_files import write_data_set, write_good_run
from tests.unit.train.saved_run import check, save_of_run

TWO = ("train.steps=null", "train.epochs=2")
CHAT = ("data.objective=chat", "data.train=[{path: talks}]", "data.seq_len=40")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps of eight samples of 64 tokens, on 1,010 tokens; and some conversations."""
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    write_target_dataset(tmp_path / "talks", [random_conversations(30), random_conversations(9)], chat_record())
    return tmp_path


def run(*overrides: str) -> RunConfig:
    return load_config(Path("run.yaml"), overrides).config


def problems(*overrides: str) -> dict[str, str]:
    return {problem.key: problem.message for problem in check_storage(run(*overrides)).problems}


@pytest.mark.parametrize(
    ("overrides", "samples"),
    [
        ((), (2 * 1010 - 1) // 64),
        (("data.windows=per_shard",), 2 * ((1010 - 1) // 64)),
        (("train.epochs=5",), (5 * 1010 - 1) // 64),
    ],
)
def test_epochs_are_as_many_tokens_as_their_samples_have(overrides: tuple[str, ...], samples: int) -> None:
    checked = check_storage(run(*TWO, *overrides)).run
    assert checked is not None and checked.asked.train.tokens is None
    for resolved in (checked, resolve(run(*TWO, *overrides))):
        assert resolved.config.train.tokens == samples * 64
        steps = -(-samples // 8)
        assert resolved.config.total_steps == Budget.of(resolved.config).last_step(Seen()) == steps
        assert plan_dry_run(resolved).steps == steps


@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_an_epoch_of_packed_conversations_has_each_of_them_once(packing: str) -> None:
    """Read as a run reads them: the samples up to the budget hold every conversation as often as there are epochs."""
    resolved = resolve(run(*TWO, *CHAT, f"data.packing={packing}"))
    data, tokens = resolved.config.data, resolved.config.train.tokens
    assert tokens is not None and tokens % (2 * 40) == 0
    stream = build_stream(data.train, data, resolved.config.seed)
    parts = [part for number in range(tokens // 40) for part in stream.documents(number)]
    read = sorted((Path(part.shard).name, part.document) for part in parts)
    assert read == sorted(2 * [(shard.file, n) for shard in resolved.train[0].shards for n in range(shard.samples)])


def test_a_ramp_ends_where_the_samples_do() -> None:
    """31 samples: steps of 8, 8, 16."""
    ramp = "train.batch_ramp=[{from_step: 3, global_batch_size: 16}]"
    assert resolve(run(*TWO, ramp)).config.total_steps == 3


def test_a_run_goes_on_with_another_batch_size(folder: Path) -> None:
    """Of 31 samples 16 were read in two steps; the rest are four steps of four, or one step of 16."""
    state = {"train": {"step": 2, "samples": 16, "tokens": 1, "data_tokens": 16 * 64, "first_step_tokens": 512}}
    save_of_run(2, *TWO, state={**state, "engine": {"updates": 2, "loss_scale": None}})
    for size, last in ((4, 6), (8, 4), (16, 3)):
        config = resolve(run(*TWO, f"train.global_batch_size={size}")).config
        continues = find_continuation(config)
        assert continues is not None and continues.last_step == last


def test_the_run_folders_configuration_can_be_used_again() -> None:
    """It has the tokens beside the epochs. With other epochs or other data the two contradict each other."""
    Path("again.yaml").write_text(to_yaml(resolve(run(*TWO)).config), "utf-8")
    again = load_config(Path("again.yaml")).config
    assert (again.train.epochs, again.train.tokens) == (2, 31 * 64) and check_storage(again).problems == []
    (problem,) = check_storage(again.with_keys({"train.epochs": 3})).problems
    assert problem.key == "train.tokens" and problem.value == 31 * 64
    assert "train.epochs = 3 of shards/train are 3008 tokens. Remove one of the two" in problem.message


def test_a_mixture_has_no_epoch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data_set(folder / "more", tokens=3000)
    code, told = check(capsys, *TWO, "data.train=[{path: shards/train}, {path: more}]")
    assert code == 2 and "1 problem in" in told
    assert "train.epochs = 2 (command line): data.train has 2 sources, of which weights" in told


def test_a_source_that_ends_before_is_refused() -> None:
    limited = "data.train=[{path: shards/train, max_samples: 31}]"
    assert "give 31 samples" in problems(*TWO, limited)["data.train"]
    assert problems(*TWO, limited.replace("31", "32")) == {}


def test_a_profile_behind_the_end_is_refused_once_the_end_is_known() -> None:
    profile = "observe.profile={steps: [%d, %d]}"
    assert "the run ends with step 4" in problems(*TWO, profile % (4, 5))["observe.profile.steps"]
    assert problems(*TWO, profile % (3, 4)) == {}


def test_data_of_which_nothing_fits_has_no_epoch() -> None:
    message = problems(*TWO, *CHAT, "data.seq_len=2", "data.chat.too_long=drop")["data.chat.too_long"]
    assert "and none that fits. Set truncate" in message
    assert list(problems(*TWO, "data.seq_len=2000", "model.max_seq_len=2000")) == ["data.train.0.path"]

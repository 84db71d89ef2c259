"""The token ledger: what a run has read in a step is found again, in every layout and after every change."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from data_pipelines.dataset_writer import ShardingConfig
from data_pipelines.ledger import LedgerSample, step_samples
from data_pipelines.sharding import write_shards
from launch.rank.place import Rank
from llmtrain.cli.data import app
from llmtrain.config.reading.rendering import record_of
from llmtrain.config.schema import RunConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import DataError
from llmtrain.runs.audit import record
from llmtrain.train.loop import Run
from llmtrain.values.progress import SOURCE_TOKENS
from tests.support.small_runs import rows_of, small_run, train_here
from tests.support.tokenizers import train_sentencepiece

TEXTS = [f"text {number} says: " + f"line {number} of many, " * (number % 7) for number in range(120)]
RAMP = [{"from_step": 4, "global_batch_size": 8}]


class _Spy:
    """An engine that notes the tokens of each step's samples."""

    def __init__(self, engine: Any, seen: dict[int, list[list[int]]]) -> None:
        self._engine, self._seen = engine, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def train_step(self, step: int, micro_batches: Any, lr: float) -> Any:
        self._seen[step] = [row for batch in micro_batches for row in batch.tokens_BS.tolist()]
        return self._engine.train_step(step, micro_batches, lr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    (folder / "t.model").write_bytes(train_sentencepiece(TEXTS, "bpe", 320))
    for name, texts in (("a", TEXTS[:60]), ("b", TEXTS[60:])):
        config = ShardingConfig(valid_fraction=0.0, shard_tokens=500)
        write_shards(iter(texts), folder / name, load_tokenizer(folder / "t.model"), config)
    return folder


def run_of(folder: Path, name: str, steps: int, batch: int = 4, **data: Any) -> RunConfig:
    sources = [{"path": str(folder / "a" / "train"), "weight": 2}, {"path": str(folder / "b" / "train")}]
    train = {"steps": steps, "global_batch_size": batch, "batch_ramp": RAMP if batch == 4 else []}
    sections = {"model": {"vocab_size": 320}, "data": {"train": sources, "valid": [], **data}, "train": train}
    return small_run(folder, **sections).with_keys({"name": name})


def spying(seen: dict[int, list[list[int]]]) -> Callable[[Run, Rank], Run]:
    return lambda run, rank: replace(run, engine=_Spy(run.engine, seen))


@pytest.mark.parametrize("data", [{}, {"packing": "best_fit", "cache_dir": "set below"}], ids=["windows", "packed"])
def test_the_ledger_is_what_the_run_has_read(folder: Path, data: dict[str, Any]) -> None:
    data = {key: str(folder / "cache") if key == "cache_dir" else value for key, value in data.items()}
    name, seen = f"run{len(data)}", dict[int, list[list[int]]]()
    assert train_here(run_of(folder, name, 6, **data), spying(seen)) == 0
    config = run_of(folder, name, 9, batch=12, **data)  # steps 7 to 9 have another size
    assert train_here(config, spying(seen)) == 0
    tokenizer, run, taken = load_tokenizer(folder / "t.model"), config.run_dir, dict[str, int]()
    for step in range(1, 10):
        samples = list(step_samples(run, step))  # of the size that the step had, not today's
        assert len(samples) == len(seen[step]) == {1: 4, 2: 4, 3: 4, 4: 8, 5: 8, 6: 8}.get(step, 12)
        for sample, tokens in zip(samples, seen[step], strict=True):
            taken[sample.source] = taken.get(sample.source, 0) + len(tokens)
            require_text(sample, tokens, tokenizer, packed=bool(data))
        row = rows_of(config)[step - 1]
        assert row["samples"] == samples[-1].sample + 1
        assert {key.removeprefix(SOURCE_TOKENS): row[key] for key in row if key.startswith(SOURCE_TOKENS)} == taken


def require_text(sample: LedgerSample, tokens: list[int], tokenizer: Any, packed: bool) -> None:
    position = 0
    for part in sample.documents:
        assert part.position == position
        number = int(part.key) + (60 if "/b/" in part.shard else 0)
        ids = [*tokenizer.encode(TEXTS[number]), tokenizer.eos_id]
        assert part.ends == (part.end == len(ids))
        expected = ids[part.begin : part.end]
        assert tokens[position : position + len(expected)] == expected[: len(tokens) - position]
        assert part.text == tokenizer.decode(expected[: len(expected) - part.ends])
        position += len(expected)
    assert position + sample.padding == len(tokens) + 1 and (packed or not sample.padding)


def show(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def test_ranks_share_a_step_and_a_yaml_tells_what_will_be(folder: Path, tmp_path: Path) -> None:
    config = run_of(folder, "planned", 6)
    path = tmp_path / "run.yaml"
    path.write_text(record_of(config))
    whole = [json.loads(line) for line in show("--run", path, "--step", 5, "--json").stdout.splitlines()]
    assert [sample["sample"] for sample in whole] == list(range(20, 28))
    assert [sample["micro_batch"] for sample in whole] == [0, 0, 1, 1, 2, 2, 3, 3]
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks):
            result = show("--run", path, "--step", 5, "--json", "--rank", rank, "--ranks", ranks)
            parts.append([json.loads(line) for line in result.stdout.splitlines()])
        assert all({sample["data_rank"] for sample in part} == {rank} for rank, part in enumerate(parts))
        together = sorted((sample for part in parts for sample in part), key=lambda sample: sample["sample"])
        assert [{**sample, "data_rank": 0} for sample in together] == [{**sample, "data_rank": 0} for sample in whole]
    text = show("--run", path, "--step", 5).stdout
    assert text.count("==== sample ") == 8 and "micro-batch 3, data rank 0" in text
    for document in whole[0]["documents"]:
        assert document["text"] in text and f"{document['shard']}: {document['key']}" in text


def test_data_that_a_run_passes_over_is_in_no_step(folder: Path) -> None:
    config = run_of(folder, "rolled", 6)
    config.run_dir.mkdir(parents=True)
    record(config.run_dir, "rollback", step=1, first_sample=4, end_sample=10)
    (config.run_dir / "config.yaml").write_text(record_of(config))
    numbers = [[sample.sample for sample in step_samples(config.run_dir, step)] for step in (1, 2, 3)]
    assert numbers == [[0, 1, 2, 3], [10, 11, 12, 13], [14, 15, 16, 17]]


def test_a_skipped_shard_is_told_and_nothing_is_recorded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.copytree(folder / "b", tmp_path / "b")
    skipping = {"on_corrupt": "skip", "max_skipped": 0.9}
    config = run_of(tmp_path, "skipped", 6, **skipping)
    shard = tmp_path / "a" / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-600])
    with pytest.raises(DataError, match="shard-000000"):  # no run has skipped it
        for step in range(1, 7):
            list(step_samples(write_yaml(config, tmp_path), step))
    assert not config.run_dir.exists()
    assert train_here(config) == 0
    found = [sample for step in range(1, 7) for sample in step_samples(config.run_dir, step)]
    blank = [sample for sample in found if sample.blank]
    assert blank and not any(sample.documents for sample in blank)
    assert all(sample.documents for sample in found if not sample.blank)
    assert (
        "without targets: its shard is skipped"
        in show("--run", config.run_dir, "--step", 1 + blank[0].sample // 4).stdout
    )


def write_yaml(config: RunConfig, folder: Path) -> Path:
    (folder / "run.yaml").write_text(record_of(config))
    return folder / "run.yaml"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--step", "1"), "takes a run and no folder"),
        (("somewhere", "--run", "x.yaml", "--step", "1"), "takes a run and no folder"),
        (("somewhere", "--rank", "0"), "goes with --step"),
        (("somewhere", "--json"), "goes with --step"),
        ((), "is needed"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], says: str) -> None:
    result = show(*options)
    assert result.exit_code == 2 and says in " ".join(result.stderr.replace("│", " ").split())


def test_a_rank_that_the_run_has_not_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(record_of(run_of(folder, "planned", 6)))
    result = show("--run", path, "--step", 1, "--rank", 3)
    assert "--rank 3: the run has ranks 0 to 0" in str(result.exception)

"""One training state through real checkpoints of many layouts: the PEFT folders have the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.rank.rendezvous import TorchRankStore
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.config.schema import CheckpointConfig, RunConfig
from llmtrain.infer.adapters import export_adapter
from llmtrain.interop.peft.writing import PeftSettings
from llmtrain.train.state import Saving, TrainState
from llmtrain.values.fragment import Box
from tests.parity.cases import finetune_run
from tests.parity.resharding import SAVED_STEP, build_engine, restored, train, with_data
from tests.parity.test_freeze import laid_out
from tests.support.datasets import random_documents, write_dataset
from tests.support.ranks import run_ranks

LAYOUTS = {
    "lora": [("megatron:tp2", 0), ("megatron:pp2", 0), ("deepspeed:dp2", 3), ("megatron:dp2", 1)],
    "experts": [("megatron:dp2+ep2", 1), ("megatron:tp2", 0), ("deepspeed:dp2", 3)],
}
"""The first one trains; the others load its checkpoint, and save what they hold without a step."""


def save(
    rank: int,
    world_size: int,
    config: RunConfig,
    folder: Path,
    begin: Path | None,
    mutation: Callable[[int], None] | None = None,
) -> None:
    """Train some steps, or load the checkpoint `begin`; then save as a run does."""
    if mutation:
        mutation(rank)
    engine = build_engine(config)
    if begin is None:
        state, _, _ = train(engine, config, TrainState(), SAVED_STEP, rank)
    else:
        state = restored(open_checkpoint(begin, verify=rank == 0), engine, config)
    store = dist.FileStore(str(folder / "said"), world_size)  # pyright: ignore[reportPrivateImportUsage]  # documented
    exchange = TorchRankStore(store, rank, world_size, timeout_seconds=60)
    settings = CheckpointConfig(async_save=False)
    manager = CheckpointManager(folder / "checkpoints", settings, to_yaml(config), {}, ranks=exchange)
    saving = Saving(manager, SAVED_STEP, lambda: None)
    saving.save(state, engine, None)
    saving.finish()


def exported(config: RunConfig, ranks: int, folder: Path, begin: Path | None, *mutation: Any) -> dict[str, bytes]:
    """The files of the adapter that a layout has saved."""
    folder.mkdir()
    config = config.with_keys({"launch.num_workers": ranks})
    run_ranks(save, ranks, config, folder, begin, *mutation, timeout_seconds=120)
    checkpoint = folder / "checkpoints" / f"step-{SAVED_STEP:08d}"
    export_adapter(checkpoint, folder / "adapter", "peft", PeftSettings(torch.float32, "the-base"))
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    write_dataset(folder, [random_documents(60, seed) for seed in range(3)])
    return folder


@pytest.mark.parametrize("method", ["lora", pytest.param("experts", marks=pytest.mark.whole_grid)])
def test_the_bytes_do_not_depend_on_the_layout(tmp_path: Path, dataset: Path, method: str) -> None:
    config, files, begin = with_data(finetune_run(method), dataset), {}, None
    config = config.with_keys({"model.qk_norm": False})  # as no family with experts has it
    for layout, stage in LAYOUTS[method]:
        changed, ranks = laid_out(config, layout, stage)
        files[layout] = exported(changed, ranks, tmp_path / layout, begin)
        begin = begin or tmp_path / layout / "checkpoints" / f"step-{SAVED_STEP:08d}"
    first, *others = files.values()
    assert sorted(first) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert all(other == first for other in others)


def rows_arrive_turned_round(rank: int) -> None:
    """On one rank."""
    read = CheckpointReader.read

    def turned(self: CheckpointReader, name: str, kind: str, box: Box) -> torch.Tensor:
        found = read(self, name, kind, box)
        return found.flip(0) if name.endswith("mlp.up.lora_a") and rank == 1 else found

    CheckpointReader.read = turned


def test_a_part_that_is_loaded_wrongly_is_noticed(tmp_path: Path, dataset: Path) -> None:
    config = with_data(finetune_run("lora"), dataset)
    trained = exported(*laid_out(config, "megatron:tp2", 0), tmp_path / "tp2", None)
    begin = tmp_path / "tp2" / "checkpoints" / f"step-{SAVED_STEP:08d}"
    pipelined = laid_out(config, "megatron:pp2", 0)
    wrong = exported(*pipelined, tmp_path / "pp2", begin, rows_arrive_turned_round)
    assert {name for name in trained if trained[name] != wrong[name]} == {"adapter_model.safetensors"}

"""Import and export hold some weights at a time, however large the model is."""

from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.config.parameters import parameter_shapes
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.values.fragment import Box, Fragment
from tests.support.memory import peak_growth, peak_growth_again
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_run
from tests.unit.interop.models import MIXTRAL, model_for

MIB = 1 << 20
MODEL = MIXTRAL.with_keys({"num_layers": 10, "hidden_size": 256, "ffn_hidden_size": 1024})
PART_BYTES = 10 * MIB
WEIGHT_BYTES = 4 * sum(torch.Size(shape).numel() for shape in parameter_shapes(MODEL).values())
SLACK_BYTES = 12 * MIB
"""For buffers of hashes and of files, and headers."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak of memory")


def _export_rank(rank: int, world_size: int, run: Path, out: Path) -> tuple[int, int]:
    """Growth while weights are read and written, and while a whole export is made and proved layer by layer."""
    from functools import partial

    from llmtrain.checkpoint.find import find_checkpoint
    from llmtrain.data.tokenizer import load_tokenizer
    from llmtrain.infer.model import build_from, checkpoint_tensors, logits_of
    from llmtrain.interop import hf_export
    from llmtrain.interop.exported_model import TrainedWeights
    from llmtrain.interop.hf import family_for
    from llmtrain.interop.name_table import iter_theirs

    torch.set_num_threads(1)
    out.mkdir()
    read = checkpoint_tensors(find_checkpoint(run), MODEL, torch.float32)
    theirs = partial(iter_theirs, family_for(MODEL).tables[0], MODEL, read)
    written = peak_growth_again(lambda: hf_export.write_weights(out, theirs(), PART_BYTES))
    weights = TrainedWeights(read, lambda model, part: partial(logits_of, build_from(model, part)))
    settings = hf_export.ExportSettings(max_shard_bytes=PART_BYTES, proof="layers")
    trained = model_for(MODEL, load_tokenizer(run / "tokenizer.model"))
    return written, peak_growth(lambda: hf_export.write_export(out / "hf", trained, weights, settings))


def _import_rank(rank: int, world_size: int, source: Path, out: Path) -> int:
    from llmtrain.infer.hugging_face import write_imported
    from llmtrain.infer.tokenizer import folder_tokenizer
    from llmtrain.interop.hf_import import open_hf_folder

    folder = open_hf_folder(source)
    found = folder_tokenizer(source, folder.model)
    outs = iter((out / "first", out / "second"))
    return peak_growth_again(lambda: write_imported(folder, found, next(outs), PART_BYTES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_tokenizer) -> Path:
    """A run whose checkpoint is several times as large as what may be in memory."""
    path = tmp_path_factory.mktemp("large")
    unfinished, generator, parts = start_checkpoint(path / "checkpoints", 1), torch.Generator().manual_seed(1), []
    for number, (name, shape) in enumerate(parameter_shapes(MODEL).items()):
        tensor = torch.randn(shape, generator=generator) * 0.05
        if name.endswith("word.weight") or name == "head.weight":
            tensor[MODEL.vocabulary :] = 0
        box = Box.whole(shape)
        parts.append(write_rank_files(unfinished, number, [Fragment(name, "master", shape, box, tensor)]))
    publish(unfinished, parts, Contents(1, {}, to_yaml(tiny_run(MODEL)), {}), lambda: None)
    (path / "tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    return path


@pytest.mark.whole_grid
def test_weights_are_in_memory_one_file_at_a_time(run, tmp_path):
    assert WEIGHT_BYTES > 12 * PART_BYTES
    ((written, proved),) = run_ranks(_export_rank, 1, run, tmp_path / "out", timeout_seconds=240)
    (imported,) = run_ranks(_import_rank, 1, tmp_path / "out" / "hf", tmp_path / "imported", timeout_seconds=240)
    told = (written / MIB, proved / MIB, imported / MIB)
    print(f"of {WEIGHT_BYTES / MIB:.0f} MiB: export {told[0]:.0f}, with proof {told[1]:.0f}, import {told[2]:.0f} MiB")
    assert written <= 2 * PART_BYTES + SLACK_BYTES
    assert imported <= 2 * PART_BYTES + SLACK_BYTES
    # A proof of the whole would take the weights twice; here it is one layer, the embeddings and transformers itself.
    assert proved <= WEIGHT_BYTES

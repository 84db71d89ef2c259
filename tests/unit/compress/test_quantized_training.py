"""A run with a section `quantize`, compressed: it loses nothing, and transformers computes what training computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.compress.quantize import Compressed, Compression, compress
from llmtrain.compress.source import open_source
from llmtrain.config.schema import RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import ConfigError
from llmtrain.interop.hf_export import ExportSettings
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.models.rounded_products import MatrixRounding
from tests.support.evaluated_run import trained_run
from tests.support.samples import hidden_states, random_batch

STEPS = 12


def quantized_run(folder: Path, precision: str, quantize: dict[str, Any]) -> tuple[RunConfig, TorchEngine]:
    """A short run, and its engine with the weights of the checkpoint."""
    train = {"steps": STEPS, "precision": precision}
    config = trained_run(folder, train=train, checkpoint={"every_steps": STEPS}, quantize=quantize)
    engine = TorchEngine(config, torch.device("cpu"))
    engine.load(find_checkpoint(Path(config.run_dir)))
    engine.model.eval()
    return config, engine


def compressed(run: Path, out: Path, **asked: Any) -> Compressed:
    source = open_source(run, None)
    settings = ExportSettings(dtype=asked.pop("dtype", source.dtype))
    whole = {"scheme": None, "samples": 8, "max_increase": 1e6, **asked}
    return compress(source, out, Compression(**whole), settings, lambda said: None)


def multiplied_by(engine: TorchEngine, tokens_BS: Tensor) -> dict[str, Tensor]:
    """The rounded weights of a forward pass, by name."""
    names, found = {id(weight): name for name, weight in engine.parameters.items()}, {}
    with pytest.MonkeyPatch.context() as patch:
        whole = MatrixRounding.weight

        def noted(self: MatrixRounding, weight: Tensor, scale_OG: Tensor) -> Tensor:
            found[names[id(weight)]] = value = whole(self, weight, scale_OG)
            return value

        patch.setattr(MatrixRounding, "weight", noted)
        logits_of(engine, tokens_BS)
    return found


@torch.no_grad()
def logits_of(engine: TorchEngine, tokens_BS: Tensor) -> Tensor:
    batch = random_batch(len(tokens_BS), tokens_BS.shape[1])
    batch = type(batch)(tokens_BS, batch.positions_BS, labels_BS=batch.labels_BS)
    return engine.model.logits(hidden_states(engine.model, batch)).float()


CASES = [
    ("fp32", {"scheme": "w4a16", "group": 16}),
    ("bf16", {"scheme": "w8a16", "keep": ["attention.q"]}),
    pytest.param("fp32", {"scheme": "w8a8"}, marks=pytest.mark.whole_grid),
    pytest.param("bf16", {"scheme": "w4a16", "group": 0}, marks=pytest.mark.whole_grid),
]


@pytest.mark.parametrize(("precision", "quantize"), CASES)
def test_the_folder_holds_what_training_computed_with(precision: str, quantize: dict[str, Any], tmp_path: Path) -> None:
    config, engine = quantized_run(tmp_path, precision, quantize)
    source, dtype = open_source(config.run_dir, None), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    up = "decoder.layers.0.mlp.up.weight"
    assert torch.equal(source.as_computed().read(up), source.read(up).to(dtype).float())
    # Masters of a run in bf16 have more bits: pruning takes those.
    assert (precision == "fp32") == torch.equal(source.as_computed().read(up), source.read(up))
    done = compressed(config.run_dir, tmp_path / "out")
    assert done.scheme == quantize["scheme"] and done.export.proof.unread is None
    tokens_BS = torch.randint(3, config.model.vocabulary, (2, 20), generator=torch.Generator().manual_seed(0))
    folder, expected = open_hf_folder(tmp_path / "out"), multiplied_by(engine, tokens_BS)
    assert len(expected) == done.num_quantized > 6
    for name, parameter in engine.parameters.items():
        held = folder.tensor(name)
        # In bf16 the product of a number and a scale is rounded once more, as the weights of any model in bf16 are.
        assert torch.equal(held.to(parameter.dtype), expected.get(name, parameter.detach())), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    with torch.no_grad():
        found = theirs(tokens_BS).logits.float()
    ours = logits_of(engine, tokens_BS)
    # The order of sums differs; of bf16, what is rounded on the way too.
    bound = {"fp32": 1e-4, "bf16": 0.05}[precision]
    if quantize["scheme"] == "w8a8":
        bound = 0.02
    assert (found - ours[..., : found.shape[-1]]).abs().max() <= bound * ours.abs().max()


def test_another_form_is_another_model(tmp_path: Path) -> None:
    config, _ = quantized_run(tmp_path, "fp32", {"scheme": "w4a16", "group": 16})
    source = open_source(config.run_dir, None)
    said: list[str] = []
    asked = Compression("w8a16", samples=8, max_increase=1e6)
    done = compress(source, tmp_path / "other", asked, ExportSettings(), said.append)
    assert done.scheme == "w8a16" and any("trained for w4a16" in line for line in said)
    assert compressed(config.run_dir, tmp_path / "wide", group=0).form.startswith("4-bit weights with a scale for each")


def test_a_run_for_floats_needs_a_scheme(tmp_path: Path) -> None:
    config = trained_run(tmp_path, train={"steps": 2}, checkpoint={"every_steps": 2})
    with pytest.raises(
        ConfigError, match=r"--scheme: is needed: .*not trained with a section quantize. Try one of w8a16.* or --prune"
    ):
        compressed(config.run_dir, tmp_path / "out")

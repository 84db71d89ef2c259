"""Writing with matrices in whole numbers: tokens per second and memory, beside the same model dequantized, and beside
transformers in fp32."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from llmtrain.config.parameters import iter_linears
from llmtrain.infer.model import load_model
from llmtrain.infer.packed.choice import KernelChoice, MatrixPacking, StoredMatrices
from llmtrain.interop.compressed.choice import SCHEMES
from llmtrain.models.rounded_inputs import round_inputs
from llmtrain.models.transformer import Transformer
from llmtrain.values.quantization import Quantized, round_to_nearest
from tests.benchmarks.measuring import Measurement, Options, Row, Table, measure, one_core
from tests.benchmarks.peer_models import Shape
from tests.benchmarks.serving import Model, batch_speed, random_prompts, write_model
from tests.benchmarks.serving_peers import generate_speed, load_peer

SHAPE = Shape(num_layers=4, hidden_size=1024, num_heads=16, vocab_size=2048, seq_len=128, batch_size=8)
QUICK = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=64, batch_size=2)
CPU = torch.device("cpu")
AT_A_TIME = (1, 8)


def benchmark(options: Options) -> list[Table]:
    """In one thread on a CPU; prompts are of up to half of the positions, and 16 tokens follow each."""
    shape = QUICK if options.quick else SHAPE
    prompts, new, tables = random_prompts(shape), 16, list[Table]()
    with one_core(), TemporaryDirectory() as place:
        folder = write_model(shape, Path(place, "model"))
        models = {"fp32": _whole(folder)}
        for scheme in SCHEMES:
            models[f"{scheme}, dequantized"] = _quantized(folder, scheme, "plain")
            models[f"{scheme}, packed"] = _quantized(folder, scheme, "packed")
        asked = {name: Model(folder, None, prompts, new, ours) for name, (ours, _) in models.items()}
        peer = load_peer(folder)
        for slots in AT_A_TIME:
            contenders: dict[str, Measurement] = {
                name: partial(batch_speed, model, slots, False) for name, model in asked.items()
            }
            contenders["transformers, fp32"] = partial(generate_speed, peer, prompts, new, slots)
            rows = measure(contenders, options.rounds)
            title = f"Texts, {asked['fp32'].told(slots)}"
            tables.append(Table(title, "tokens per CPU second", "higher", "w8a16, packed", rows))
    sizes = tuple(Row(name, (size / 2**20,)) for name, (_, size) in models.items())
    return [*tables, Table("Memory of the matrices of layers", "MiB", "lower", None, sizes)]


def _whole(folder: Path) -> tuple[Transformer, int]:
    """The model in fp32, and the bytes of its linears."""
    model = load_model(folder, CPU).model
    names = {weight.name for _, weight in iter_linears(model.config)}
    return model, sum(each.nbytes for name, each in model.named_parameters() if name in names)


@torch.no_grad()
def _quantized(folder: Path, scheme: str, kernels: Any) -> tuple[Transformer, int]:
    """The same model, quantized."""
    whole, plain_bytes = _whole(folder)
    form = SCHEMES[scheme] if scheme != "w4a16" else replace(SCHEMES[scheme], group=32)
    weights = {weight.name: whole.get_parameter(weight.name) for _, weight in iter_linears(whole.config)}

    def read(name: str, expert: int | None) -> Quantized:
        return round_to_nearest(weights[name], form.grid(weights[name].shape[1]))

    if kernels == "plain":
        for name, weight in weights.items():
            weight.copy_(read(name, None).dequantized())
        if form.rounds_inputs:
            round_inputs(whole, (name.removesuffix(".weight") for name in weights))
        return whole, plain_bytes
    packing = MatrixPacking(KernelChoice(kernels), StoredMatrices(form, frozenset(weights), read), CPU)
    packing.put_into(whole)
    return whole, sum(map(sum, packing.sizes.values()))

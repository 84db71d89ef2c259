"""Writing with matrices in whole numbers: tokens per second and memory, beside the same model dequantized and in
bfloat16, transformers, and llama.cpp, which has 8-bit numbers too."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

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
from tests.benchmarks.serving_peers import generate_speed, gguf_of, llama_cpp, load_peer

SHAPE = Shape(num_layers=4, hidden_size=1024, num_heads=16, vocab_size=2048, seq_len=128, batch_size=8)
QUICK = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=64, batch_size=2)
CPU = torch.device("cpu")
AT_A_TIME = (1, 8)
NEW = 16
OURS = "w8a16, packed"


def benchmark(options: Options) -> list[Table]:
    """In one thread on a CPU; prompts are of up to half of the positions, and 16 tokens follow each."""
    shape = QUICK if options.quick else SHAPE
    with one_core(), TemporaryDirectory() as place:
        folder = write_model(shape, Path(place, "model"))
        file, models = gguf_of(folder, "q8_0"), {"fp32": _whole(folder), "bf16": _whole(folder, torch.bfloat16)}
        for scheme in SCHEMES:
            models[f"{scheme}, dequantized"] = _dequantized(folder, scheme)
            models[OURS if scheme == "w8a16" else f"{scheme}, packed"] = _packed(folder, scheme)
        prompts = random_prompts(shape)
        asked = {name: Model(folder, file, prompts, NEW, ours) for name, (ours, _) in models.items()}
        tables = [_speeds(asked, slots, options) for slots in AT_A_TIME]
    sizes = tuple(Row(name, (size / 2**20,) * options.rounds) for name, (_, size) in models.items())
    return [*tables, Table("Memory of the matrices of layers", "MiB", "lower", OURS, sizes)]


def _speeds(asked: dict[str, Model], slots: int, options: Options) -> Table:
    model, contenders = asked[OURS], dict[str, Measurement]()
    for name, ours in asked.items():
        contenders[name] = partial(batch_speed, ours, slots, False)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        peer = load_peer(model.folder).to(dtype)
        contenders[f"transformers, {name}"] = partial(generate_speed, peer, model.prompts, model.new, slots)
    with ExitStack() as peers:
        if model.file is not None:
            server = llama_cpp(model.file, slots, model.prompts, model.new)
            contenders["llama.cpp, Q8_0"] = peers.enter_context(server)
        notes = () if model.file else ("llama.cpp was not run: make readers installs it",)
        rows = measure(contenders, options.rounds)
    return Table(f"Texts, {model.told(slots)}", "tokens per CPU second", "higher", OURS, rows, notes)


def _whole(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, int]:
    """The model, and the bytes of its linears."""
    model = load_model(folder, CPU).model.to(dtype)
    return model, sum(model.get_parameter(weight.name).nbytes for _, weight in iter_linears(model.config))


def _stored(model: Transformer, scheme: str) -> StoredMatrices:
    """The linears of a model as a folder of the scheme would have them."""
    form = SCHEMES[scheme] if scheme != "w4a16" else replace(SCHEMES[scheme], group=32)
    weights = {weight.name: model.get_parameter(weight.name) for _, weight in iter_linears(model.config)}

    @torch.no_grad()
    def read(name: str, expert: int | None) -> Quantized:
        return round_to_nearest(weights[name], form.grid(weights[name].shape[1]))

    return StoredMatrices(form, frozenset(weights), read)


@torch.no_grad()
def _dequantized(folder: Path, scheme: str) -> tuple[Transformer, int]:
    model, num_bytes = _whole(folder)
    stored = _stored(model, scheme)
    for name in stored.weights:
        model.get_parameter(name).copy_(stored.read(name, None).dequantized())
    if stored.form.rounds_inputs:
        round_inputs(model, (name.removesuffix(".weight") for name in stored.weights))
    return model, num_bytes


def _packed(folder: Path, scheme: str) -> tuple[Transformer, int]:
    model, _ = _whole(folder)
    packing = MatrixPacking(KernelChoice("packed"), _stored(model, scheme), CPU)
    packing.put_into(model)
    return model, sum(map(sum, packing.sizes.values()))

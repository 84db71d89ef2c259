"""Writing with matrices in whole numbers: tokens per second and memory, beside the same model dequantized, and beside
transformers in fp32 and bfloat16."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import iter_linears
from llmtrain.infer.packed.choice import KernelChoice, MatrixPacking, StoredMatrices
from llmtrain.interop.compressed.choice import SCHEMES
from llmtrain.models.rounded_inputs import round_inputs
from llmtrain.models.transformer import Transformer, build_model
from llmtrain.values.quantization import Quantized, round_to_nearest
from tests.benchmarks.measuring import Measurement, Options, Row, Table, measure, one_core
from tests.benchmarks.peer_models import Shape
from tests.benchmarks.serving import our_speed, peer, peer_speed, random_prompts
from tests.support.weights import materialize

SHAPE = Shape(num_layers=4, hidden_size=1024, num_heads=16, vocab_size=2048, seq_len=128, batch_size=8)
QUICK = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=64, batch_size=2)
CPU = torch.device("cpu")
AT_A_TIME = (1, 8)


def benchmark(options: Options) -> list[Table]:
    """In one thread on a CPU; prompts are of up to half of the positions, and 16 tokens follow each."""
    shape = QUICK if options.quick else SHAPE
    prompts, new, tables = random_prompts(shape), 16, list[Table]()
    with one_core():
        models = {"fp32": _model(shape)}
        for scheme in SCHEMES:
            models[f"{scheme}, dequantized"] = _quantized(shape, scheme, "plain")
            models[f"{scheme}, packed"] = _quantized(shape, scheme, "packed")
        theirs = peer(shape)
        for slots in AT_A_TIME:
            contenders: dict[str, Measurement] = {
                name: partial(our_speed, model, prompts, new, slots, False) for name, (model, _) in models.items()
            }
            contenders["transformers, fp32"] = partial(peer_speed, theirs, prompts, new, slots)
            title = f"Texts, {slots} at a time ({shape.num_layers} layers, {shape.hidden_size} wide)"
            rows = measure(contenders, options.rounds)
            tables.append(Table(title, "tokens per CPU second", "higher", "w8a16, packed", rows))
    sizes = tuple(Row(name, (size / 2**20,)) for name, (_, size) in models.items())
    return [*tables, Table("Memory of the matrices of layers", "MiB", "lower", None, sizes)]


def _model(shape: Shape) -> tuple[Transformer, int]:
    """A model of random weights, and the bytes of its linears."""
    model = build_model(_config(shape))
    materialize(model, seed=0, device=CPU)
    names = {weight.name for _, weight in iter_linears(model.config)}
    return model.eval(), sum(each.nbytes for name, each in model.named_parameters() if name in names)


@torch.no_grad()
def _quantized(shape: Shape, scheme: str, kernels: Any) -> tuple[Transformer, int]:
    """The same model, quantized."""
    whole, plain_bytes = _model(shape)
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


def _config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, num_heads=shape.num_heads,
        vocab_size=shape.vocab_size, max_seq_len=shape.seq_len, ffn_hidden_size=3 * shape.hidden_size,
    )  # fmt: skip

"""What a dry run says of memory is what PyTorch keeps."""

from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import Lengths, sample_lengths
from llmtrain.engines.megatron_engine.zero_bubble import defer_weight_gradients
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import build_model
from llmtrain.models.weight_gradients import WeightGradients
from llmtrain.parallel.layout import Layout, plan_layout
from llmtrain.parallel.stateless_random import Draws
from llmtrain.plan.deferred import deferred_elements
from llmtrain.plan.memory import Kernels, activation_bytes, held_bytes, plan_memory
from llmtrain.values.batch import ModelInputs
from llmtrain.words import short_bytes
from tests.support.live_bytes import LiveBytes
from tests.support.samples import tiny_model, tiny_run
from tests.support.weights import materialize
from tests.unit.config.small_run import run
from tests.unit.plan.test_memory_advice import large

ROOT = Path(__file__).resolve().parents[3]
BATCH, LENGTH = 2, 64

MODELS = {
    "gpt2": {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True},
    "llama": {"num_kv_heads": 2},
    "relu": {"activation": "relu"},
    "bert": {"family": "encoder", "norm": "layernorm", "activation": "gelu", "position": "learned"},
    "t5": {"family": "encoder_decoder", "num_encoder_layers": 2},
    "moe": {"moe": {"num_experts": 4, "top_k": 2}},
}


def config_of(model: dict[str, object], **train: object) -> RunConfig:
    sizes = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "vocab_size": 256, "max_seq_len": LENGTH}
    return run(
        model={**sizes, **model},
        train={"global_batch_size": BATCH, "micro_batch_size": BATCH, "steps": 1, **train},
    )


ON_CPU = Kernels.of(on_gpu=False)


def kept_bytes(config: RunConfig, encoder_length: int = 0) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights left out, each piece of memory once."""
    model = build_model(config.model, config.train.recompute)
    materialize(model, config.seed, torch.device("cpu"))
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision])
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens, positions = torch.randint(0, 256, (BATCH, LENGTH)), torch.arange(LENGTH).expand(BATCH, LENGTH)
    encoder = torch.randint(0, 256, (BATCH, encoder_length)) if encoder_length else None
    draws = Draws.of_micro_batch(config.seed, 1, 0, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ModelInputs(tokens, positions, None, None, encoder, None), Pass(draws, 1.0))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_on_a_gpu_the_product_of_an_activation_is_not_kept(
    model: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is still there of all that the forward pass of the layers has made; keys are repeated as on a CPU."""
    monkeypatch.setattr("llmtrain.models.pointwise.keeps_less", lambda x: True)
    config = config_of(MODELS[model], recompute=recompute)
    transformer = build_model(config.model, config.train.recompute)
    materialize(transformer, config.seed, torch.device("cpu"))
    tokens, positions = torch.randint(0, 256, (BATCH, LENGTH)), torch.arange(LENGTH).expand(BATCH, LENGTH)
    with LiveBytes() as live:
        hidden, _ = transformer.train()(ModelInputs(tokens, positions, None, None, None, None), Pass())
    kernels = Kernels(3 if config.model.norm == "rmsnorm" else 2, repeats_keys=True, keeps_product=False)
    estimate = activation_bytes(config, Layout(), Lengths(LENGTH), kernels)
    assert live.num_bytes - hidden.nbytes == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("model", MODELS)
def test_activations_are_what_pytorch_keeps(model: str, recompute: str) -> None:
    """On a CPU an RMSNorm keeps a third tensor; embeddings and the last norm add less than a layer's tenth."""
    config = config_of(MODELS[model], recompute=recompute)
    encoder = 2 * LENGTH if config.model.family == "encoder_decoder" else 0
    per_norm = 3 if config.model.norm == "rmsnorm" else 2
    kernels = Kernels(per_norm, repeats_keys=True, keeps_product=True)
    estimate = activation_bytes(config, Layout(), Lengths(LENGTH, encoder), kernels)
    assert kept_bytes(config, encoder) == pytest.approx(estimate, rel=0.1)


def deferred_bytes(config: RunConfig, encoder_length: int = 0) -> int:
    """Bytes of the factors that a backward pass leaves behind, each piece of memory once."""
    model = build_model(config.model, config.train.recompute)
    materialize(model, config.seed, torch.device("cpu"))
    held, factors = WeightGradients(), dict[int, torch.UntypedStorage]()

    def add(weights: list[torch.nn.Parameter], compute: FunctionType) -> None:
        for cell in compute.__closure__ or ():
            if isinstance(cell.cell_contents, torch.Tensor):
                storage = cell.cell_contents.untyped_storage()
                factors[storage.data_ptr()] = storage

    held.add = add  # type: ignore[method-assign,assignment]
    defer_weight_gradients(model, held)
    tokens, positions = torch.randint(0, 256, (BATCH, LENGTH)), torch.arange(LENGTH).expand(BATCH, LENGTH)
    encoder = torch.randint(0, 256, (BATCH, encoder_length)) if encoder_length else None
    hidden, _ = model.train()(ModelInputs(tokens, positions, None, None, encoder, None), Pass())
    hidden.square().sum().backward()
    return sum(storage.nbytes() for storage in factors.values())


@pytest.mark.parametrize(("model", "recompute"), [*((model, "none") for model in MODELS), ("llama", "full")])
def test_what_weight_gradients_wait_with_is_what_is_planned(model: str, recompute: str) -> None:
    config = config_of(MODELS[model], recompute=recompute)
    encoder = 2 * LENGTH if config.model.family == "encoder_decoder" else 0
    estimate = deferred_elements(config, Layout(), Lengths(LENGTH, encoder)) * BATCH * 4
    assert deferred_bytes(config, encoder) == pytest.approx(estimate, rel=0.1)


def test_the_zero_bubble_schedule_needs_as_much_as_1f1b_or_what_weight_gradients_wait_with() -> None:
    lengths, layout = Lengths(LENGTH), Layout(pipeline=2, pipeline_schedule="zero_bubble")
    plain = config_of(MODELS["gpt2"], global_batch_size=8 * BATCH)
    assert activation_bytes(plain, layout, lengths, ON_CPU) == activation_bytes(
        plain, Layout(pipeline=2), lengths, ON_CPU
    )
    full = plain.with_keys({"train.recompute": "full"})
    assert activation_bytes(full, Layout(pipeline=2), lengths, ON_CPU) < activation_bytes(full, layout, lengths, ON_CPU)
    assert activation_bytes(full, layout, lengths, ON_CPU) == deferred_elements(full, layout, lengths) * BATCH * 4


def test_lower_precision_halves_activations() -> None:
    half = config_of(MODELS["gpt2"], precision="bf16")
    estimate = activation_bytes(half, Layout(), Lengths(LENGTH), ON_CPU)
    assert estimate == activation_bytes(config_of(MODELS["gpt2"]), Layout(), Lengths(LENGTH), ON_CPU) / 2
    assert kept_bytes(half) == pytest.approx(estimate, rel=0.1)


def test_recomputed_layers_keep_their_inputs_and_one_layer() -> None:
    config = config_of(MODELS["gpt2"], recompute="full")
    one_layer = BATCH * LENGTH * 128 * 4 * 16  # of a plain layer, in fp32: 16 tensors as wide as the residual
    estimate = activation_bytes(config, Layout(), Lengths(LENGTH), ON_CPU)
    assert kept_bytes(config) == pytest.approx(estimate - one_layer, rel=0.3)


def test_axes_divide_activations() -> None:
    config, lengths = config_of(MODELS["gpt2"]), Lengths(LENGTH)
    alone = activation_bytes(config, Layout(), lengths, ON_CPU)
    assert activation_bytes(config, Layout(context=2), lengths, ON_CPU) == alone / 2
    assert activation_bytes(config, Layout(tensor=2, sequence=True), lengths, ON_CPU) == alone / 2
    # of 16 tensors as wide as the residual, the inputs and outputs of two norms stay whole
    assert activation_bytes(config, Layout(tensor=2), lengths, ON_CPU) == pytest.approx(alone * (4 + 12 / 2) / 16)
    many = config_of(MODELS["gpt2"], global_batch_size=8 * BATCH)
    assert activation_bytes(many, Layout(pipeline=2), lengths, ON_CPU) == alone, (
        "as many micro-batches as stages are under way"
    )
    assert activation_bytes(config, Layout(pipeline=2), lengths, ON_CPU) == alone / 2


def test_what_a_rank_holds() -> None:
    alone = held_bytes(large(), Layout())
    assert alone == pytest.approx(16 * 6.17e9, rel=0.01), "one table for embedding and head"
    bf16 = {"train": {"precision": "bf16"}}
    assert held_bytes(large(**bf16), Layout()) == pytest.approx(alone / 16 * 18)
    by_stage = [
        held_bytes(large(**bf16, engine={"name": "deepspeed", "zero_stage": s}), Layout(data=8)) for s in range(4)
    ]
    per_weight = [held / (alone / 16) for held in by_stage]
    assert per_weight == pytest.approx([18, 6 + 12 / 8, 2 + 16 / 8, 18 / 8])
    frozen = {"optim": {"freeze": ["*"]}}  # as a rule would not let it be: the bytes of a frozen parameter alone
    assert held_bytes(large(**bf16, **frozen), Layout()) == pytest.approx(alone / 16 * 2)
    lion = {"optim": {"name": "lion"}}
    assert held_bytes(large(**bf16, **lion), Layout()) == pytest.approx(alone / 16 * 14)
    megatron = {"engine": {"name": "megatron"}, "parallel": {"tensor": 2, "pipeline": 2}}
    assert held_bytes(large(**megatron), Layout(tensor=2, pipeline=2)) == pytest.approx(alone / 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantize", [{"scheme": "w4a16", "group": 8}, {"scheme": "w8a16", "keep": ["attention.q"]}])
def test_a_packed_base_is_what_an_engine_holds(precision: str, quantize: dict[str, Any]) -> None:
    config = tiny_run(tiny_model(vocab_size=384), {"precision": precision}).with_keys(
        {"finetune": {"method": "lora", "lora": {"rank": 4}}, "quantize": quantize}
    )
    engine = TorchEngine(config, torch.device("cpu"))
    frozen = sum(held.weight.nbytes for held in engine.frozen())
    trained = sum(master.numel() for master in engine.masters.values()) * {"fp32": 16, "bf16": 18}[precision]
    assert held_bytes(config, Layout()) == pytest.approx(frozen + trained, rel=1e-6)


def test_the_plan_of_a_known_model() -> None:
    """In bf16: of each token, each of 32 layers keeps 8 tensors as wide as the residual and 4 as wide as the MLP."""
    config = large(train={"precision": "bf16", "micro_batch_size": 1})
    plan = plan_memory(config, Layout(), sample_lengths(config.model.family, config.data))
    assert plan.held == pytest.approx(18 * 6.17e9, rel=0.01)
    assert plan.logits == 4096 * 128_256 * 8, "on a GPU 2 GiB of them in fp32"
    on_cpu = plan_memory(
        config.with_keys({"launch.device": "cpu"}), Layout(), sample_lengths(config.model.family, config.data)
    )
    assert on_cpu.logits == 1024 * 128_256 * 8
    groups = 2 * config.model.kv_heads * config.model.head_size  # keys and values
    assert plan.activations == 2 * 32 * 8192 * (6 * 4096 + groups + 2 * config.model.ffn_size), "on a GPU"
    assert on_cpu.activations == 2 * 32 * 8192 * (8 * 4096 + 4 * config.model.ffn_size)


@pytest.mark.parametrize(("context", "exchange", "kept"), [(4, "heads", 8), (16, "heads", 16), (16, "ring", 8)])
def test_fewer_key_heads_than_context_ranks_are_kept_repeated_by_heads(context: int, exchange: str, kept: int) -> None:
    """Of 8 key heads on a GPU; on a CPU kernels repeat them for each query head, but not those of a ring."""
    parallel = {"context": context, "context_exchange": exchange}
    config = large(engine={"name": "megatron"}, parallel=parallel, train={"precision": "bf16", "micro_batch_size": 1})
    layout, lengths = Layout(context=context), sample_lengths(config.model.family, config.data)
    elements = 4 * 4096 + 2 * 4096 + 2 * kept * config.model.head_size + 2 * config.model.ffn_size
    tokens = 32 * 8192 // context
    assert activation_bytes(config, layout, lengths, Kernels.of(on_gpu=True)) == 2 * tokens * elements
    on_cpu = activation_bytes(config, layout, lengths, Kernels(repeats_keys=True))
    heads = kept if exchange == "ring" else 32
    assert on_cpu == 2 * tokens * (elements + 2 * (heads - kept) * config.model.head_size)


def documented_layouts() -> list[list[str]]:
    """Cells of the table of layouts in docs/layouts.md: settings, ranks, and three sizes."""
    text = (ROOT / "docs" / "layouts.md").read_text("utf-8").partition("### Llama 8B")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def test_the_documented_sizes_are_those_of_a_dry_run(tmp_path: Path) -> None:
    """And every layout of the page is legal."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"name: page\nmodel: {{base: {ROOT / 'configs' / 'models' / 'llama-8b.yaml'}}}\n"
        "data: {train: [{path: a}], seq_len: 8192}\n"
        "train: {steps: 1, global_batch_size: 64, micro_batch_size: 1, precision: bf16}\n"
    )
    rows = documented_layouts()
    assert len(rows) > 6
    for settings, ranks, *sizes in rows:
        config = load_config(file, [*settings.split(), f"launch.num_workers={ranks}"]).config
        plan = plan_memory(
            config, plan_layout(config.parallel, int(ranks)), sample_lengths(config.model.family, config.data)
        )
        assert [short_bytes(size) for size in (plan.held, plan.activations, plan.logits)] == sizes, settings

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from llmtrain.config.model import ModelConfig
from llmtrain.config.sizes import num_parameters
from llmtrain.models.build import build_model, materialize
from llmtrain.models.cross_entropy import Objective
from llmtrain.models.transformer import ModelInputs, Transformer, build_caches
from llmtrain.parallel.draws import Draws
from llmtrain.parallel.vocabulary import VocabularyPart
from tests.support.samples import hidden_states, random_batch, tiny_model

MODELS = Path(__file__).parents[3] / "configs" / "models"

PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
}

OBJECTIVE = Objective(1.0, 16, VocabularyPart(0, 307))

SHAPES = [
    {},
    {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, "num_kv_heads": 4},
    {"position": "sinusoidal", "norm_position": "post", "activation": "relu", "tie_embeddings": False},
    {"position": "none", "activation": "geglu", "num_kv_heads": 1, "head_dim": 12},
    {"activation": "reglu", "norm": "layernorm", "norm_position": "post", "bias": True},
]


def built(config: ModelConfig, recompute: str = "none") -> Transformer:
    model = build_model(config, recompute)
    materialize(model, seed=1, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    config = ModelConfig(**YAML(typ="safe", pure=True).load(MODELS / f"{preset}.yaml"))
    model = build_model(config)
    padding = (config.padded_vocab_size - config.vocabulary) * config.hidden_size * (1 if config.tie_embeddings else 2)
    assert sum(parameter.numel() for parameter in model.parameters()) - padding == PUBLISHED[preset]
    assert num_parameters(config) == PUBLISHED[preset]


@pytest.mark.parametrize("changes", SHAPES)
def test_shapes_and_counts(changes: dict[str, object]) -> None:
    config = tiny_model(**changes)
    model, batch = built(config), random_batch(num_samples=3, seq_len=20)
    hidden_SBH = hidden_states(model, batch)
    assert hidden_SBH.shape == (20, 3, 32)
    assert model.logits(hidden_SBH).shape == (3, 20, 307)
    assert model.embeddings.word.weight.shape == (384, 32)
    padding = (384 - 307) * 32 * (1 if config.tie_embeddings else 2)
    assert sum(parameter.numel() for parameter in model.parameters()) - padding == num_parameters(config)


@pytest.mark.parametrize("changes", SHAPES)
def test_decoding_with_caches_equals_the_whole_sequence(changes: dict[str, object]) -> None:
    config = tiny_model(**changes)
    model, batch = built(config).eval(), random_batch(num_samples=2, seq_len=12)
    whole = model.logits(hidden_states(model, batch))
    caches = build_caches(config, 12)
    parts = [
        model.logits(model(ModelInputs(batch.tokens_BS[:, a:b], batch.positions_BS[:, a:b]), caches=caches)[0])
        for a, b in ((0, 5), (5, 6), (6, 7), (7, 12))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_a_packed_sample_with_resets_equals_its_documents_alone() -> None:
    model = built(tiny_model()).eval()
    tokens = random_batch(num_samples=1, seq_len=12).tokens_BS
    positions = torch.tensor([[*range(5), *range(7)]])
    segments = torch.tensor([[0] * 5 + [1] * 7])
    packed, _ = model(ModelInputs(tokens, positions, segments))
    parts = (slice(0, 5), slice(5, 12))
    first, second = (model(ModelInputs(tokens[:, part], positions[:, part]))[0] for part in parts)
    torch.testing.assert_close(packed, torch.cat((first, second)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_gives_the_same_bits_and_saves_fewer_bytes(recompute: str) -> None:
    config = tiny_model(dropout=0.1, attention_dropout=0.1)
    batch = random_batch()

    def run(recompute: str) -> tuple[list[torch.Tensor], int]:
        model, saved = built(config, recompute).train(), {}
        draws = Draws.of_micro_batch(0, 1, 0, torch.device("cpu"))

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = hidden_states(model, batch, draws)
        model.loss(hidden, batch.labels_BS, OBJECTIVE)[0].backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], sum(saved.values())

    plain_grads, plain_bytes = run("none")
    grads, saved_bytes = run(recompute)
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, grads, strict=True))
    assert saved_bytes < 0.9 * plain_bytes  # the explicit kernel keeps little to begin with


def test_padded_rows_take_no_part() -> None:
    """Whatever stands in the rows that pad the vocabulary, loss and gradients are the same, and theirs are zero."""
    config, batch = tiny_model(), random_batch()
    results = []
    for filler in (0.0, 50.0):
        model = built(config)
        with torch.no_grad():
            model.embeddings.word.weight[307:] = filler
        objective, loss_sum = model.loss(hidden_states(model, batch), batch.labels_BS, OBJECTIVE)
        objective.backward()
        grad = model.embeddings.word.weight.grad
        assert grad is not None
        assert not grad[307:].any()
        results.append((loss_sum, grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])

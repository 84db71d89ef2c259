import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import num_parameters, parameter_shapes
from llmtrain.models.head import Objective
from llmtrain.models.transformer import Transformer, build_model
from llmtrain.parallel.parts import VocabularyPart
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import PADDING, ModelInputs
from tests.support.samples import hidden_states, random_batch, tiny_model
from tests.support.weights import materialize

OBJECTIVE = Objective(1.0, 16, VocabularyPart(0, 307))

BERT = {
    "family": "encoder", "position": "learned", "norm": "layernorm", "norm_position": "post", "activation": "gelu",
    "bias": True, "token_types": 2, "embedding_norm": True, "head": "mlm", "num_kv_heads": 4,
}  # fmt: skip
T5 = {"family": "encoder_decoder", "num_encoder_layers": 3, "position": "t5_relative", "scaled_head": True}
SHAPES = [
    {},
    {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, "num_kv_heads": 4},
    {"position": "sinusoidal", "norm_position": "post", "activation": "relu", "tie_embeddings": False},
    {"position": "none", "activation": "geglu", "num_kv_heads": 1, "head_dim": 12},
    {"activation": "reglu", "norm": "layernorm", "norm_position": "post", "bias": True},
    {"position": "alibi", "qk_norm": True, "attention": {"sinks": True, "softcap": 20.0}},
    {"moe": {"num_experts": 4, "num_shared_experts": 1}, "tie_embeddings": False},
    {"moe": {"num_experts": 4, "router": "switch", "every_n_layers": 2}, "activation": "relu"},
]
OTHER_FAMILIES = [BERT, T5, {**T5, "moe": {"num_experts": 2}, "tie_embeddings": False, "scaled_head": False}]


def built(config: ModelConfig, recompute: str = "none") -> Transformer:
    model = build_model(config, recompute)
    materialize(model, seed=1, device=torch.device("cpu"))
    return model


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


@pytest.mark.parametrize("changes", [*SHAPES, *OTHER_FAMILIES])
def test_names_and_shapes_follow_from_the_configuration(changes: dict[str, object]) -> None:
    config = tiny_model(**changes)
    model = build_model(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)


def test_an_encoder_sees_both_sides_and_no_padding() -> None:
    model = built(tiny_model(**BERT)).eval()
    batch = random_batch(num_samples=1, seq_len=10)
    segments = torch.tensor([[0] * 7 + [PADDING] * 3])
    before = model(ModelInputs(batch.tokens_BS, batch.positions_BS, segments))[0]
    tokens = batch.tokens_BS.clone()
    tokens[:, 7:] = 5
    padded = model(ModelInputs(tokens, batch.positions_BS, segments))[0]
    torch.testing.assert_close(padded[:7], before[:7])
    tokens[:, 6] = 5
    assert not torch.allclose(model(ModelInputs(tokens, batch.positions_BS, segments))[0][0], before[0])


def test_a_decoder_sees_all_of_the_encoder_but_padding_and_nothing_ahead() -> None:
    model = built(tiny_model(**T5)).eval()
    encoder = random_batch(num_samples=1, seq_len=9, seed=3).tokens_BS
    segments = torch.tensor([[0] * 7 + [PADDING] * 2])
    decoder = random_batch(num_samples=1, seq_len=6)

    def hidden(encoder_tokens: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        inputs = ModelInputs(tokens, decoder.positions_BS, None, None, encoder_tokens, segments)
        return model(inputs)[0]

    def changed(tokens: torch.Tensor, place: int) -> torch.Tensor:
        other = tokens.clone()
        other[0, place] = 7
        return other

    before = hidden(encoder, decoder.tokens_BS)
    torch.testing.assert_close(hidden(changed(encoder, 8), decoder.tokens_BS), before)
    assert not torch.allclose(hidden(changed(encoder, 6), decoder.tokens_BS)[0], before[0])
    ahead = hidden(encoder, changed(decoder.tokens_BS, 4))
    torch.testing.assert_close(ahead[:4], before[:4])
    assert not torch.allclose(ahead[4], before[4])


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

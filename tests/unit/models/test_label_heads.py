"""Heads for labels on one rank: losses beside PyTorch's own, entities and answers beside plain counting."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes
from llmtrain.models.head import Objective
from llmtrain.models.label_heads import TagTable, best_spans, entity_counts
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import Transformer, build_model, chosen_from
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import IGNORED_LABEL, PADDING, Batch
from llmtrain.values.label_metrics import label_metrics, num_counts
from tests.support.samples import tiny_model
from tests.support.weights import materialize

BERT = {
    "family": "encoder", "position": "learned", "norm": "layernorm", "norm_position": "post", "activation": "gelu",
    "bias": True, "token_types": 2, "embedding_norm": True, "num_kv_heads": 4,
}  # fmt: skip
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
HEADS = {
    "classifier": {**BERT, "head": "classifier", "num_labels": 3},
    "tags": {**BERT, "head": "token_classifier", "labels": TAGS},
    "span": {**BERT, "head": "span"},
    "decoder": {"head": "classifier", "num_labels": 3},
    "decoder_tags": {"head": "token_classifier", "labels": TAGS, "tie_embeddings": False},
}


def built(name: str, **changes: Any) -> Transformer:
    model = build_model(tiny_model(**HEADS[name], **changes))
    materialize(model, seed=1, device=torch.device("cpu"))
    return model


def labelled_batch(config: ModelConfig, num_samples: int = 3, seq_len: int = 20) -> Batch:
    """Samples of different lengths with labels where the head wants them; the last sample stands for none."""
    draws = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, 307, (num_samples, seq_len), generator=draws)
    ends_B = seq_len - 3 * torch.arange(num_samples)
    places_S = torch.arange(seq_len)
    segments_BS = torch.where(places_S < ends_B[:, None], 0, PADDING)
    labels_BS = torch.full_like(tokens_BS, IGNORED_LABEL)
    if config.head == "span":
        labels_BS[:, :2] = torch.tensor([[4, 6], [2, 2], [5, 9]])
    elif config.head == "token_classifier":
        labels_BS = torch.where(segments_BS == PADDING, labels_BS, places_S % config.num_classes)
    else:
        places_B = torch.zeros_like(ends_B) if config.family == "encoder" else ends_B - 1
        labels_BS[torch.arange(num_samples), places_B] = torch.tensor([2, 0, 1])
    labels_BS[-1] = IGNORED_LABEL
    return Batch(tokens_BS, places_S.expand_as(tokens_BS), segments_BS, labels_BS=labels_BS)


def expected_loss(model: Transformer, batch: Batch) -> torch.Tensor:
    """The sum over the targets, by PyTorch's cross-entropy on the logits that the model gives for use."""
    logits = model.logits(model(batch)[0], batch)
    if model.config.head == "classifier":
        return F.cross_entropy(logits, batch.labels_BS.amax(1), ignore_index=IGNORED_LABEL, reduction="sum")
    if model.config.head == "token_classifier":
        labels = batch.labels_BS.flatten()
        return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    assert batch.segments_BS is not None
    seen_BS2 = logits.masked_fill((batch.segments_BS == PADDING)[..., None], float("-inf"))
    ends = zip(seen_BS2.unbind(-1), batch.labels_BS[:, :2].unbind(1), strict=True)
    losses = [F.cross_entropy(scores, place, ignore_index=IGNORED_LABEL, reduction="sum") for scores, place in ends]
    return losses[0] + losses[1]


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_pytorch(name: str) -> None:
    model = built(name)
    batch = labelled_batch(model.config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(model.config)
    scaled, loss_sum = model.loss(model(batch)[0], batch.labels_BS, objective(model, 0.25), batch)
    scaled.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = expected_loss(model, batch)
    (0.25 * expected).backward()
    torch.testing.assert_close(loss_sum, expected.detach())
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[parameter_name], parameter.grad, atol=1e-6, rtol=1e-4)
        assert parameter.grad is not None or parameter_name == "embeddings.token_type.weight"


def objective(model: Transformer, scale: float = 1.0, draws: Draws | None = None) -> Objective:
    return Objective(scale, 16, chosen_from(model.config), draws)


@pytest.mark.parametrize("name", HEADS)
def test_padding_changes_no_loss(name: str) -> None:
    model = built(name)
    batch = labelled_batch(model.config)
    assert batch.segments_BS is not None
    losses = []
    for seq_len in (20, 17):  # the second sample's length is 17
        rows = (tensor[1:2, :seq_len] for tensor in (batch.tokens_BS, batch.positions_BS, batch.segments_BS))
        cut = Batch(*rows, labels_BS=batch.labels_BS[1:2, :seq_len])
        losses.append(model.loss(model(cut)[0], cut.labels_BS, objective(model), cut)[1])
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


def test_dropout_before_the_classifier_is_that_of_the_configuration() -> None:
    model = built("classifier", head_dropout=0.5)
    batch, draws = labelled_batch(model.config), Draws.of_micro_batch(1, 1, 0, torch.device("cpu"))
    hidden = model(batch, Pass())[0]
    with_draws, without = (
        model.loss(hidden, batch.labels_BS, objective(model, 1.0, d), batch)[1] for d in (draws, None)
    )
    assert with_draws != without
    again = model.loss(hidden, batch.labels_BS, objective(model, 1.0, draws), batch)[1]
    assert again == with_draws


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_an_evaluation_counts_behind_the_loss(name: str) -> None:
    model = built(name)
    batch = labelled_batch(model.config)
    sums = model.loss(model(batch)[0], batch.labels_BS, objective(model), batch)[1]
    torch.testing.assert_close(sums[0], expected_loss(model, batch))
    assert len(sums) == 1 + num_counts(model.config)
    found = label_metrics(model.config, sums[1:].tolist())
    logits = model.logits(model(batch)[0], batch)
    if model.config.head == "span":
        assert sums[3] == 2 and 0 <= found["exact_match"] <= found["token_f1"] <= 1
        return
    labels = batch.labels_BS.amax(1) if model.config.head == "classifier" else batch.labels_BS
    right = (logits.argmax(-1) == labels)[labels >= 0].float().mean()
    assert found["accuracy"] == pytest.approx(float(right)) == found["micro_f1"]


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(kind, first, last) of each entity, by going from word to word."""
    found, begin, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        if kind and (tag[:2] != "I-" or tag[2:] != kind):
            found.add((kind, begin, place - 1))
            kind = ""
        if tag != "O" and not kind:
            begin, kind = place, tag[2:]
    return found


def test_entities_are_counted_as_by_going_from_word_to_word() -> None:
    """All pairs of two tags and what stands before them, with positions between words that have no label."""
    table = TagTable.of(TAGS, torch.device("cpu"))
    sequences = list(product(range(5), repeat=3))
    for shift in range(0, len(sequences), 7):
        there, found = sequences, sequences[shift:] + sequences[:shift]
        labels_SB = torch.full((7, len(there)), IGNORED_LABEL)
        best_SB = torch.ones(7, len(there), dtype=torch.long)
        for row, place in enumerate((1, 2, 5)):
            labels_SB[place] = torch.tensor([words[row] for words in there])
            best_SB[place] = torch.tensor([words[row] for words in found])
        pairs = [
            (entities([TAGS[tag] for tag in a]), entities([TAGS[tag] for tag in b]))
            for a, b in zip(found, there, strict=True)
        ]
        expected = [sum(len(a & b) for a, b in pairs), *(sum(map(len, sets)) for sets in zip(*pairs, strict=True))]
        assert entity_counts(best_SB, labels_SB, table).tolist() == expected


def test_the_best_span_is_that_of_all_pairs_in_order() -> None:
    logits_SB2 = torch.randn(9, 50, 2, generator=torch.Generator().manual_seed(3))
    allowed_SB = (torch.arange(9)[:, None] >= torch.arange(50) % 7).expand(9, 50)
    begin_B, end_B = best_spans(logits_SB2, allowed_SB)
    for sample in range(50):
        scores = {
            (a, b): float(logits_SB2[a, sample, 0] + logits_SB2[b, sample, 1])
            for a in range(9) for b in range(a, 9) if a >= sample % 7
        }  # fmt: skip
        assert (int(begin_B[sample]), int(end_B[sample])) == max(scores, key=scores.__getitem__)


def test_macro_f1_is_over_the_labels_that_occur() -> None:
    config = tiny_model(head="classifier", num_labels=4)
    # Three samples: 0 as 0, 0 as 1, 1 as 1; nobody has 2 or 3.
    found = label_metrics(config, [1, 1, 0, 0, 1, 2, 0, 0, 2, 1, 0, 0])
    assert found == {"accuracy": 2 / 3, "macro_f1": pytest.approx(2 / 3), "micro_f1": 2 / 3}


def test_the_answer_f1_is_that_of_shared_positions() -> None:
    from llmtrain.models.label_heads import answer_counts

    labels_B2 = torch.tensor([[2, 5], [0, 0], [3, 4], [-100, -100]])
    best = torch.tensor([4, 0, 6, 1]), torch.tensor([7, 0, 6, 1])
    assert answer_counts(best, labels_B2).tolist() == [1, 0.5 + 1, 3]

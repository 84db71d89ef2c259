"""Heads for labels and transformers: exports, imports, and twenty steps of training beside a plain loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    pipeline,
)

from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.config.schema import OptimConfig, RunConfig, TrainConfig
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.model import build_trained, logits_of
from llmtrain.interop.examples import Example
from llmtrain.interop.families.label_heads import SUFFIXES
from llmtrain.interop.hf_export import ExportSettings, write_export
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.proof import their_inputs
from llmtrain.models import label_heads
from llmtrain.models.label_heads import Pooler
from llmtrain.values.batch import IGNORED_LABEL, PADDING, Batch
from tests.unit.interop.models import (
    BERT,
    GPT2,
    LLAMA,
    MIXTRAL,
    QWEN3,
    model_for,
    random_export,
    random_model,
    weights_of,
)

NAMES = ("O", "B-PER", "I-PER")
EXPORTED = {
    "Bert classifier": BERT.with_keys({"head": "classifier", "labels": ("man1", "man3", "man8"), "head_dropout": 0.3}),
    "Bert token_classifier": BERT.with_keys({"head": "token_classifier", "labels": NAMES}),
    "Bert span": BERT.with_keys({"head": "span"}),
    "Bert classifier untied": BERT.with_keys({"head": "classifier", "num_labels": 2, "tie_embeddings": False}),
    "GPT2 classifier": GPT2.with_keys({"head": "classifier", "num_labels": 4}),
    "GPT2 token_classifier": GPT2.with_keys({"head": "token_classifier", "labels": NAMES}),
    "Llama classifier": LLAMA.with_keys({"head": "classifier", "num_labels": 4}),
    "Llama token_classifier": LLAMA.with_keys({"head": "token_classifier", "labels": NAMES}),
    "Qwen3 classifier": QWEN3.with_keys({"head": "classifier", "num_labels": 4}),
    "Mixtral classifier": MIXTRAL.with_keys({"head": "classifier", "num_labels": 4}),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_gives_our_logits_and_comes_back_bit_for_bit(name: str, small_tokenizer: Any, tmp_path: Path) -> None:
    config, (prefix, head) = EXPORTED[name], name.split()[:2]
    model, out = random_model(config), tmp_path / "out"
    proof = write_export(out, model_for(config, small_tokenizer), weights_of(model), ExportSettings()).proof
    assert proof.max_difference <= 1e-4 and proof.num_greedy_tokens >= 4
    content = json.loads((out / "config.json").read_text())
    assert content["architectures"] == [f"{prefix}{SUFFIXES[head]}"]
    if config.labels:
        assert content["id2label"] == {str(number): label for number, label in enumerate(config.labels)}
    assert not (out / "generation_config.json").exists()
    assert f"{proof.num_greedy_tokens} best labels are equal" in (out / "README.md").read_text("utf-8")
    folder = open_hf_folder(out)
    assert folder.notes == []
    assert (folder.model.head, folder.model.num_classes, folder.model.labels) == (
        config.head, config.num_classes, config.labels,
    )  # fmt: skip
    for key, parameter in model.named_parameters():
        assert torch.equal(folder.tensor(key), parameter), key


def test_layers_are_proved_some_at_a_time(small_tokenizer: Any, tmp_path: Path) -> None:
    config = EXPORTED["Bert classifier"]
    settings = ExportSettings(proof_bytes=1)
    proof = write_export(tmp_path / "out", *random_export(config, small_tokenizer), settings).proof
    assert proof.num_parts == 2 and proof.max_difference <= 1e-4


SIZES: dict[str, Any] = {"vocab_size": 307, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_SIZES = {**SIZES, "intermediate_size": 80, "num_key_value_heads": 2, "pad_token_id": 0}
BERT_SIZES = {**SIZES, "intermediate_size": 80, "max_position_embeddings": 64}
GPT2_SIZES = {"vocab_size": 307, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
PUBLISHED = [
    (BertForSequenceClassification, BertConfig(**BERT_SIZES, num_labels=3)),
    (BertForTokenClassification, BertConfig(**BERT_SIZES, id2label=dict(enumerate(NAMES)))),
    (BertForQuestionAnswering, BertConfig(**BERT_SIZES)),
    (GPT2ForSequenceClassification, GPT2Config(**GPT2_SIZES, num_labels=3)),
    (GPT2ForTokenClassification, GPT2Config(**GPT2_SIZES, id2label=dict(enumerate(NAMES)))),
    (LlamaForSequenceClassification, LlamaConfig(**LLAMA_SIZES, num_labels=3)),
    (LlamaForTokenClassification, LlamaConfig(**LLAMA_SIZES, num_labels=3)),
    (MixtralForSequenceClassification, MixtralConfig(**LLAMA_SIZES, num_local_experts=4, num_labels=3)),
]


def published(folder: Path, kind: Any, config: Any) -> Any:
    torch.manual_seed(3)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "config"), PUBLISHED, ids=[kind.__name__ for kind, _ in PUBLISHED])
@torch.no_grad()
def test_an_import_gives_their_logits(kind: Any, config: Any, tmp_path: Path) -> None:
    theirs = published(tmp_path, kind, config)
    folder = open_hf_folder(tmp_path)
    ours = build_trained(folder.model, folder, torch.device("cpu"))
    tokens_BS = torch.randint(1, 307, (3, 20), generator=torch.Generator().manual_seed(0))
    valid_BS = torch.arange(20) < torch.tensor([[20], [13], [5]])
    types_BS = (torch.arange(20) >= 7).long().expand(3, 20) if folder.model.token_types > 1 else None
    example = Example(tokens_BS.masked_fill(~valid_BS, 0), valid_BS, types_BS=types_BS)
    output, logits = theirs(**their_inputs(example)), logits_of(ours, example)
    expected = torch.stack((output.start_logits, output.end_logits), -1) if "start_logits" in output else output.logits
    if logits.dim() == 3:
        logits, expected = logits[valid_BS], expected[valid_BS]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert folder.model.labels == (NAMES if "Token" in kind.__name__ and config.id2label[0] == "O" else None)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"num_labels": 1}, "labels are numbered from 0 on, and there are two at least"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "problem_type multi_label_classification"),
    ],
)
def test_heads_that_are_none_of_ours_are_refused(keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    published(tmp_path, BertForSequenceClassification, BertConfig(**BERT_SIZES, **keys))
    with pytest.raises(ConfigError, match=says):
        open_hf_folder(tmp_path)


def leave_out_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pooler, "forward", lambda self, x_SBH: self.dense(x_SBH))


def classify_by_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    original = label_heads.labelled_rows

    def shifted(hidden_sBH: Tensor, labels_sB: Tensor) -> tuple[Tensor, Tensor]:
        return original(hidden_sBH.roll(-1, 0), labels_sB)

    monkeypatch.setattr("llmtrain.models.label_loss.labelled_rows", shifted)


def test_an_export_without_tanh_is_caught(
    small_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EXPORTED["Bert classifier"]
    leave_out_tanh(monkeypatch)
    with pytest.raises(ExportError, match="computes other logits"):
        write_export(tmp_path / "out", *random_export(config, small_tokenizer), ExportSettings())
    assert not (tmp_path / "out").exists()


STEPS, LR = 20, 1e-3


def labelled_batches(kind: str) -> list[Batch]:
    """A batch of texts of different lengths for each step."""
    draws, found = torch.Generator().manual_seed(5), []
    for _ in range(STEPS):
        tokens_BS = torch.randint(1, 307, (8, 24), generator=draws)
        ends_B = torch.randint(10, 25, (8,), generator=draws)
        places_S = torch.arange(24)
        valid_BS = places_S < ends_B[:, None]
        labels_BS = torch.full_like(tokens_BS, IGNORED_LABEL)
        if kind == "span":
            begin_B1 = torch.randint(2, 6, (8, 1), generator=draws)
            labels_BS[:, :2] = torch.cat((begin_B1, begin_B1 + torch.randint(0, 4, (8, 1), generator=draws)), 1)
        elif kind == "token_classifier":
            labels_BS = torch.where(valid_BS & (places_S % 2 == 0), tokens_BS % 3, IGNORED_LABEL)
        else:
            place_B = torch.zeros_like(ends_B) if kind == "classifier" else ends_B - 1
            labels_BS[torch.arange(8), place_B] = tokens_BS[:, 1] % 3
        types_BS = (places_S >= 8).long() * valid_BS
        batch = Batch(tokens_BS.masked_fill(~valid_BS, 0), places_S.expand(8, 24), torch.where(valid_BS, 0, PADDING),
                      labels_BS=labels_BS, token_types_BS=None if kind == "decoder" else types_BS)  # fmt: skip
        found.append(batch)
    return found


def their_losses(theirs: Any, kind: str, optim: OptimConfig) -> list[float]:
    """The plain loop. Of answers, the mean over both ends; padding is hidden from their softmax as from ours."""
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    theirs.train()
    losses = []
    for batch in labelled_batches(kind):
        assert batch.segments_BS is not None
        valid_BS = batch.segments_BS != PADDING
        inputs = their_inputs(Example(batch.tokens_BS, valid_BS, types_BS=batch.token_types_BS))
        if kind == "span":
            output = theirs(**inputs)
            ends = zip((output.start_logits, output.end_logits), batch.labels_BS[:, :2].unbind(1), strict=True)
            hidden = [(scores.masked_fill(~valid_BS, -torch.inf), place) for scores, place in ends]
            loss = sum(torch.nn.functional.cross_entropy(*pair) for pair in hidden) / 2
        else:
            labels = batch.labels_BS if kind == "token_classifier" else batch.labels_BS.amax(1)
            loss = theirs(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), optim.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


TRAINED = {
    "classifier": (BertForSequenceClassification, BertConfig(**BERT_SIZES, num_labels=3, **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0))),
    "token_classifier": (BertForTokenClassification, BertConfig(**BERT_SIZES, num_labels=3, **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0))),
    "span": (BertForQuestionAnswering, BertConfig(**BERT_SIZES, **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0))),
    "decoder": (LlamaForSequenceClassification, LlamaConfig(**LLAMA_SIZES, num_labels=3)),
}  # fmt: skip


def losses_of_both(kind: str, folder: Path) -> tuple[list[float], list[float]]:
    theirs = published(folder, *TRAINED[kind])
    model = open_hf_folder(folder).model
    optim = OptimConfig(lr=LR, weight_decay=0.0)
    train = TrainConfig(steps=STEPS, global_batch_size=8, micro_batch_size=4)
    data = DataConfig(train=(SourceConfig(path="none"),), seq_len=24, objective="labels")
    engine = TorchEngine(RunConfig(name="tuned", model=model, data=data, train=train, optim=optim), torch.device("cpu"))
    engine.load_weights(open_hf_folder(folder))
    batches = [[half(batch, slice(4)), half(batch, slice(4, 8))] for batch in labelled_batches(kind)]
    ours = [engine.train_step(step, halves, LR).loss for step, halves in enumerate(batches, 1)]
    return ours, their_losses(theirs, kind, optim)


def half(batch: Batch, rows: slice) -> Batch:
    """Some of the rows: two micro-batches make a step."""
    types = None if batch.token_types_BS is None else batch.token_types_BS[rows]
    assert batch.segments_BS is not None
    return Batch(batch.tokens_BS[rows], batch.positions_BS[rows], batch.segments_BS[rows],
                 labels_BS=batch.labels_BS[rows], token_types_BS=types)  # fmt: skip


@pytest.mark.parametrize("kind", TRAINED)
def test_twenty_steps_have_the_losses_of_a_plain_loop(kind: str, tmp_path: Path) -> None:
    ours, theirs = losses_of_both(kind, tmp_path)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] != pytest.approx(ours[0], rel=0.01), "it has learned something"


@pytest.mark.parametrize("mutation", [leave_out_tanh, classify_by_the_next_token])
def test_another_head_is_caught_at_the_first_step(
    mutation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    ours, theirs = losses_of_both("classifier", tmp_path)
    assert abs(ours[0] - theirs[0]) > 1e-3


def test_their_pipeline_names_our_labels(small_tokenizer: Any, tmp_path: Path) -> None:
    config = EXPORTED["GPT2 classifier"].with_keys({"labels": ("a", "b", "c", "d")})
    write_export(tmp_path / "out", *random_export(config, small_tokenizer), ExportSettings())
    found: Any = pipeline("text-classification", model=str(tmp_path / "out"))("abc def")
    assert found[0]["label"] in ("a", "b", "c", "d")

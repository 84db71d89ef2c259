"""Rows of new tokens: those of the base stay, those above are drawn by seed, name and index, in every layout."""

from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.origin import Origin
from llmtrain.config.parameters import parameter_shapes
from llmtrain.config.schema import RunConfig
from llmtrain.finetune.base_weights import BaseWeights
from llmtrain.models.init import InitialWeights
from llmtrain.preflight.differences import differences
from llmtrain.values.fragment import Box
from tests.support.samples import tiny_model, tiny_run

KNOWN, GROWN = 300, 390
"""On both sides of a multiple of 128, so that the tensors grow."""


def run_of(vocab_size: int, **keys: object) -> RunConfig:
    model = tiny_model(vocab_size=vocab_size, tie_embeddings=False)
    return tiny_run(model).with_keys({"finetune": {"base": "base", **keys}})


@pytest.mark.parametrize("name", ["embeddings.word.weight", "head.weight"])
def test_known_rows_are_the_base_s_and_new_ones_are_drawn(name: str) -> None:
    base, config = InitialWeights(run_of(KNOWN).model, 7), run_of(GROWN)
    grown = BaseWeights(base, config, base_vocab=KNOWN)
    shape = parameter_shapes(config.model)[name]
    assert grown.global_shape(name, "master") == shape != base.global_shape(name, "master")
    whole = grown.read(name, "master", Box.whole(shape))
    drawn = InitialWeights(config.model, config.seed).read(name, "master", Box.whole(shape))
    known = base.read(name, "master", Box((0, 0), (KNOWN, shape[1])))
    assert torch.equal(whole[:KNOWN], known) and torch.equal(whole[KNOWN:GROWN], drawn[KNOWN:GROWN])
    assert whole[KNOWN:GROWN].abs().sum() > 0 and not whole[GROWN:].any(), "padding is zero"
    for first, rows, column, columns in ((0, 128, 0, 32), (256, 128, 3, 7), (299, 2, 0, 32), (384, 128, 0, 32)):
        box = Box((first, column), (rows, columns))
        assert torch.equal(grown.read(name, "master", box), whole[first : first + rows, column : column + columns])


def test_other_tensors_and_equal_vocabularies_are_the_base_s() -> None:
    base = InitialWeights(run_of(KNOWN).model, 7)
    for config, known in ((run_of(GROWN), KNOWN), (run_of(KNOWN), KNOWN), (run_of(KNOWN), None)):
        found = BaseWeights(base, config, base_vocab=known)
        for name, shape in parameter_shapes(run_of(KNOWN).model).items():
            if config.model.vocabulary == KNOWN or not name.startswith(("embeddings", "head")):
                whole = Box.whole(shape)
                assert torch.equal(found.read(name, "master", whole), base.read(name, "master", whole))


def test_new_tokens_that_are_never_trained_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base", "checkpoints").mkdir(parents=True)
    was = {"model": run_of(KNOWN).model.model_dump(mode="json")}
    origin = Origin(Path("base"), False, was, {}, {})
    assert differences(origin, run_of(GROWN), None) == []
    (frozen,) = differences(origin, run_of(GROWN, method="lora"), None)
    assert frozen.key == "model.vocab_size" and "embeddings.word.weight, head.weight is frozen" in frozen.text
    also = {"method": "lora", "lora": {"train_also": ["embeddings.word.weight", "head.weight"]}}
    assert differences(origin, run_of(GROWN, **also), None) == []
    fewer = differences(origin, run_of(KNOWN - 100), None)
    assert [item.key for item in fewer] == ["model.vocab_size"] and fewer[0].fixed

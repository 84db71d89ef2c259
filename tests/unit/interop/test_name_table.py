"""The tables name every parameter once, and the two directions undo each other."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtrain.interop.hf import SpecialTokens, family_for, hf_config
from llmtrain.interop.name_table import iter_theirs, pairings, parameter_shapes, their_shape, to_ours
from tests.unit.interop.models import GPT2, MODELS, random_model


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_our_model_and_of_transformers_model(name):
    config = MODELS[name]
    model = random_model(config)
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(hf_config(config, SpecialTokens(3)))
    table = pairings(family_for(config).table, config)
    assert {pairing.theirs: their_shape(pairing, config) for pairing in table} == {
        name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()
    }


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise(name):
    config = MODELS[name]
    tensors = dict(random_model(config).named_parameters())
    table = family_for(config).table
    theirs = dict(iter_theirs(table, config, lambda key: tensors[key].detach()))
    ours = {}
    for pairing in pairings(table, config):
        ours |= zip(pairing.ours, to_ours(pairing, theirs[pairing.theirs], config), strict=True)
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[key], tensors[key]) for key in tensors)


def test_fused_and_transposed_by_hand():
    tensors = dict(random_model(GPT2).named_parameters())
    theirs = dict(iter_theirs(family_for(GPT2).table, GPT2, lambda key: tensors[key].detach()))
    fused = theirs["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (48, 144)
    assert torch.equal(fused[:, 48:96], tensors["decoder.layers.1.attention.k.weight"].T)
    assert torch.equal(theirs["transformer.h.1.attn.c_attn.bias"][96:], tensors["decoder.layers.1.attention.v.bias"])
    assert torch.equal(theirs["transformer.h.0.mlp.c_fc.weight"].T, tensors["decoder.layers.0.mlp.up.weight"])
    assert theirs["transformer.wte.weight"].shape == (307, 48)


def test_a_table_that_misses_a_parameter_is_noticed():
    table = [row for row in family_for(GPT2).table if row.theirs != "transformer.h.{n}.ln_2"]
    with pytest.raises(AssertionError):
        pairings(table, GPT2)

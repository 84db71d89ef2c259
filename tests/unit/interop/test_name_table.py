"""The tables name every parameter once, and the two directions undo each other."""

import pytest
import torch

from llmtrain.interop.families import gpt2
from llmtrain.interop.families.mixtral import STACKED_TABLE
from llmtrain.interop.hf import family_for, hf_config
from llmtrain.interop.name_table import covers, iter_theirs, pairings, parameter_shapes, their_shape, to_ours
from llmtrain.interop.proof import AUTO_CLASSES
from llmtrain.interop.text.special_tokens import NamedTokens
from tests.unit.interop.models import GPT2, MIXTRAL, MODELS, SWITCH, random_model


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_our_model_and_of_transformers_model(name):
    config = MODELS[name]
    model = random_model(config)
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    written = hf_config(config, NamedTokens(3))
    with torch.device("meta"):
        # As from a file: T5's class reads the key for the tie in its own way.
        theirs = AUTO_CLASSES[config.family].from_config(type(written).from_dict(written.to_dict()))
    # In memory transformers has Mixtral's experts stacked.
    table = family_for(config).tables_for(config)[-1 if name.startswith("mixtral") else 0]
    shapes = {}
    for pairing in pairings(table, config):
        shapes |= dict.fromkeys((pairing.theirs, *pairing.written_copies), their_shape(pairing, config))
    assert shapes == {name: tuple(theirs.get_parameter(name).shape) for name in shapes}
    assert {name for name, _ in theirs.named_parameters()} <= shapes.keys()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise(name):
    config = MODELS[name]
    tensors = {name: parameter.detach() for name, parameter in random_model(config).named_parameters()}
    for table in family_for(config).tables_for(config):
        theirs = dict(iter_theirs(table, config, lambda key, e=None: tensors[key] if e is None else tensors[key][e]))
        ours = {}
        for pairing in pairings(table, config):
            for key, tensor in zip(pairing.ours, to_ours(pairing, theirs[pairing.theirs], config), strict=True):
                ours[key, pairing.expert] = tensor
        for key, tensor in tensors.items():
            experts = [ours[key, number] for number in range(len(tensor)) if (key, number) in ours]
            assert torch.equal(torch.stack(experts) if experts else ours[key, None], tensor)


def test_fused_and_transposed_by_hand():
    tensors = dict(random_model(GPT2).named_parameters())
    theirs = dict(iter_theirs(gpt2.TABLE, GPT2, lambda key, e=None: tensors[key].detach()))
    fused = theirs["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (48, 144)
    assert torch.equal(fused[:, 48:96], tensors["decoder.layers.1.attention.k.weight"].T)
    assert torch.equal(theirs["transformer.h.1.attn.c_attn.bias"][96:], tensors["decoder.layers.1.attention.v.bias"])
    assert torch.equal(theirs["transformer.h.0.mlp.c_fc.weight"].T, tensors["decoder.layers.0.mlp.up.weight"])
    assert theirs["transformer.wte.weight"].shape == (307, 48)


def test_experts_and_stacks_by_hand():
    tensors = {name: parameter.detach() for name, parameter in random_model(MIXTRAL).named_parameters()}
    theirs = dict(iter_theirs(STACKED_TABLE, MIXTRAL, lambda key, e=None: tensors[key]))
    stacked = theirs["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(stacked[:, :80], tensors["decoder.layers.1.moe.experts.gate"])
    assert torch.equal(stacked[:, 80:], tensors["decoder.layers.1.moe.experts.up"])
    (table,) = family_for(SWITCH).tables_for(SWITCH)
    named = {pairing.theirs: pairing for pairing in pairings(table, SWITCH)}
    expert = named["encoder.block.3.layer.1.mlp.experts.expert_4.wi.weight"]
    assert (expert.ours, expert.expert, expert.layer) == (("encoder.layers.3.moe.experts.up",), 4, 3)
    assert named["decoder.block.0.layer.2.mlp.wi.weight"].ours == ("decoder.layers.0.mlp.up.weight",)
    assert "decoder.block.3.layer.2.mlp.wi.weight" not in named, "the decoder has 2 layers, the encoder 4"


def test_a_table_that_misses_a_parameter_is_noticed():
    table = tuple(row for row in gpt2.TABLE if row.theirs != "transformer.h.{n}.ln_2")
    assert not covers(table, GPT2)
    with pytest.raises(AssertionError):
        pairings(table, GPT2)

"""Keys and mixed bits are the same for good, and the same for whole numbers, arrays and tensors."""

import random

import numpy as np
import torch

from llmtrain.parallel import stateless_random
from llmtrain.values.keyed_hash import MASK_64, derived_key, mixed, mixed_array, signed, wide_key


def test_pinned_keys() -> None:
    """Runs that began with them go on with them."""
    assert derived_key(7, "draws", 3, 1) == -975617887712325751
    assert wide_key("shards", 7, 0, 2).hex()[:32] == "d4bf612af5036cdad5dd42a444b99f99"
    assert len(wide_key("windows")) == 64
    assert mixed(12345) == 17540659726606785873


def test_keys_depend_on_every_part_and_on_order() -> None:
    assert len({wide_key("a", 1, 2), wide_key("a", 2, 1), wide_key("b", 1, 2), wide_key("a", 12)}) == 4


def test_all_three_mix_alike() -> None:
    draw = random.Random(5)
    values = [0, 1, MASK_64, 1 << 63, *(draw.getrandbits(64) for _ in range(1000))]
    expected = [mixed(value) for value in values]
    assert mixed_array(np.array(values, np.uint64)).tolist() == expected
    tensor = stateless_random.mixed(torch.tensor([signed(value) for value in values]))
    assert [value & MASK_64 for value in tensor.tolist()] == expected
    assert len(set(expected)) == len(set(values))

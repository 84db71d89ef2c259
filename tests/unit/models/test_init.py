import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmtrain.config.parameters import Parameter, declare_parameters
from llmtrain.models import init
from llmtrain.models.init import BLOCK_ELEMENTS, distribution, draw_block, initial_tensor
from llmtrain.models.transformer import build_model
from llmtrain.values.fragment import Box
from llmtrain.values.keyed_hash import derived_key
from tests.support.samples import tiny_model
from tests.support.weights import materialize

OUT = "decoder.layers.3.attention.out.weight"
UP = "decoder.layers.3.mlp.up.weight"


def declared(name: str, shape: tuple[int, ...]) -> Parameter:
    """A parameter of a model with four layers, of another shape."""
    return replace(declare_parameters(tiny_model(num_layers=4))[name], shape=shape)


def test_weights_depend_on_seed_and_name() -> None:
    config = tiny_model()
    weights = {
        (seed, name): initial_tensor(declared(name, (32, 32)), config, seed) for seed in (1, 2) for name in (OUT, UP)
    }
    assert torch.equal(weights[1, UP], initial_tensor(declared(UP, (32, 32)), config, 1))
    flat = [weight.flatten().tolist() for weight in weights.values()]
    assert len({tuple(values) for values in flat}) == 4


def test_a_tensor_is_its_blocks_in_order() -> None:
    config, shape = tiny_model(), (3, 50_000)
    flat = initial_tensor(declared(UP, shape), config, 7).flatten()
    rule = distribution(declared(UP, shape), config)
    key = derived_key(7, "initialization", UP) & (2**64 - 1)
    for block in range(3):
        drawn = np.empty(BLOCK_ELEMENTS, dtype=np.float32)
        draw_block(drawn, key, block, rule)
        expected = torch.from_numpy(drawn)
        part = flat[block * BLOCK_ELEMENTS : (block + 1) * BLOCK_ELEMENTS]
        assert torch.equal(part, expected[: len(part)])
    assert not torch.equal(flat[:1000], flat[BLOCK_ELEMENTS : BLOCK_ELEMENTS + 1000])


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("shape", [(200_000,), (300, 700), (5, 40, 333), (2, 3, 70_000)], ids=str)
def test_a_part_has_the_bits_of_the_whole(
    shape: tuple[int, ...], num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any box, drawn by any number of threads; strips of rows few or many at a time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr(init, "STRIP_ELEMENTS", 100_000)
    config, parameter, chance = tiny_model(), declared(UP, shape), random.Random(0)
    whole = initial_tensor(parameter, config, 7)
    for _ in range(10):
        offsets = tuple(chance.randrange(size) for size in shape)
        box = Box(offsets, tuple(chance.randint(1, size - at) for size, at in zip(shape, offsets, strict=True)))
        assert torch.equal(initial_tensor(parameter, config, 7, box), whole[box.slices_in(Box.whole(shape))]), box


def test_there_are_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """launch.threads_per_worker may be any number."""
    started: list[int] = []
    pool = init.ThreadPoolExecutor
    monkeypatch.setattr(init, "ThreadPoolExecutor", lambda threads: (started.append(threads), pool(threads))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    initial_tensor(declared(UP, (1024, 1024)), tiny_model(), 7)  # 16 blocks
    assert started == [3]


def test_a_part_of_a_vocabulary_has_its_padding() -> None:
    parameter, config = declare_parameters(tiny_model())["embeddings.word.weight"], tiny_model()
    whole = initial_tensor(parameter, config, 3)
    for first, rows in ((0, 192), (192, 192), (320, 64)):
        box = Box((first, 3), (rows, 7))
        assert torch.equal(initial_tensor(parameter, config, 3, box), whole[first : first + rows, 3:10])


def test_only_blocks_that_a_part_touches_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = init.draw_block
    monkeypatch.setattr(
        init, "draw_block", lambda target, key, block, rule: (drawn.append(block), draw(target, key, block, rule))
    )
    parameter = declared(UP, (4096, 1024))  # 64 blocks, each 64 rows
    initial_tensor(parameter, tiny_model(), 0, Box((1024, 0), (1024, 1024)))  # a rank's rows, of four ranks
    assert sorted(drawn) == list(range(16, 32))
    drawn.clear()
    initial_tensor(parameter, tiny_model(), 0, Box((100, 7), (1, 500)))  # in one row
    assert drawn == [1]
    drawn.clear()
    initial_tensor(parameter, tiny_model(), 0, Box((64, 256), (128, 256)))  # columns: each block once
    assert sorted(drawn) == [1, 2]


@pytest.mark.parametrize(
    ("scheme", "shape", "std"),
    [
        ("normal", (512, 256), 0.02),
        ("small_normal", (512, 256), math.sqrt(2 / (5 * 32))),
        ("xavier_normal", (512, 256), math.sqrt(2 / 768)),
        ("xavier_uniform", (512, 256), math.sqrt(2 / 768)),
    ],
)
def test_schemes_have_the_papers_deviation(scheme: str, shape: tuple[int, int], std: float) -> None:
    config = tiny_model(init={"scheme": scheme})
    weight = initial_tensor(declared(UP, shape), config, 0)
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert abs(weight.mean().item()) < std / 100
    if scheme == "xavier_uniform":
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / 768), rel=1e-3)
    residual = initial_tensor(declared(OUT, shape), config, 0)
    assert residual.std().item() == pytest.approx(std / math.sqrt(2 * 2), rel=0.01)


def test_depth_scaling_can_be_turned_off() -> None:
    config = tiny_model(init={"depth_scaled": False})
    assert initial_tensor(declared(OUT, (512, 256)), config, 0).std().item() == pytest.approx(0.02, rel=0.01)


def test_every_parameter_is_set() -> None:
    config = tiny_model(position="learned", norm="layernorm", bias=True, tie_embeddings=False)
    model = build_model(config)
    materialize(model, seed=3, device=torch.device("cpu"))
    rows = declare_parameters(config)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_tensor(rows[name], config, 3)), name
        if "norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    assert not model.embeddings.word.weight[307:].any()
    assert model.embeddings.word.weight[:307].any(dim=1).all()

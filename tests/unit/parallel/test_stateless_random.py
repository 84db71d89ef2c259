import pytest
import torch

from llmtrain.parallel.stateless_random import Draws, Span, dropout_hidden, site_key
from llmtrain.values.keyed_hash import derived_key

CPU = torch.device("cpu")


def whole(shape: tuple[int, ...]) -> list[Span]:
    return [Span(0, size) for size in shape]


def test_any_part_of_a_mask_equals_that_part_of_the_whole() -> None:
    draws, shape = Draws.of_micro_batch(1, 2, 3, CPU), (8, 3, 4, 6)
    mask = draws.keep_mask(17, 0.3, shape, whole(shape))
    part = draws.keep_mask(17, 0.3, (4, 3, 2, 6), [Span(4, 8), Span(0, 3), Span(2, 4), Span(0, 6)])
    assert torch.equal(part, mask[4:8, :, 2:4, :])
    wrong = draws.keep_mask(17, 0.3, (4, 3, 2, 6), [Span(0, 4), Span(0, 3), Span(0, 2), Span(0, 6)])
    assert not torch.equal(wrong, mask[4:8, :, 2:4, :])  # a mask drawn from local indices is another one


def test_hidden_dropout_of_a_sequence_part_equals_the_whole() -> None:
    x = torch.randn(8, 2, 16)
    draws = Draws.of_micro_batch(1, 2, 3, CPU)
    dropped = dropout_hidden(x, 0.25, 9, draws)
    halves = [dropout_hidden(x[s : s + 4], 0.25, 9, draws.with_sequence(Span(s, 8))) for s in (0, 4)]
    assert torch.equal(torch.cat(halves), dropped)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / 0.75)


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements(probability: float) -> None:
    shape = (1000, 1000)
    mask = Draws.of_micro_batch(5, 1, 0, CPU).keep_mask(1, probability, shape, whole(shape))
    spread = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean().item() - probability) < 5 * spread


def test_draws_of_different_places_are_independent() -> None:
    """Seed, step, micro-batch, site, and neighbours in a row or a column: agreement is what chance gives."""
    shape = (512, 512)

    def mask(seed: int = 1, step: int = 1, micro_batch: int = 0, site: int = 0) -> torch.Tensor:
        return Draws.of_micro_batch(seed, step, micro_batch, CPU).keep_mask(site, 0.5, shape, whole(shape))

    base = mask()
    others = [mask(seed=2), mask(step=2), mask(micro_batch=1), mask(site=1), base.roll(1, 0), base.roll(1, 1)]
    for other in others:
        agreement = (base == other).double().mean().item()
        assert abs(agreement - 0.5) < 5 * (0.25 / base.numel()) ** 0.5


def test_keys_depend_on_every_part_and_on_order() -> None:
    keys = {derived_key(*parts) for parts in [(1, "a"), ("a", 1), (1, "b"), (2, "a"), ("1", "a"), (1, "a", 0)]}
    assert len(keys) == 6
    assert derived_key(1, "a") == derived_key(1, "a")


def test_a_site_as_a_tensor_draws_what_its_number_draws() -> None:
    """On the CPU also where a model is built without memory, as compiled layers need it."""
    draws, shape = Draws.of_micro_batch(5, 1, 0, CPU), (7, 9)
    for place in ("decoder.0.attention", "decoder.11.mlp", "encoder.3"):
        with torch.device("meta"):
            site = site_key(place)
        assert (site.dtype, site.shape, site.device) == (torch.int64, (), CPU)
        assert torch.equal(draws.bits(site, shape, whole(shape)), draws.bits(derived_key(place), shape, whole(shape)))

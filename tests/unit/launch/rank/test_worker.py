"""What a rank says where there is nothing to do."""

from launch.rank.worker import nothing_left
from llmtrain.config.budget import Seen
from tests.unit.config.small_run import run


def test_a_finished_run_names_the_number_that_goes_on() -> None:
    config = run(train={"steps": 100})
    assert (
        nothing_left(config, Seen(100, 51200, 512))
        == "already done, all 100 steps. Raise train.steps above 100 to go on."
    )
    said = nothing_left(config, Seen(250, 128000, 512))
    assert said == "already done, 250 steps, and train.steps asks for 100. Raise train.steps above 250 to go on."


def test_a_budget_of_tokens_is_told_in_tokens() -> None:
    config = run(train={"steps": None, "tokens": 8 * 64 * 10})
    said = nothing_left(config, Seen(20, 6000, 512))
    assert said == (
        "already done, 6000 tokens in 20 steps, and train.tokens asks for 5120. Raise train.tokens above 6000 to go on."
    )

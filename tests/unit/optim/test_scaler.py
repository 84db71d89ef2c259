from llmtrain.config.schema import LossScaleConfig
from llmtrain.optim.schedule import LossScale


def test_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scaler = LossScale(LossScaleConfig(initial=16.0, growth_interval=3, minimum=2.0))
    seen = []
    for finite in (True, True, False, True, True, True, False, False, False, False):
        scaler.update(finite)
        seen.append(scaler.scale)
    assert seen == [16, 16, 8, 8, 8, 16, 8, 4, 2, 2]


def test_state_continues_where_it_was() -> None:
    config = LossScaleConfig(initial=16.0, growth_interval=3)
    first, second = LossScale(config), LossScale(config)
    for finite in (False, True, True):
        first.update(finite)
    second.load_state(first.state())
    for scaler in (first, second):
        scaler.update(True)
    assert first.scale == second.scale == 16.0

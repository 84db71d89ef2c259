from llmtrain.config.schema import LossScaleConfig, OptimConfig
from llmtrain.optim.scaler import LossScale, build_loss_scale


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


def test_only_fp16_has_a_loss_scale() -> None:
    assert build_loss_scale("fp16", OptimConfig()) is not None
    assert build_loss_scale("bf16", OptimConfig()) is None
    assert build_loss_scale("fp32", OptimConfig()) is None

import io
import math

import pytest
from rich.console import Console

from llmtrain.observe.console import ConsoleTracker, StatusLine
from llmtrain.words import duration, short_number

ROW = {"step": 123_456, "loss": 2.34567, "valid_loss": 2.5, "tokens_per_second": 1_234_567.0, "mfu": 0.4123}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(last_step: int, clock: Clock) -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    return ConsoleTracker("run", 0, last_step, Console(file=out, force_terminal=False, width=80), clock), out


def progress_lines(out: io.StringIO) -> list[str]:
    return [line for line in out.getvalue().splitlines() if "loss" in line and "validation" not in line]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_the_bar_is_one_line_at_every_width(width: int):
    clock = Clock()
    status = StatusLine(100_000, 500_000, clock)
    status.step = 100_001
    status.row, status.step = dict(ROW), 123_456
    clock.now = 40_000.0
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(status)
    lines = out.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 1
    assert len(lines[0]) <= width
    if width >= 40:
        assert "123,456/500,000" in lines[0]
    if width >= 80:
        assert "loss 2.3457" in lines[0]
        assert "left" in lines[0]
    if width >= 120:
        assert "MFU 41.2%" in lines[0]


def test_the_time_left_does_not_hold_the_start_up():
    """A minute until the first step is done, then a second each: after the second of ten, eight seconds are left."""
    clock = Clock()
    status = StatusLine(0, 10, clock)
    clock.now = 30.0
    assert status.cells(None) == ["0/10", "starting, 0:00:30 gone"], "a bar that does not move yet says why"
    clock.now, status.step = 60.0, 1
    clock.now = 60.0
    assert status.seconds_left is None and "left" not in "".join(status.cells(None)), "one step has no pace"
    clock.now = 61.0
    status.step = 2
    assert status.seconds_left == 8.0 and "0:00:08 left" in status.cells(None)


def test_a_resumed_run_that_goes_back_counts_its_pace_anew():
    clock = Clock()
    status = StatusLine(100, 110, clock)
    assert "starting" in status.cells(None)[1]
    for clock.now, status.step in ((50.0, 101), (51.0, 102), (52.0, 103)):
        pass
    assert status.seconds_left == 7.0
    clock.now, status.step = 152.0, 90
    assert status.seconds_left is None
    clock.now, status.step = 154.0, 91
    assert status.seconds_left == 38.0


def test_plain_output_has_few_lines_but_always_the_last():
    clock = Clock()
    tracker, out = plain(1000, clock)
    for step in range(1, 1001):
        clock.now += 0.1
        tracker.advance(step)
        tracker.log({"step": step, "loss": 1.0})
    tracker.close("done")
    lines = progress_lines(out)
    assert 15 <= len(lines) <= 22
    assert lines[-1].startswith("1,000/1,000")
    assert "done at step 1,000/1,000" in out.getvalue()


def test_slow_steps_show_a_line_each_minute():
    clock = Clock()
    tracker, out = plain(100_000, clock)
    for step in range(1, 11):
        clock.now += 61
        tracker.log({"step": step, "loss": 1.0})
    assert len(progress_lines(out)) == 10


def test_messages_are_whole_lines_and_no_markup():
    tracker, out = plain(10, Clock())
    path = "/a/long/path/" * 12 + "[bold]step-00000010"
    tracker.say(f"saved {path}")
    tracker.log({"step": 5, "valid_loss": 2.0, "valid_perplexity": 7.389, "valid_tokens": 12_800})
    lines = out.getvalue().splitlines()
    assert f"saved {path}" in lines
    assert "step 5: validation loss 2.0000, perplexity 7.39 of 12,800 tokens" in lines


def test_metrics_of_labels_stand_in_place_of_a_perplexity():
    tracker, out = plain(10, Clock())
    row = {"step": 5, "valid_loss": 0.5, "valid_tokens": 1, "valid_accuracy": 0.75, "valid_macro_f1": 0.5}
    tracker.log(row)
    assert "step 5: validation loss 0.5000, accuracy 0.7500, macro f1 0.5000 of 1 label" in out.getvalue()


def test_values_that_are_not_finite_are_shown():
    tracker, out = plain(1, Clock())
    tracker.log({"step": 1, "loss": math.nan})
    assert "loss nan" in out.getvalue()


def test_a_terminal_gets_a_bar_with_messages_above_it_and_honours_no_color():
    out = io.StringIO()
    environ = {"NO_COLOR": "1", "TERM": "xterm-256color"}
    console = Console(file=out, force_terminal=True, width=80, highlight=False, _environ=environ)
    tracker = ConsoleTracker("run", 0, 10, console)
    tracker.log({"step": 5, "loss": 1.0})
    tracker.say("saved checkpoints/step-00000005")
    tracker.close("done")
    text = out.getvalue()
    assert "━" in text
    assert "saved checkpoints/step-00000005\n" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert "\x1b[32m" not in text
    assert "\x1b[38;" not in text


def test_everything_goes_to_stderr(capsys: pytest.CaptureFixture):
    ConsoleTracker("run", 0, 1).close("done")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "run: to step 1" in captured.err


def test_numbers_in_words():
    values = (0.5, 950, 999.9, 12_345, 999_999, 4.56e6, 2.5e9)
    assert [short_number(value) for value in values] == ["0.5", "950", "1K", "12.3K", "1M", "4.56M", "2.5B"]
    assert duration(3_723) == "1:02:03"
    assert duration(90_061) == "1d 1:01:01"


@pytest.mark.parametrize(
    ("status", "says"),
    [("done", ""), ("failed", ""), ("preempted", ": saved; the same command continues")],
)
def test_the_last_line_says_what_to_do_about_a_run_that_was_told_to_stop(status: str, says: str) -> None:
    console, out = plain(10, Clock())
    console.log({"step": 4, "loss": 2.5})
    console.close(status)
    assert out.getvalue().splitlines()[-1] == f"{status} at step 4/10 after 0:00:00{says}"


def test_the_log_gets_plain_lines_beside_a_bar() -> None:
    out, log = io.StringIO(), io.StringIO()
    console = ConsoleTracker("run", 0, 10, Console(file=out, force_terminal=True, width=80), Clock(), log)
    console.log({"step": 1, "loss": 2.5})
    console.say("something happened")
    console.close("done")
    assert "\x1b" in out.getvalue()
    lines = log.getvalue().splitlines()
    assert lines[0] == "run: to step 10"
    assert lines[1].startswith("1/10  loss 2.5000")
    assert lines[2] == "something happened"
    assert lines[3].startswith("done at step 1/10")
    assert "\x1b" not in log.getvalue()

"""What the verbs of models print of numbers."""

import json
import math

import pytest

from llmtrain.cli.models.options import print_result


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12.345678, "12.3457"), (0.5, "0.5000"), (0.001, "0.0010"), (999_999.5, "999999.5000"), (0.0, "0"),
        (4.77e-7, "4.77e-07"), (9.99e-4, "9.99e-04"), (1e6, "1.00e+06"), (math.inf, "inf"), (1_234_567, "1,234,567"),
        ("runs/small", "runs/small"),
    ],
)  # fmt: skip
def test_ordinary_numbers_are_shown_plainly(value: object, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"perplexity_after": value, "absent": None, "notes": ["said"]}, as_json=False)
    assert capsys.readouterr().out == f"perplexity after: {shown}\nnote: said\n"


def test_a_program_gets_all_digits(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"perplexity_after": 12.345678901234, "notes": []}
    print_result(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == result

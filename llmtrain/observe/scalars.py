"""The numbers of a row under the names that charts show."""

from llmtrain.observe.tracker import RESUMED_FROM, Row


def scalars(row: Row) -> dict[str, float]:
    """`loss` becomes `train/loss` and `valid_loss` becomes `valid/loss`; what is no metric is left out."""
    return {
        f"valid/{key.removeprefix('valid_')}" if key.startswith("valid_") else f"train/{key}": float(value)
        for key, value in row.items()
        if key not in ("step", RESUMED_FROM) and isinstance(value, int | float)
    }

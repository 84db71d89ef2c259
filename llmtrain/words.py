"""Numbers and faults as people read them: durations, counts, sizes, what is wrong with a file's values."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST_VALUE = 100


def duration(seconds: float) -> str:
    """1:02:03, or 2d 1:02:03."""
    days, rest = divmod(round(seconds), 86_400)
    return f"{days}d {timedelta(seconds=rest)}" if days else str(timedelta(seconds=rest))


def short_number(value: float) -> str:
    """Three digits and a unit: 950, 12.3K, 4.56M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.9995 * limit:  # from here on three digits round up to the unit
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def counted(number: int, noun: str, plural: str = "s") -> str:
    """1 shard, 1,200 shards; `plural` is what the noun then ends with."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def bytes_text(size: int) -> str:
    """1.23 GB (1,234,567,890 bytes)."""
    return f"{short_bytes(size)} ({size:,} bytes)" if size >= 1000 else short_bytes(size)


def short_bytes(size: float) -> str:
    """1.23 GB; three digits."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * limit:  # from here on three digits round up to the unit
            return f"{size / limit:.3g} {unit}"
    return f"{size:.0f} bytes"


def percent_change(before: float, after: float) -> str:
    """+1.23%."""
    return f"{after / before - 1:+.2%}"


def perplexities_text(before: float, after: float, num_targets: int) -> str:
    """12.3456 before, 12.5000 after: +1.25%, 4,000 targets."""
    change = percent_change(before, after)
    return f"{before:.4f} before, {after:.4f} after: {change}, {counted(num_targets, 'target')}"


def looked_from(path: Path) -> str:
    """`Looked from FOLDER. ` where a path that leads nowhere is relative to it; else nothing."""
    return "" if path.is_absolute() else f"Looked from {Path.cwd()}. "


def fault_text(error: "ValidationError") -> str:
    """The first thing that is wrong with the values of a file: `shards[0].tokens = -1: what it should be`."""
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    what = first["msg"].removeprefix("Value error, ")
    if not path:
        return what
    value = "" if first["type"] == "missing" else f" = {first['input']!r}"[:LONGEST_VALUE]
    return f"{path}{value}: {what}"

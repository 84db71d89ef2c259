"""Numbers as people read them: durations, counts, sizes."""

from datetime import timedelta


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


def bytes_text(size: int) -> str:
    """1.23 GB (1,234,567,890 bytes)."""
    return f"{short_bytes(size)} ({size:,} bytes)" if size >= 1000 else short_bytes(size)


def short_bytes(size: float) -> str:
    """1.23 GB; three digits."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * limit:  # from here on three digits round up to the unit
            return f"{size / limit:.3g} {unit}"
    return f"{size:.0f} bytes"

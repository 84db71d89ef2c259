"""The numbers nearest to one that a rule refuses."""

SEARCH_WIDTH = 4096
"""How far from the value legal values are looked for."""


def nearest_divisors(number: int, value: int, limit: int = 4) -> list[int]:
    """The divisors of `number` nearest to `value`, in ascending order."""
    value = min(value, number)
    # A window around the value, so that an absurdly large number costs no absurdly long search.
    window = range(max(2, value - SEARCH_WIDTH), min(number, value + SEARCH_WIDTH) + 1)
    divisors = [1, *(n for n in window if number % n == 0)]
    return sorted(sorted(divisors, key=lambda n: abs(n - value))[:limit])


def nearest_multiples(unit: int, value: int) -> list[int]:
    """The positive multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]

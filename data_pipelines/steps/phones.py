"""Phone numbers in a text, by phonenumbers, the numbering plans of all countries (Google's libphonenumber).

It looks at one number at a time and slowly. So a pattern finds the rows of digits that may be numbers first.
"""

import re
from collections.abc import Iterator, Sequence

_DIGITS = r"[\d ().\-/\u00a0\u2010-\u2013]{6,30}"
_WITH_COUNTRY = re.compile(rf"(?<![\w+])\+\(?\d{_DIGITS}")
_ANY = re.compile(rf"(?<![\w+.,/:-])[+(]{{0,2}}\d{_DIGITS}")
_GROUPS = re.compile(r"\d[^\d.]+\d|\d\.\d+\.\d")
"""A single point is that of a decimal fraction."""
_OTHERS = re.compile(r"\d+\.\d+\.\d+\.\d|\d{4}-\d\d-\d\d")
"""IP addresses and dates, which the plans of some countries have as numbers."""
_FEWEST_DIGITS = 7
_AROUND = 8
"""What the library looks at around a number: the rest of a time, a letter, a currency."""

_MOST_TRIES = 8
"""Parts of a row of digits that the library may try: it would try all of them, which are many in tables."""


class PhoneNumbers:
    """Finds valid numbers: with a country code, and those of `regions` without one, in the groups that are usual there.

    A row of digits alone is a number of anything, even where the plan of a country has it.
    """

    def __init__(self, regions: Sequence[str]) -> None:
        from phonenumbers import Leniency, PhoneNumberMatcher

        self._matcher = PhoneNumberMatcher
        self._valid, self._in_groups = Leniency.VALID, Leniency.STRICT_GROUPING
        self._regions = regions or (None,)
        self._candidates = _ANY if regions else _WITH_COUNTRY

    def __call__(self, text: str) -> Iterator[tuple[int, int]]:
        """Where each number begins and ends, in order."""
        end = 0
        for candidate in self._candidates.finditer(text):
            if sum(map(str.isdigit, candidate[0])) < _FEWEST_DIGITS:
                continue
            begin = max(0, candidate.start() - _AROUND)
            window = text[begin : candidate.end() + _AROUND]
            leniency = self._valid if "+" in candidate[0] else self._in_groups
            for region in self._regions:
                spans = [
                    (begin + match.start, begin + match.end)
                    for match in self._matcher(window, region, leniency, _MOST_TRIES)
                    if begin + match.start >= max(end, candidate.start()) and _is_phone_number(match.raw_string)
                ]
                if spans:
                    yield from spans
                    end = spans[-1][1]
                    break


def _is_phone_number(written: str) -> bool:
    """Whether digits that are a number by a country's plan are written as one."""
    if written.startswith("+"):
        return True
    # Groups of digits that nothing else explains, such as a date or a version.
    in_groups = _GROUPS.search(written) is not None
    is_other = _OTHERS.search(written) is not None
    return in_groups and not is_other

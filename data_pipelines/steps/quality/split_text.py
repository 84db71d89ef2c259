"""A text split once, for all rules that look at its words and lines."""

from collections import defaultdict
from functools import cached_property
from itertools import compress
from operator import not_

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class SplitText:
    """A text and its parts, each made when it is first asked for. N words, of which V are distinct."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What white space separates, in order."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Without their ends, of whatever kind those are."""
        return self.text.splitlines()

    @cached_property
    def _vocabulary(self) -> tuple[dict[str, int], Numbers]:
        numbers = defaultdict[str, int]()
        numbers.default_factory = numbers.__len__  # a word that is not there gets the next number
        ids = np.fromiter(map(numbers.__getitem__, self.words), np.int64, len(self.words))
        numbers.default_factory = None
        return numbers, ids

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each distinct word, from 0, in the order of their first places."""
        return self._vocabulary[0]

    @property
    def ids(self) -> Numbers:
        """[N]: the number of each word."""
        return self._vocabulary[1]

    @cached_property
    def others(self) -> tuple[Numbers, list[str]]:
        """Of the distinct words, those with something else than letters in them: their numbers, and themselves."""
        of_letters = list(map(str.isalpha, self.numbers))
        return np.flatnonzero(np.logical_not(of_letters)), list(compress(self.numbers, map(not_, of_letters)))

    @cached_property
    def counts(self) -> Numbers:
        """[V]: how often each distinct word occurs."""
        return np.bincount(self.ids, minlength=len(self.numbers))

    @cached_property
    def lengths(self) -> Numbers:
        """[V]: characters of each distinct word."""
        return np.fromiter(map(len, self.numbers), np.int64, len(self.numbers))

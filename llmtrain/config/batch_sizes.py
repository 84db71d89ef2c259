"""The sizes of a run's batches, step by step: one size, or a ramp of several. Pure arithmetic."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """The size of every step. From the step behind `done[i]` steps on, a step has `sizes[i]`; `done[0]` is 0.

    Sizes are in samples, or in tokens where they were scaled. Steps count from 1. Nothing here walks over steps: what
    lies before a step is a sum over the few sizes of the ramp.
    """

    sizes: tuple[int, ...]
    done: tuple[int, ...] = (0,)

    def of_step(self, step: int) -> int:
        """The size of a step."""
        return self.sizes[bisect_right(self.done, step - 1) - 1]

    def before(self, step: int) -> int:
        """The sum of all steps before a step."""
        ends = (*self.done[1:], step - 1)
        parts = zip(self.sizes, self.done, ends, strict=True)
        return sum(size * max(0, min(end, step - 1) - begin) for size, begin, end in parts)

    def last_step(self, total: int, done: int = 0) -> int:
        """The first step with which the steps behind the first `done` add up to `total` or more; `done` for 0."""
        missing = total
        for number, size in enumerate(self.sizes):
            end = self.done[number + 1] if number + 1 < len(self.done) else None
            if missing <= 0:
                break
            if end is not None and end <= done:
                continue
            steps = -(-missing // size)
            if end is not None:
                steps = min(steps, end - done)
            missing -= steps * size
            done += steps
        return done

    def scaled(self, factor: int) -> "BatchSizes":
        """The same in a unit of which a sample has `factor`."""
        return BatchSizes(tuple(size * factor for size in self.sizes), self.done)

"""Which samples a run takes, and how many a step: weights, their schedule, packing, and the ramp of the batch. Pure."""

from collections.abc import Iterator, Sequence
from math import gcd

from llmtrain.config.data import LONGEST_PERIOD
from llmtrain.config.reading.suggestions import either
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


def weights_are_shares(config: RunConfig) -> Found:
    """The period of every mixture can be held in memory, and every source has a share at some time."""
    for split in ("train", "valid"):
        weights = [source.weight for source in getattr(config.data, split)]
        keys = tuple(f"data.{split}.{number}.weight" for number in range(len(weights)))
        yield from _long_period(weights, f"data.{split}", "its entries", keys)
    phases = config.data.schedule
    if not any(source.weight for source in config.data.train):
        message = "gives no source any weight. Set the weight of one of them to 1."
        yield Problem("data.train", message, uses=("data.train.0.weight",))
    for number, source in enumerate(config.data.train):
        if not source.weight and not any(phase.weights[number : number + 1] > (0,) for phase in phases):
            message = "no phase of data.schedule gives this source any weight. Try 1, or remove the source."
            yield Problem(f"data.train.{number}.weight", message, 0, uses=("data.schedule",))


def _long_period(weights: Sequence[int], key: str, whose: str, uses: tuple[str, ...]) -> Found:
    period = sum(weights) // gcd(*weights) if any(weights) else 0
    if period > LONGEST_PERIOD:
        message = (
            f"the weights of {whose} add up to {period:,} after division by their common divisor, and "
            f"{LONGEST_PERIOD:,} at most are allowed. Give shares such as 70 and 30."
        )
        yield Problem(key, message, uses=uses)


def phases_follow_each_other(config: RunConfig) -> Found:
    """Every phase of data.schedule says when it begins, behind the one before, and has a weight for every source."""
    sources, before = len(config.data.train), 0
    for number, phase in enumerate(config.data.schedule):
        key = f"data.schedule.{number}"
        if (phase.from_step is None) == (phase.from_sample is None):
            message = "needs from_step or from_sample, one of the two. Try from_step: 1001."
            yield Problem(key, message, uses=(f"{key}.from_step", f"{key}.from_sample"))
            return
        name, value = (
            ("from_step", phase.from_step) if phase.from_sample is None else ("from_sample", phase.from_sample)
        )
        first = first_sample_of(config, number)
        if first <= before:
            least = f"the first {'phase' if number == 0 else 'sample of the phase before'}"
            said = "the run begins with the weights of data.train" if number == 0 else f"{least} is sample {before:,}"
            message = f"is sample {first:,}, and {said}. Phases begin behind each other. Try a later one."
            yield Problem(f"{key}.{name}", message, value, uses=("data.schedule", "train.global_batch_size"))
        before = first
        if len(phase.weights) != sources:
            message = f"has {len(phase.weights)} entries, and data.train has {sources}: one for each, 0 for none."
            yield Problem(f"{key}.weights", message, list(phase.weights), uses=("data.train",))
        elif not any(phase.weights):
            message = "gives no source any weight. Set one of them to 1."
            yield Problem(f"{key}.weights", message, list(phase.weights))
        yield from _long_period(phase.weights, f"{key}.weights", "the phase", ())


def first_sample_of(config: RunConfig, number: int) -> int:
    """The sample that a phase of data.schedule begins with: where it names a step, that step's first one.

    It is so in a run that passes over no data, with the batch sizes of this configuration.
    """
    phase = config.data.schedule[number]
    if phase.from_sample is not None:
        return phase.from_sample
    assert phase.from_step is not None, "a rule"
    return config.train.batch_sizes.before(phase.from_step)


def ramp_goes_on(config: RunConfig) -> Found:
    """Changes of the batch size follow each other, and each changes something."""
    step, size = 1, config.train.global_batch_size
    for number, change in enumerate(config.train.batch_ramp):
        key = f"train.batch_ramp.{number}"
        if change.from_step <= step:
            said = "train.global_batch_size is the size of step 1" if number == 0 else f"the one before has {step}"
            message = f"must come later: {said}. Try {step + 1} or more."
            yield Problem(f"{key}.from_step", message, change.from_step, uses=("train.batch_ramp",))
        if change.global_batch_size == size:
            message = "has no effect: the batch has this size already. Remove the entry, or give another size."
            yield Problem(f"{key}.global_batch_size", message, size, uses=("train.global_batch_size",))
        step, size = change.from_step, change.global_batch_size


PACKED: dict[str, tuple[str, ...]] = {
    "best_fit": ("causal", "fim", "masked", "chat"),
    "single": ("chat", "labels"),
}
"""Objectives of packed samples. Those that are not make lengths or a prefix out of shares of a whole sample; `single`
goes with those whose documents stand for themselves."""
WHOLE = ("chat", "labels")
"""Objectives whose documents are never cut."""


def packing_fits(config: RunConfig) -> Found:
    """Whole documents go with objectives that leave them where they are; packed samples are no windows."""
    data, packing = config.data, config.data.packing_kind
    if packing == "none":
        if data.objective in WHOLE:
            fitting = [kind for kind, objectives in PACKED.items() if data.objective in objectives]
            message = f"would cut documents, which data.objective = {data.objective} never does. Try {either(fitting)}."
            yield Problem("data.packing", message, packing, uses=("data.objective",))
        return
    if data.objective not in PACKED[packing]:
        why = "which splits a sample by shares of its length, so that all samples must be full"
        if data.objective in PACKED["best_fit"]:
            why = "whose documents are running text: most of a sample would be padding"
        fitting = ["none", *(kind for kind, objectives in PACKED.items() if data.objective in objectives)]
        message = (
            f"does not go with data.objective = {data.objective}, {why}. Try {either(fitting)}; {packing} goes with "
            f"{', '.join(PACKED[packing])}."
        )
        yield Problem("data.packing", message, packing, uses=("data.objective",))
    if data.windows is not None:
        message = f"has no effect with data.packing = {packing}, whose samples are no windows. Remove it."
        yield Problem("data.windows", message, data.windows, uses=("data.packing",))


MIXTURE_RULES = (
    weights_are_shares,
    phases_follow_each_other,
    packing_fits,
    ramp_goes_on,
)

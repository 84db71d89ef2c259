"""Every number that an option takes has bounds, as those of a configuration do."""

import math

from tests.hostile.command_lines import options_of, verbs

CHECKED_BY_VERB = {
    "generate": {"temperature", "top_k", "top_p", "min_p", "seed", "max_tokens"},
    "data shards": {"valid_fraction"},
    "data chat": {"valid_fraction"},
    "data labels": {"valid_fraction"},
}
"""Options whose verb says itself what they may be."""


def test_numbers_of_options_are_bounded() -> None:
    found, unbounded = 0, []
    for name, command in verbs():
        for option in options_of(command):
            if option.is_flag or option.type_descriptor.annotation not in (int, float):
                continue
            found += 1
            bounded = option.min is not None and option.max is not None and math.isfinite(option.max)
            if not bounded and option.name not in CHECKED_BY_VERB.get(name, ()):
                unbounded.append(f"{name} {option.opts[0]}")
    assert found > 15
    assert unbounded == []


def test_every_verb_has_a_good_line() -> None:
    from tests.hostile.command_lines import GOOD

    assert {name for name, _ in verbs()} - set(GOOD) == {"doctor"}, "which takes longer"

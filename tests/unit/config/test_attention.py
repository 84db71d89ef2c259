"""The tables of kinds: every kind and every key of the schema stands in them, and what they say holds."""

from typing import get_args

import pytest

from llmtrain.config.attention import (
    ATTENTION_KINDS,
    SCALING_KINDS,
    AttentionConfig,
    AttentionKind,
    Kind,
    RopeScaling,
    ScalingKind,
    effective_keys,
    kind_of,
    required_size,
)
from llmtrain.config.section import Section
from llmtrain.errors import ConfigError


def test_every_kind_has_a_row() -> None:
    assert set(ATTENTION_KINDS) == set(get_args(AttentionKind))
    assert set(SCALING_KINDS) == set(get_args(ScalingKind))


@pytest.mark.parametrize(
    ("section", "kinds", "of_every_kind"),
    [
        (AttentionConfig, ATTENTION_KINDS, {"kind", "softcap", "sinks", "scale"}),
        (RopeScaling, SCALING_KINDS, {"kind", "factor"}),
    ],
)
def test_every_key_is_some_kinds_or_said_to_be_every_kinds(
    section: type[Section], kinds: dict[str, Kind], of_every_kind: set[str]
) -> None:
    """A key that is added must be read by the kinds that read it, or stand here."""
    of_some = {key for kind in kinds.values() for key in kind.reads}
    assert set(section.model_fields) == of_some | of_every_kind and not of_some & of_every_kind


@pytest.mark.parametrize("name", ATTENTION_KINDS)
def test_a_key_without_a_default_is_required_and_suggested_as_it_may_be(name: str) -> None:
    kind = ATTENTION_KINDS[name]
    fields = AttentionConfig.model_fields
    assert set(kind.required) == {key for key in kind.reads if fields[key].get_default() is None}
    for key, suggested in kind.required.items():
        for seq_len in (1, 2, 3, 64, 8192):
            assert getattr(AttentionConfig(**{"kind": name, key: suggested(seq_len)}), key) <= seq_len
    assert AttentionConfig(**{"kind": name, **kind.small}) and set(kind.small) <= set(kind.reads)


def test_a_kind_reads_its_own_keys_and_those_of_every_kind() -> None:
    longformer = AttentionConfig.model_validate({"kind": "longformer", "window": 4})
    assert effective_keys(longformer) == ["kind", "window", "num_global", "softcap", "sinks", "scale"]
    assert effective_keys(RopeScaling(kind="linear")) == ["kind", "factor"]


def test_a_missing_size_is_never_made_up() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention\.kind = strided needs model\.attention\.stride"):
        required_size(AttentionConfig(kind="strided"), "stride")


def test_a_kind_without_a_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {kind: row for kind, row in ATTENTION_KINDS.items() if kind != "bigbird"}  # in its order afterwards
    monkeypatch.setattr("llmtrain.config.attention.ATTENTION_KINDS", left)
    with pytest.raises(ConfigError, match=r"model\.attention\.kind = bigbird: .*llmtrain/config/attention\.py"):
        kind_of(AttentionConfig(kind="bigbird"))

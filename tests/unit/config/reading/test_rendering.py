"""The JSON schema agrees with the loader about what a run may hold."""

import json
from typing import Any

from llmtrain.config.reading.load import OWN_BASES
from llmtrain.config.reading.rendering import json_schema, to_yaml
from llmtrain.config.reading.suggestions import all_keys
from llmtrain.config.schema import RunConfig

SMALLEST = {"name": "a", "model": {}, "data": {"train": [{"path": "p"}]}, "train": {"steps": 1}}


def iter_schema_keys(schema: dict[str, Any], section: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section["properties"].items():
        if name == "base" and f"{prefix}base" not in OWN_BASES:
            continue
        keys.append(prefix + name)
        text = str(field.get("items") or field)
        for definition, below in schema["$defs"].items():
            if f"'#/$defs/{definition}'" in text:
                keys += iter_schema_keys(schema, below, f"{prefix}{name}." + ("0." if "items" in field else ""))
    return keys


def test_json_schema_has_every_key_and_base_in_every_section() -> None:
    schema = json_schema()
    assert iter_schema_keys(schema, schema) == list(all_keys())
    for section in (schema, *schema["$defs"].values()):
        assert "base" in section["properties"]
        assert section["additionalProperties"] is False


def test_json_schema_says_the_bounds_in_its_own_words() -> None:
    stage = json_schema()["$defs"]["EngineConfig"]["properties"]["zero_stage"]
    assert (stage["type"], stage["minimum"], stage["maximum"]) == ("integer", 0, 3)
    assert '"ge"' not in json.dumps(json_schema())


def test_resolved_yaml_is_in_schema_order_with_defaults() -> None:
    text = to_yaml(RunConfig.model_validate(SMALLEST))
    assert [line.split(":")[0] for line in text.splitlines() if not line.startswith((" ", "-"))] == list(
        RunConfig.model_fields
    )
    assert "  global_batch_size: 16\n" in text

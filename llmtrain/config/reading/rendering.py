"""Configurations and single values as text; shortened and without secrets where they are kept or shown. Pure."""

import io
import json
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from llmtrain.config.reading.credentials import HIDDEN, SECRET_WORD, text_without_credentials
from llmtrain.config.reading.suggestions import all_keys
from llmtrain.config.schema import RunConfig

CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
LONGEST_SHOWN = 80

LEFT_OUT = (
    "# Users, passwords and queries of URLs are left out: take them from the file that the run was started with.\n"
)


class _Representer(SafeRepresenter):
    """Writes text with line breaks or control characters in double quotes, where each has an escape."""

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration in schema order, defaults included. Loading the text gives an equal config.

    For whoever runs it only: what is kept or shown is `record_of`.
    """
    return plain_yaml(config.model_dump(mode="json"))


def record_of(config: RunConfig) -> str:
    """The configuration as it is kept and shown: as `to_yaml`, without what is secret in URLs, which it then says."""
    values = config.model_dump(mode="json")
    return without_secrets(plain_yaml(values), values)


def without_secrets(text: str, values: dict[str, Any]) -> str:
    """A YAML text whose values these are; written anew where a URL in it has a user, a password or a query."""
    clean = redacted(values)
    return text if clean == values else LEFT_OUT + plain_yaml(clean)


def plain_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    # The default, None, sorts; ruamel declares no type, so that a checker infers that only None is allowed.
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 2**20  # never break a long text: it would come back with other white space
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON schema of a run's file. `base` may stand in every section, and then nothing else has to."""
    schema = RunConfig.model_json_schema()
    base = {
        "description": "File, or list of files, that this section rests on; relative to this file. "
        "llmtrain:models/llama-8b.yaml is one of those that llmtrain ships.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    for section in (schema, *schema["$defs"].values()):
        section["properties"] = {"base": base, **section["properties"]}
        section.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def is_secret(name: str) -> bool:
    """True where a key's name says that its value should not be written down. Keys of the schema never do."""
    if any(name == key.rsplit(".", 1)[-1] for key in all_keys()):
        return False
    return SECRET_WORD.search(CAMEL_HUMP.sub("_", name)) is not None


def shown(key: str, value: Any) -> str:
    """A value as a user would write it in YAML, shortened; what looks like a secret is not repeated."""
    if any(is_secret(part) for part in key.split(".")):
        return HIDDEN
    if isinstance(value, str):
        value = text_without_credentials(value)
        text = value if value.isprintable() else json.dumps(value)
    elif isinstance(value, float):
        text = number(value)
    else:
        text = json.dumps(redacted(value), ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def number(value: int | float) -> str:
    """A number as YAML 1.2 writes it."""
    text = repr(value)
    return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(text, text)


def bound_text(value: int | float) -> str:
    """A bound of the schema: whole numbers with all their digits, so that the text is one of them."""
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else number(value)


def redacted(value: Any) -> Any:
    """JSON-like settings without credentials: URLs lose them, values of keys that name a secret are replaced."""
    if isinstance(value, dict):
        return {key: HIDDEN if is_secret(str(key)) else redacted(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(child) for child in value]
    return text_without_credentials(value) if isinstance(value, str) else value

"""A configuration as text: the resolved YAML of a run, and the JSON schema of all keys for editors."""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from llmtrain.config.reading.shown_values import redacted
from llmtrain.config.schema import RunConfig

LEFT_OUT = (
    "# Users, passwords and queries of URLs are left out: take them from the file that the run was started with.\n"
)


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


class _Representer(SafeRepresenter):
    """Writes text with line breaks or control characters in double quotes, where each has an escape."""

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)

"""A configuration as text: the resolved YAML of a run, and the JSON schema of all keys for editors."""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from llmtrain.config.schema import RunConfig


def to_yaml(config: RunConfig) -> str:
    """The whole configuration in schema order, defaults included. Loading the text gives an equal config."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    # The default, None, sorts; ruamel declares no type, so that a checker infers that only None is allowed.
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 2**20  # never break a long text: it would come back with other white space
    stream = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON schema of a run's file. `base` may stand in every section, and then nothing else has to."""
    schema = RunConfig.model_json_schema()
    base = {
        "description": "File, or list of files, that this section rests on; relative to this file.",
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

"""An export's config.json: each key in every spelling that readers have for it."""

import json
from pathlib import Path
from typing import Any

from llmtrain.interop.families.rotary import older_rope_keys

CONFIG = "config.json"


def write_config_json(folder: Path, config: Any) -> None:
    """Write a configuration of transformers 5 so that transformers 4 and what reads its keys see the same model."""
    config.save_pretrained(folder)
    path = folder / CONFIG
    content = json.loads(path.read_text("utf-8"))
    content |= {"torch_dtype": content["dtype"]}
    if "rope_parameters" in content:
        content |= older_rope_keys(content["rope_parameters"])
    path.write_text(json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False) + "\n", "utf-8")

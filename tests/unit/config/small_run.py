"""A small run that breaks no rule, with keys changed, and what it breaks then."""

from typing import Any

from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import RunConfig

BASE: dict[str, Any] = {
    "name": "small",
    "model": {"hidden_size": 64, "num_heads": 4, "max_seq_len": 128},
    "data": {"train": [{"path": "a"}], "seq_len": 64},
    "train": {"steps": 100, "global_batch_size": 8, "micro_batch_size": 4},
}


def run(**sections: Any) -> RunConfig:
    """The base run with keys of its sections changed."""
    tree = {**BASE, **{name: value for name, value in sections.items() if not isinstance(value, dict)}}
    for name, value in sections.items():
        if isinstance(value, dict):
            tree[name] = {**BASE.get(name, {}), **value}
    return RunConfig.model_validate(tree)


def broken(config: RunConfig, world_size: int = 1) -> dict[str, str]:
    """Message by key."""
    return {problem.key: problem.message for problem in arithmetic_problems(config, world_size)}

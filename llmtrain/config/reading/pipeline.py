"""Reading the file of a data pipeline, with every problem at once. Pure."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.document import Node
from llmtrain.config.reading.load import LoadedConfig, Schema, load_file, top_keys
from llmtrain.config.rules.pipeline import pipeline_problems
from llmtrain.errors import Problem

StorageRules = Callable[[PipelineConfig], list[Problem]]


def load_pipeline(
    path: Path, overrides: Sequence[str] = (), storage_rules: StorageRules | None = None
) -> LoadedConfig[PipelineConfig]:
    """Read a pipeline's file and check it: schema, rules and, where given, storage.

    `path` may name a file that the package ships. Raises ConfigError with every problem.
    """

    def rules(config: PipelineConfig) -> list[Problem]:
        found = pipeline_problems(config)
        return found if storage_rules is None else found + storage_rules(config)

    return load_file(path, overrides, Schema(PipelineConfig, rules, lambda root, _: _written_out(root)))


def is_pipeline(path: Path) -> bool:
    """True where a file is that of a pipeline and not of a run: it has a key `read` and no `model`."""
    return "read" in (keys := top_keys(path)) and "model" not in keys


def _written_out(root: Node) -> Node:
    """The tree with its short forms written out: a step as a name, a tokenizer as a file."""
    if not isinstance(root.value, dict):
        return root
    changed = dict(root.value)
    steps, tokenizer = changed.get("steps"), changed.get("tokenizer")
    if steps is not None and isinstance(steps.value, list):
        changed["steps"] = Node([_step(entry) for entry in steps.value], steps.where)
    if tokenizer is not None and isinstance(tokenizer.value, str):
        changed["tokenizer"] = Node({"path": tokenizer}, tokenizer.where)
    return Node(changed, root.where)


def _step(entry: Node) -> Node:
    """`name` and `{name: null}` mean the step with every key at its default."""
    if isinstance(entry.value, str):
        return Node({entry.value: Node({}, entry.where)}, entry.where)
    if isinstance(entry.value, Mapping):
        children = {
            name: Node({}, child.where) if child.value is None else child for name, child in entry.value.items()
        }
        return Node(children, entry.where)
    return entry

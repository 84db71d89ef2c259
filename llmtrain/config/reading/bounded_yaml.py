"""YAML 1.2 texts as ruamel's graph of nodes, within bounds: a text of a few hundred bytes can stand for gigabytes.

A text is bounded in length and depth while it is read, and an alias counts as what it stands for.
"""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import Node, ScalarNode

LONGEST_BYTES = 1 << 20
DEEPEST = 32
MOST_VALUES = 50_000
"""Values of one document, those of its bases included. What an alias stands for counts at each place that uses it."""


class BoundsError(MarkedYAMLError):
    """A text that may be valid, but is larger or deeper than what is read."""


def bounded_yaml() -> YAML:
    """A reader of plain values. Deep documents raise MarkedYAMLError."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    return yaml


def compose(yaml: YAML, text: str) -> Node | None:
    """The graph of a text's nodes, None where it holds nothing. Raises MarkedYAMLError or ReaderError."""
    if len(text) > LONGEST_BYTES:
        raise BoundsError(problem=f"has {len(text):,} characters, {LONGEST_BYTES:,} at most are read")
    root = yaml.compose(io.StringIO(text))
    if root is not None:
        _Counting().require_bounds(root)
    return root


class _BoundedComposer(Composer):
    """Refuses a value that lies too deep, before Python's own stack is full, and more values than it can hold."""

    level = 0
    num_values = 0
    warn_double_anchors = False

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.level >= DEEPEST:
            raise _marked(self.parser.peek_event(), f"more than {DEEPEST} values lie inside each other")
        if self.num_values >= MOST_VALUES:
            raise _marked(self.parser.peek_event(), f"holds more than {MOST_VALUES:,} values")
        self.level += 1
        self.num_values += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


class _Counting:
    """Counts the values that a graph of nodes stands for, each node once: an alias adds what its anchor has."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}

    def require_bounds(self, node: Any, above: tuple[int, ...] = ()) -> tuple[int, int]:
        """The number of values that a node stands for, and how many lie inside each other. Raises BoundsError.

        `above` holds the nodes around this one; one that lies inside itself is reported by who builds it.
        """
        if isinstance(node, ScalarNode) or id(node) in above:
            return 1, 1
        if id(node) in self._known:
            return self._known[id(node)]
        children = [child for entry in node.value for child in (entry if isinstance(entry, tuple) else (entry,))]
        found = [self.require_bounds(child, (*above, id(node))) for child in children]
        count, levels = 1 + sum(count for count, _ in found), 1 + max((levels for _, levels in found), default=0)
        if levels + len(above) > DEEPEST:
            raise _marked(node, f"more than {DEEPEST} values lie inside each other, where aliases are followed")
        if count > MOST_VALUES:
            raise _marked(node, f"stands for more than {MOST_VALUES:,} values, where aliases are followed")
        self._known[id(node)] = count, levels
        return count, levels


def _marked(place: Any, problem: str) -> BoundsError:
    return BoundsError(problem=problem, problem_mark=place.start_mark)

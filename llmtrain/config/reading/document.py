"""YAML 1.2 files as trees in which every value knows the file and the line where it stands.

Only plain data is built: mappings, lists, text, numbers, true, false and null. Tags are refused, so no file can name
a Python object. A text is bounded in length and depth, because one of a few hundred bytes can stand for gigabytes.
Faults are collected, not raised, so that one look shows all of them.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from llmtrain.config.reading.rendering import shown
from llmtrain.config.reading.suggestions import nearest
from llmtrain.errors import Problem
from llmtrain.files import read_bytes

COMMAND_LINE = "command line"
"""The place of a value that an override gave."""

LONGEST_BYTES = 1 << 20
DEEPEST = 32
MOST_VALUES = 50_000
"""Values of one document, those of its bases included. What an alias stands for counts at each place that uses it."""

TAG = "tag:yaml.org,2002:"
TEXT_TAGS = {TAG + "str", TAG + "timestamp"}
MOST_BITS = 1024
"""Of a whole number: no key takes a larger one, and those of thousands of digits cannot even be printed."""
SCALAR_TAGS = {TAG + "int", TAG + "float", TAG + "bool", TAG + "null"}


@dataclass(frozen=True)
class Node:
    """One value: a mapping of nodes, a list of nodes, or a scalar."""

    value: Any
    where: str


def dotted(*parts: str | int) -> str:
    """`("data", "train", 0)` as `data.train.0`."""
    return ".".join(str(part) for part in parts if part != "")


def plain(node: Node) -> Any:
    """The tree without its places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def iter_places(node: Node, key: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of the tree with its place, sections and lists included."""
    if key:
        yield key, node.where
    children = node.value.items() if isinstance(node.value, dict) else ()
    if isinstance(node.value, list):
        children = enumerate(node.value)
    for name, child in children:
        yield from iter_places(child, dotted(key, name))


def merge(lower: Node, upper: Node) -> Node:
    """`upper` over `lower`: mappings are joined key by key, anything else is replaced."""
    if not (isinstance(lower.value, dict) and isinstance(upper.value, dict)):
        return upper
    joined = dict(lower.value)
    for key, child in upper.value.items():
        joined[key] = merge(joined[key], child) if key in joined else child
    return Node(joined, upper.where)


def read_document(file: Path, key: str, problems: list[Problem]) -> Node | None:
    """The tree of one file, its keys to stand below the dotted `key`; None where the file is not a YAML mapping."""
    data = b""
    try:
        data = read_bytes(file, LONGEST_BYTES)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        problems.append(Problem(str(file), f"no such file.{_near_file(file)}"))
        return None
    except OSError as error:
        problems.append(Problem(str(file), f"cannot be read: {reason_of(error)}."))
        return None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problems.append(
            Problem(f"{file}:{line}", f"byte {data[error.start]:#04x} is not UTF-8. Save the file as UTF-8.")
        )
        return None
    node = read_text(text, key, problems, lambda line: f"{file}:{line}")
    if node is not None and not isinstance(node.value, dict):
        problems.append(Problem(f"{file}:1", "must hold keys and values, such as `name: my-run`."))
        return None
    return node


def reason_of(error: OSError | ValueError) -> str:
    """Why a path cannot be used, in the system's words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def load_plain(text: str) -> Any:
    """The values of a text that llmtrain has written, such as a run's config.yaml. Raises ValueError."""
    problems: list[Problem] = []
    node = read_text(text, "", problems, lambda line: f"line {line}")
    if problems or node is None:
        raise ValueError("; ".join(map(str, problems)))
    return plain(node)


class BoundsError(MarkedYAMLError):
    """A text that may be valid, but is larger or deeper than what is read."""


def read_text(text: str, key: str, problems: list[Problem], place: Callable[[int], str]) -> Node | None:
    """The tree of a YAML text; `place` turns a line number, counted from 1, into what is shown as its place."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    try:
        if len(text) > LONGEST_BYTES:
            raise BoundsError(problem=f"has {len(text):,} characters, {LONGEST_BYTES:,} at most are read")
        root = yaml.compose(io.StringIO(text))
        if root is None:
            return Node(None, place(1))
        # The composer has bounded what is written; an alias of few characters can still stand for gigabytes.
        _require_bounds(root, {})
        return _Builder(yaml, problems, place).build(root, key, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        context = f" {error.context}" if error.context else ""
        fault = error.problem if isinstance(error, BoundsError) else f"is not valid YAML{context}: {error.problem}"
        problems.append(Problem(place(line), f"{fault}."))
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problems.append(Problem(place(line), f"holds a character that YAML does not allow: {error.character!r}."))
    return None


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


def _require_bounds(node: Any, known: dict[int, tuple[int, int]], above: tuple[int, ...] = ()) -> tuple[int, int]:
    """The number of values that a node stands for, and how many lie inside each other. Raises BoundsError.

    `known` has the answers of nodes that were counted: each is counted once, and an alias adds what its anchor has.
    `above` holds the nodes around this one; one that lies inside itself is reported by `_Builder`.
    """
    if isinstance(node, ScalarNode) or id(node) in above:
        return 1, 1
    if id(node) in known:
        return known[id(node)]
    children = [child for entry in node.value for child in (entry if isinstance(entry, tuple) else (entry,))]
    found = [_require_bounds(child, known, (*above, id(node))) for child in children]
    count, levels = 1 + sum(count for count, _ in found), 1 + max((levels for _, levels in found), default=0)
    if levels + len(above) > DEEPEST:
        raise _marked(node, f"more than {DEEPEST} values lie inside each other, where aliases are followed")
    if count > MOST_VALUES:
        raise _marked(node, f"stands for more than {MOST_VALUES:,} values, where aliases are followed")
    known[id(node)] = count, levels
    return count, levels


def _marked(place: Any, problem: str) -> BoundsError:
    return BoundsError(problem=problem, problem_mark=place.start_mark)


@dataclass(frozen=True)
class _Builder:
    """Turns ruamel's node graph into our tree; an alias is built again at each place that uses it."""

    yaml: YAML
    problems: list[Problem]
    place: Callable[[int], str]

    def build(self, node: Any, key: str, above: tuple[int, ...]) -> Node:
        """`above` holds the identities of the nodes around this one: meeting one again is an endless document."""
        where = self.place(node.start_mark.line + 1)
        if id(node) in above:
            self.problems.append(Problem(key, "an alias may not stand inside its own anchor.", where=where))
            return Node(None, where)
        above = (*above, id(node))
        if isinstance(node, ScalarNode):
            return Node(self._scalar(node, key, where), where)
        if node.tag not in (TAG + "map", TAG + "seq"):
            self._refuse_tag(node, key, where)
        if isinstance(node, SequenceNode):
            return Node([self.build(child, dotted(key, i), above) for i, child in enumerate(node.value)], where)
        assert isinstance(node, MappingNode)
        return Node(self._mapping(node, key, above), where)

    def _scalar(self, node: ScalarNode, key: str, where: str) -> Any:
        if node.tag in TEXT_TAGS:
            return node.value
        if node.tag in SCALAR_TAGS:
            try:
                value = self.yaml.constructor.construct_object(node)
                if isinstance(value, int) and value.bit_length() > MOST_BITS:
                    self.problems.append(Problem(key, "has more digits than any number here.", where=where))
                    return None
                return value
            except (YAMLError, ValueError):
                if node.value.lstrip("+-").replace("_", "").isdigit():  # Python reads no more digits than 4,300
                    self.problems.append(Problem(key, "has more digits than any number here.", where=where))
                    return None
                message = f"is not of the type {node.tag.removeprefix(TAG)}. Remove the tag."
                self.problems.append(Problem(key, message, shown(key, node.value), where))
                return None
        self._refuse_tag(node, key, where)
        return None

    def _refuse_tag(self, node: Any, key: str, where: str) -> None:
        tag = node.tag.replace(TAG, "!!")
        self.problems.append(Problem(key, f"the tag {tag} is not allowed: write plain values.", where=where))

    def _mapping(self, node: MappingNode, key: str, above: tuple[int, ...]) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self.place(key_node.start_mark.line + 1)
            name = self._name(key_node, key, where)
            if name is None:
                continue
            path = dotted(key, name)
            child = self.build(value_node, path, above)
            # A value is looked for where its key stands, also when it begins on the next line or is an alias.
            child = Node(child.value, where)
            if name in result:
                message = f"stands twice, first at {result[name].where}. Keep one of them."
                self.problems.append(Problem(path, message, shown(path, plain(child)), where))
                continue
            result[name] = child
        return result

    def _name(self, node: Any, key: str, where: str) -> str | None:
        """The text of a mapping's key; None, with a problem, where it is not a word."""
        if isinstance(node, ScalarNode) and node.tag == TAG + "str" and node.value and "." not in node.value:
            return node.value
        text = str(node.value) if isinstance(node, ScalarNode) else "[...]"
        if isinstance(node, ScalarNode) and node.tag == TAG + "merge":
            message = "merge keys are not part of YAML 1.2. Use `base: FILE`, or repeat the keys."
        elif "." in text and isinstance(node, ScalarNode) and node.tag == TAG + "str":
            first, rest = text.split(".", 1)
            message = f"dots are for the command line. In a file, write `{first}:` and below it `{rest}:`."
        else:
            message = "a key must be a word."
        self.problems.append(Problem(dotted(key, text), message, where=where))
        return None


def _near_file(file: Path) -> str:
    """` Did you mean ...?` when the folder holds a YAML file with a similar name."""
    folder = file.parent
    try:
        candidates = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in (".yaml", ".yml")]
    except FileNotFoundError:
        return f" The folder {folder} does not exist either."
    except OSError as error:
        return f" The folder {folder} cannot be listed: {reason_of(error)}."
    found = nearest(file.name, candidates)
    return f" Did you mean {folder / found[0]}?" if found else ""

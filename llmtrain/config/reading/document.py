"""YAML 1.2 files as trees in which every value knows the file and the line where it stands.

Only plain data is built: mappings, lists, text, numbers, true, false and null. Tags are refused, so no file can
name a Python object. Faults are collected, not raised, so that one look shows all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from llmtrain.config.reading.bounded_yaml import LONGEST_BYTES, BoundsError, bounded_yaml, compose
from llmtrain.config.reading.key_names import nearest, shown
from llmtrain.errors import Problem
from llmtrain.files import read_bytes

COMMAND_LINE = "command line"
"""Where a value stands that an override gave."""

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
    """The tree of one file, its keys to stand below the dotted `key`; None where the file is no YAML mapping."""
    data = _content(file, problems)
    if data is None:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problems.append(
            Problem(f"{file}:{line}", f"byte {data[error.start]:#04x} is no UTF-8. Save the file as UTF-8.")
        )
        return None
    node = read_text(text, key, problems, lambda line: f"{file}:{line}")
    if node is not None and not isinstance(node.value, dict):
        problems.append(Problem(f"{file}:1", "must hold keys and values, such as `name: my-run`."))
        return None
    return node


def _content(file: Path, problems: list[Problem]) -> bytes | None:
    """The bytes of a file; None, with a problem whose key is the file, where it is none or cannot be read."""
    try:
        return read_bytes(file, LONGEST_BYTES)
    except FileNotFoundError:
        fault = f"no such file.{_near_file(file)}"
    except OSError as error:
        fault = f"cannot be read: {reason_of(error)}."
    problems.append(Problem(str(file), fault))
    return None


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


def read_text(text: str, key: str, problems: list[Problem], place: Callable[[int], str]) -> Node | None:
    """The tree of a YAML text; `place` turns a line number, counted from 1, into what is shown as its place."""
    yaml = bounded_yaml()
    try:
        root = compose(yaml, text)
        if root is None:
            return Node(None, place(1))
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
                message = f"is no {node.tag.removeprefix(TAG)}. Remove the tag."
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
        """The text of a mapping's key; None, with a problem, where it is no word."""
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

"""Reading a configuration: a YAML file, the files it rests on, and overrides, with every problem at once."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

from llmtrain.config.reading.credentials import SECRET_WORD
from llmtrain.config.reading.document import (
    COMMAND_LINE,
    DEEPEST,
    Node,
    dotted,
    iter_places,
    merge,
    plain,
    read_document,
    read_text,
    reason_of,
)
from llmtrain.config.reading.rendering import LONGEST_SHOWN, shown
from llmtrain.config.reading.shipped import SHIPPED, shipped_file
from llmtrain.config.reading.validation import Root, validate
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, Problem

OVERRIDE_FORM = "write key.path=value, for example optim.lr=1e-4 or data.train.0.path=data/shards/train."
OVERRIDE = re.compile(r"([A-Za-z_][\w-]*(?:\.[\w-]+)*)=(.*)", re.DOTALL)

OWN_BASES = ("finetune.base",)
"""Keys of that name that mean something of their own, and no file of settings."""

DEEPEST_BASES = 16
"""Files that rest on each other in a row."""
MOST_FILES = 100
"""Files of one configuration, each counted as often as something rests on it: ten files can name each other a billion
times without a circle."""

ENVIRONMENT = "WORLD_SIZE in the environment"
"""The place of the number of ranks where another launcher has started them."""

Rules = Callable[[RunConfig], list[Problem]]


@dataclass(frozen=True)
class LoadedConfig(Generic[Root]):
    """A valid configuration, and for each dotted key that somebody wrote, `file:line` or "command line"."""

    config: Root
    locations: Mapping[str, str]


def load_config(
    path: Path, overrides: Sequence[str] = (), storage_rules: Rules | None = None, world_size: int | None = None
) -> LoadedConfig[RunConfig]:
    """Read a run's configuration and check it: schema, arithmetic and, where given, storage.

    `path` may name a file that the package ships: `llmtrain:runs/quickstart.yaml`.
    Later overrides win over earlier ones, and all of them over files. `world_size` is that of a launcher which has
    started the ranks already: it takes the place of launch.num_workers. Raises ConfigError with every problem of all
    stages; its note says how many there are.
    """

    def with_ranks(root: Node, problems: list[Problem]) -> Node:
        if world_size is None:
            return root
        return _set(root, ["launch", "num_workers"], 0, Node(world_size, ENVIRONMENT), problems)

    def rules(config: RunConfig) -> list[Problem]:
        found = arithmetic_problems(config, config.launch.num_workers)
        return found if storage_rules is None else found + storage_rules(config)

    return load_file(path, overrides, Schema(RunConfig, rules, with_ranks))


@dataclass(frozen=True)
class Schema(Generic[Root]):
    """What a file can hold: the class of the whole, the rules between its keys, and a last change to its tree."""

    root: type[Root]
    rules: Callable[[Root], list[Problem]]
    changed: Callable[[Node, list[Problem]], Node] = lambda root, problems: root


def load_file(path: Path, overrides: Sequence[str], schema: Schema[Root]) -> LoadedConfig[Root]:
    """Read a file with its bases and overrides, and check it. Raises ConfigError with every problem."""
    reading = _Reading()
    try:
        file = shipped_file(str(path)) if str(path).startswith(SHIPPED) else path
    except ConfigError as error:
        raise _error(path, [Problem(str(path), str(error))]) from None
    root = reading.file(file, "", ())
    if root is None:
        raise _error(path, reading.problems)
    root = schema.changed(root, reading.problems)
    for text in overrides:
        root = _overridden(root, text, reading.problems)
    root = schema.changed(root, reading.problems)
    return _checked(root, schema, reading, path)


def load_keys(about: Path, overrides: Sequence[str], schema: Schema[Root], given: Mapping[str, Any]) -> Root:
    """A configuration of overrides alone, without any file; `given` are whole sections that are known already.

    `about` is what they are for. Raises ConfigError with every problem.
    """
    reading, root = _Reading(), Node({}, COMMAND_LINE)
    for text in overrides:
        root = _overridden(root, text, reading.problems)
    known = {name: Node(value, str(about)) for name, value in given.items()}
    for name in sorted(root.value.keys() & known):
        reading.problems.append(
            Problem(name, "follows from the model or an option, and is no key here.", where=COMMAND_LINE)
        )
    return _checked(Node({**root.value, **known}, COMMAND_LINE), schema, reading, about).config


def _checked(root: Node, schema: Schema[Root], reading: "_Reading", path: Path) -> LoadedConfig[Root]:
    """Raises ConfigError with the problems of reading and those that are found here."""
    locations = dict(iter_places(root))
    told = {problem.key for problem in reading.problems}
    # The rules see a configuration whatever is wrong with it: faulty keys stand at their defaults there, and what rests
    # on one of them is not believed. So one start tells the faults of all stages.
    checked = validate(plain(root), schema.root, reading.unread | told)
    found = schema.rules(checked.config)
    wrong = [problem for problem in checked.problems if problem.key not in told]
    rules = _first_causes([problem for problem in found if checked.is_sound(problem)])
    problems = reading.problems + [_placed(problem, locations, path) for problem in wrong + rules]
    if problems:
        raise _error(path, problems)
    return LoadedConfig(checked.config, locations)


def top_keys(path: Path) -> frozenset[str]:
    """The keys at the top of a file and of those that it rests on. What is wrong with them is left to who loads it."""
    try:
        root = _Reading().file(shipped_file(str(path)) if str(path).startswith(SHIPPED) else path, "", ())
    except ConfigError:
        root = None
    return frozenset(root.value) if root is not None else frozenset()


def _error(path: Path, problems: list[Problem]) -> ConfigError:
    error = ConfigError(problems)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    error.add_note(f"{count} in {path}; nothing was started.")
    return error


def _first_causes(problems: list[Problem]) -> list[Problem]:
    """Without those that rest on a key about which an earlier one complains."""
    kept: list[Problem] = []
    for problem in problems:
        if not any(cause.key in problem.uses for cause in kept):
            kept.append(problem)
    return kept


def _placed(problem: Problem, locations: Mapping[str, str], path: Path) -> Problem:
    """The problem with the place of its key; a key that nobody wrote stands where its section does, or nowhere."""
    if problem.where:
        return problem
    if problem.key in locations:
        return replace(problem, where=locations[problem.key])
    if problem.value is not None:
        return replace(problem, where="default")
    section = problem.key
    while "." in section:
        section = section.rpartition(".")[0]
        if section in locations:
            return replace(problem, where=locations[section])
    return replace(problem, where=str(path))


@dataclass(frozen=True)
class _Reading:
    """Follows `base:` from file to file. `unread` collects the sections whose base could not be read.

    `chain` is always the files that rest on each other up to here, the newest last: a base in it would be a circle, and
    relative names start from its last one.
    """

    problems: list[Problem] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    read: list[Path] = field(default_factory=list)

    def file(self, path: Path, key: str, chain: tuple[Path, ...]) -> Node | None:
        """The tree of a file with its bases below it, to stand at the dotted `key`."""
        self.read.append(path)
        node = read_document(path, key, self.problems)
        return None if node is None else self._with_bases(node, key, (*chain, path))

    def _with_bases(self, node: Node, key: str, chain: tuple[Path, ...]) -> Node:
        if isinstance(node.value, list):
            entries = [self._with_bases(child, dotted(key, i), chain) for i, child in enumerate(node.value)]
            return Node(entries, node.where)
        if not isinstance(node.value, dict):
            return node
        rests = "base" in node.value and dotted(key, "base") not in OWN_BASES
        own = {
            name: self._with_bases(child, dotted(key, name), chain)
            for name, child in node.value.items()
            if name != "base" or not rests
        }
        if not rests:
            return Node(own, node.where)
        below = Node({}, node.where)
        for entry in self._base_entries(node.value["base"], dotted(key, "base")):
            found = self._base(entry, key, chain)
            if found is None:
                self.unread.add(key)
            else:
                below = merge(below, found)
        return merge(below, Node(own, node.where))

    def _base_entries(self, node: Node, key: str) -> list[Node]:
        entries = node.value if isinstance(node.value, list) else [node]
        good = [entry for entry in entries[:MOST_FILES] if isinstance(entry.value, str) and entry.value]
        if len(good) < len(entries):
            self.unread.add(key.removesuffix("base").removesuffix("."))
            message = "must be a file or a list of files, relative to this one."
            self.problems.append(Problem(key, message, shown(key, plain(node)), node.where))
        return good

    def _target(self, text: str, chain: tuple[Path, ...]) -> Path:
        """The file that a base means, relative to the last of `chain`. Raises ConfigError, OSError and ValueError."""
        if len(chain) >= DEEPEST_BASES or len(self.read) >= MOST_FILES:
            raise ConfigError(f"rests on too many files: {DEEPEST_BASES} in a row and {MOST_FILES} in all are read.")
        if text.startswith(SHIPPED):
            target = shipped_file(text)
        else:
            target = chain[-1].parent / text
            shortest = Path(os.path.normpath(target))
            target = shortest if shortest.exists() else target
        if os.path.realpath(target) in map(os.path.realpath, chain):
            circle = " -> ".join(str(file) for file in (*chain, target))
            raise ConfigError(f"goes in a circle: {circle}. Remove one.")
        return target

    def _base(self, entry: Node, key: str, chain: tuple[Path, ...]) -> Node | None:
        name = dotted(key, "base")
        try:
            target = self._target(entry.value, chain)
        except ConfigError as error:
            self.problems.append(Problem(name, str(error), shown(name, entry.value), entry.where))
            return None
        except (OSError, ValueError) as error:
            fault = f"cannot be read as a file: {reason_of(error)}."
            self.problems.append(Problem(name, fault, shown(name, entry.value), entry.where))
            return None
        before = len(self.problems)
        found = self.file(target, key, chain)
        # The user wrote the name of the file in `base`, so a file that cannot be read is told there.
        if found is None and [problem.key for problem in self.problems[before:]] == [str(target)]:
            unread = self.problems.pop()
            message = f"{unread.key}: {unread.message}"
            self.problems.append(Problem(name, message, entry.value, entry.where))
        return found


def _overridden(root: Node, text: str, problems: list[Problem]) -> Node:
    """The tree with one `key.path=value` set; the same tree, and a problem, where that is impossible."""
    match = OVERRIDE.fullmatch(text)
    if match is None:
        hidden = "(hidden)" if SECRET_WORD.search(text) else shown("", text)
        problems.append(Problem(f"override '{hidden}'", OVERRIDE_FORM, where=COMMAND_LINE))
        return root
    key, value_text = match.groups()
    if key.count(".") >= DEEPEST:
        problems.append(Problem(f"override '{key[:LONGEST_SHOWN]}...'", "no key is so deep.", where=COMMAND_LINE))
        return root
    found: list[Problem] = []
    value = read_text(value_text, key, found, lambda line: COMMAND_LINE)
    if value is None:
        message = f"{found[0].message} Quote the value, or {OVERRIDE_FORM}"
        problems.append(Problem(key, message, shown(key, value_text), COMMAND_LINE))
        return root
    problems.extend(found)
    return _set(root, key.split("."), 0, value, problems)


def _set(node: Node, parts: list[str], depth: int, value: Node, problems: list[Problem]) -> Node:
    """The tree below `parts[:depth]` with the value at `parts`; the same node, and a problem, where it has no place.

    Nodes are never changed: each level on the way down to the value is made anew.
    """
    if depth == len(parts):
        return value
    part, key, above = parts[depth], dotted(*parts), dotted(*parts[:depth])
    if isinstance(node.value, list):
        if not part.isdecimal() or int(part) >= len(node.value):
            last = len(node.value) - 1
            allowed = f"its entries are numbered 0 to {last}" if last >= 0 else "it is empty"
            message = f"{above} is a list and {allowed}."
            problems.append(Problem(key, message, shown(key, plain(value)), COMMAND_LINE))
            return node
        entries = list(node.value)
        entries[int(part)] = _set(entries[int(part)], parts, depth + 1, value, problems)
        return Node(entries, node.where)
    if node.value is not None and not isinstance(node.value, dict):
        message = f"{above} = {shown(above, node.value)} ({node.where}) is a single value and has no keys."
        problems.append(Problem(key, message, shown(key, plain(value)), COMMAND_LINE))
        return node
    if part.isdecimal():
        message = f"no file gives {above} entries. Set it as a whole: {above}=[...]."
        problems.append(Problem(key, message, shown(key, plain(value)), COMMAND_LINE))
        return node
    children = node.value or {}
    # A section that no file gives is made here, and is known by its place to be new.
    before = children.get(part, Node(None, COMMAND_LINE))
    after = _set(before, parts, depth + 1, value, problems)
    return node if after is before else Node({**children, part: after}, node.where)

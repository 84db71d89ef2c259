"""A chat template: jinja in a sandbox, with what transformers gives to templates, and where its text comes from.

Two things in a rendered text are not to be told from the text alone: which control tokens the template has written and
which a user's message only spells, and what stands in the template's `{% generation %}` blocks. Both are marked with
characters that Unicode reserves for a program's own use (noncharacters, Unicode 15, section 23.7), which no text holds.

A template comes from elsewhere. It runs in jinja's sandbox, without files and imports, within bounds of time and size.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_text

BUILT_IN = ("chatml", "llama3")
LONGEST_TEMPLATE = 1 << 20
LONGEST_TEXT = 1 << 26
"""Characters of a rendered conversation."""
LONGEST_RANGE = 100_000
"""Numbers that a template may count through, all its loops together, for one conversation."""
_SECONDS = 20.0
"""Far more than a conversation takes: only a template that does not end meets it."""

BLOCK_BEGIN, BLOCK_END = "\ufdd0", "\ufdd1"
SPELLED = "\ufdd2"
"""Stands before and behind one character that tells which control token a message spells."""
_RESERVED = re.compile("[\ufdd0-\ufdef]")


@dataclass(frozen=True)
class Control:
    """A control token that a template wrote: characters [begin, end) of the text."""

    begin: int
    end: int
    token: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, the control tokens in it, and the bounds [begin, end) of its generation blocks."""

    text: str
    controls: tuple[Control, ...]
    blocks: tuple[tuple[int, int], ...]
    spells_control: bool
    """True where a message spells a control token, which stays text."""


class ChatTemplate:
    """A compiled template for one tokenizer, whose control tokens it may write."""

    def __init__(self, text: str, name: str, controls: Mapping[str, int], variables: Mapping[str, str]) -> None:
        """`controls` are ids by their names, `variables` what a template knows beside messages, such as bos_token.

        Raises DataError where the text is not a template.
        """
        self.text, self.name = text, name
        self.marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        self._controls, self._variables = dict(controls), dict(variables)
        self._names = sorted(controls, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        marks = f"{BLOCK_BEGIN}|{BLOCK_END}|{SPELLED}.{SPELLED}"
        self._cut = re.compile(f"({'|'.join([marks, *map(re.escape, self._names)])})", re.DOTALL)
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(text)
        except TemplateSyntaxError as error:
            raise DataError(f"{name}:{error.lineno}: not a jinja template: {error.message}.") from None
        except (TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise DataError(f"{name}: not a jinja template: {error}.") from None

    def spelled_control(self, message: Any) -> str | None:
        """The first name of a control token that a text in a message spells; None where none does."""
        return next((found[0] for text in _texts(message) if (found := self._spelled.search(text))), None)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, prompts: bool = False
    ) -> Rendered:
        """The text of messages; with `prompts` it ends where an assistant is to begin. Raises DataError."""
        hidden = [self._hidden(message) for message in messages]
        tools = None if tools is None else [self._hidden(tool) for tool in tools]
        given = {**self._variables, "messages": hidden, "tools": tools, "add_generation_prompt": prompts}
        parts, size, self._environment.budget = list[str](), 0, _Budget()
        try:
            for part in self._template.generate(given):
                parts.append(part)
                size += len(part)
                self._environment.budget.spend(0)
                if size > LONGEST_TEXT:
                    raise SecurityError(f"it writes more than {LONGEST_TEXT:,} characters")
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
            raise DataError(f"{self.name}: the template fails on it: {reason}.") from None
        except (RecursionError, MemoryError) as error:
            raise DataError(f"{self.name}: the template does not end ({type(error).__name__}).") from None
        return self._parsed("".join(parts))

    def _hidden(self, value: Any) -> Any:
        """The same value whose texts have marks in place of control tokens that they spell."""
        if isinstance(value, str):
            if _RESERVED.search(value):
                raise DataError("a text holds a noncharacter (U+FDD0 to U+FDEF), which no text may. Remove it.")
            return self._spelled.sub(lambda found: f"{SPELLED}{chr(self._names.index(found[0]) + 1)}{SPELLED}", value)
        if isinstance(value, Mapping):
            return {self._hidden(key): self._hidden(inner) for key, inner in value.items()}
        return [self._hidden(inner) for inner in value] if isinstance(value, list | tuple) else value

    def _parsed(self, marked: str) -> Rendered:
        text, begins = list[str](), list[int]()
        controls, blocks, place, spells = list[Control](), list[tuple[int, int]](), 0, False
        for part in self._cut.split(marked):
            if part == BLOCK_BEGIN:
                begins.append(place)
                continue
            if part == BLOCK_END:
                blocks.append((begins.pop(), place))
                continue
            if part[:1] == SPELLED:
                part, spells = self._names[ord(part[1]) - 1], True
            elif part in self._controls:
                controls.append(Control(place, place + len(part), self._controls[part]))
            text.append(part)
            place += len(part)
        return Rendered("".join(text), tuple(controls), tuple(sorted(blocks)), spells)


def read_template(name: str) -> tuple[str, str]:
    """The text of a built-in template or of a file, and its name for errors. Raises ConfigError, DataError."""
    path = Path(__file__).with_name(f"{name}.jinja") if name in BUILT_IN else Path(name)
    if not path.is_file():
        raise ConfigError(f"--template {name}: no such file. Give {', '.join(BUILT_IN)}, or a jinja file.")
    try:
        text = read_text(path, LONGEST_TEMPLATE)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a template: {error}.") from None
    if not text.strip():
        raise DataError(f"{path}: is empty, and a template makes a text of messages.")
    return text, name if name in BUILT_IN else str(path)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


class _Budget:
    """What one rendering may take."""

    def __init__(self) -> None:
        self._numbers, self._end = LONGEST_RANGE, monotonic() + _SECONDS

    def spend(self, numbers: int) -> None:
        self._numbers -= numbers
        if self._numbers < 0:
            raise SecurityError(f"it counts through more than {LONGEST_RANGE:,} numbers")
        if monotonic() > self._end:
            raise SecurityError(f"it takes more than {_SECONDS:g} seconds")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox: white space and names as transformers has them (chat_template_utils), growth bounded."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.budget = _Budget()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["range"] = self._range

    def _range(self, *bounds: int) -> range:
        found = range(*bounds)
        self.budget.spend(len(found))
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products and powers of numbers of a usual size; texts and lists grow within the bound of a text."""
        numbers = all(isinstance(side, int | float) and abs(side) < 1e15 for side in (left, right))
        if operator == "*" and not numbers:
            sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if not isinstance(times, int) or not hasattr(sized, "__len__") or len(sized) * times > LONGEST_TEXT:
                raise SecurityError("it multiplies something that is too large")
        if operator == "**" and not (numbers and abs(right) <= 64):
            raise SecurityError("it raises to a power that is too large")
        if operator == "%" and not numbers and re.search(r"%[^%a-zA-Z]*(\d{5}|\*)", str(left)):
            raise SecurityError("it formats with a width that is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the assistant is trained to say, as transformers has it."""

    tags = {"generation"}  # noqa: RUF012  jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call whose text is put between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Macro) -> str:
        return f"{BLOCK_BEGIN}{caller()}{BLOCK_END}"


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """As templates expect it: with signs and letters of all languages as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))

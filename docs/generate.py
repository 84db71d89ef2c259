"""Writes docs/configuration.md and docs/data-configuration.md, the references of all keys, from their schemas.

`python -m docs.generate` writes the pages; with `--check` it writes nothing and exits 1 where one is out of date.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.rendering import bound_text, shown
from llmtrain.config.reading.suggestions import either, sections_of
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import Section

FOLDER = Path(__file__).parent

INTRODUCTION = """\
# Configuration reference

Written by `make docs` from the modules of `llmtrain/config/`. Do not edit it by hand.

A run is one YAML 1.2 file. It must give `name`, `model`, `data.train`, and one of `train.steps`, `train.tokens` and
`train.epochs`. A key that is not on this page is an error.

- `base: FILE`, or a list of files, may stand at the top of the file and of any section. The keys of that file come
  first, the keys beside `base` win over them. The path is relative to the file that it stands in.
  `base: llmtrain:models/llama-8b.yaml` is a file of `configs/`, which llmtrain ships. The command takes such names too:
  `llmtrain train llmtrain:runs/quickstart.yaml`.
- `key=value` behind the file on the command line wins over the file: `optim.lr=1e-4`, or
  `data.train.0.path=shards/train`. The value is YAML too.
- All other paths are relative to the folder that the command is started in.

`llmtrain train CONFIG --print-config` prints the whole configuration of a run. `llmtrain train CONFIG --dry-run` checks
it and says what would run, with `--ranks N` as if on so many ranks. `llmtrain schema` prints the keys as a JSON schema,
for editors.
"""

PIPELINE_INTRODUCTION = """\
# Keys of data pipelines

Written by `make docs` from the modules of `llmtrain/config/`. Do not edit it by hand.

A pipeline is one YAML 1.2 file, which `llmtrain data run` takes; it must give `name` and `read`. `base:` and
`key=value` are as in [runs](configuration.md). [Data pipelines](data-pipelines.md) says what happens, and
[steps](data-steps.md) what each step drops.

Short forms: `tokenizer: FILE` means `tokenizer: {path: FILE}`, and a step without keys may be its name alone.
"""

PAGES: dict[str, tuple[str, type[Section]]] = {
    "configuration.md": (INTRODUCTION, RunConfig),
    "data-configuration.md": (PIPELINE_INTRODUCTION, PipelineConfig),
}

TYPE_WORDS = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
BOUND_WORDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def page_text(name: str) -> str:
    """A whole page."""
    introduction, root = PAGES[name]
    return "\n".join([introduction, *(_section_text(key, section) for key, section in iter_sections(root=root))])


def iter_sections(key: str = "", root: type[Section] = RunConfig) -> Iterator[tuple[str, type[Section]]]:
    """Every section with its dotted key, outer ones first. `N` stands for the number of an entry in a list."""
    yield key, root
    for name, field in root.model_fields.items():
        found = sections_of(field.annotation)
        if found:
            inner, is_list = found
            yield from iter_sections(_joined(key, f"{name}.N" if is_list else name), inner)


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _section_text(key: str, section: type[Section]) -> str:
    lines = [f"## `{key}`" if key else "## Top level", "", section.__doc__ or "", ""]
    lines += ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        cells = (
            f"`{_joined(key, name)}`",
            type_text(field.annotation, field.metadata),
            _default(field),
            _meaning(field),
        )
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type and its bounds in words, such as `whole number, at least 1, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], [*metadata, *arguments[1:]])
    if origin is Literal:
        return either(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return ", or ".join("`null`" if part is type(None) else type_text(part, metadata) for part in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        fewest = next((item.min_length for item in metadata if hasattr(item, "min_length")), 0)
        inner = type_text(arguments[0])
        entries = f"list, each entry a {inner}" if "," in inner else f"list of {inner}s"
        return entries + (f", {fewest} or more" if fewest else "")
    if origin is tuple:
        return f"list of {len(arguments)}: {'; '.join(map(type_text, arguments))}"
    if sections_of(annotation):
        return "section"
    return ", ".join([TYPE_WORDS[annotation], *_bounds(metadata)])


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for bound, words in BOUND_WORDS.items():
            if hasattr(item, bound):
                yield f"{words} {_limit(getattr(item, bound))}"


def _limit(value: int | float) -> str:
    """A bound; large ones as powers, where they are."""
    for base in (2, 10):
        exponent = round(math.log(value, base)) if value >= 2**16 else 0
        if exponent and base**exponent == value:
            return f"{base}^{exponent}"
    return bound_text(value)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "as below"
    return f"`{flow(field.default)}`"


def flow(value: Any) -> str:
    """A default in full, as YAML would have it on one line: of a section, the keys that are not as below."""
    if isinstance(value, Section):
        given = {name: getattr(value, name) for name in type(value).model_fields}
        changed = {name: it for name, it in given.items() if it != type(value).model_fields[name].default}
        return f"{{{', '.join(f'{name}: {flow(it)}' for name, it in changed.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(flow, value))}]"
    return shown("", value)


def _meaning(field: FieldInfo) -> str:
    found = sections_of(field.annotation)
    return field.description or (found[0].__doc__ if found else "") or ""


def main(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    """Write the pages, or with `--check` compare them; returns the exit code."""
    if list(arguments) not in ([], ["--check"]):
        print("usage: python -m docs.generate [--check]", file=sys.stderr)
        return 2
    stale = 0
    for name in PAGES:
        page, text = folder / name, page_text(name)
        if not arguments:
            page.write_text(text, "utf-8")
        elif not page.is_file() or page.read_text("utf-8") != text:
            print(f"{page} is out of date: run `make docs`.", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

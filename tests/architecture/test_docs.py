"""The pages say only what is there: files, commands, options, keys, exit codes and links of the README and docs/."""

import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any

import pytest
import typer
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from docs import generate
from llmtrain import errors
from llmtrain.cli.app import VERBS, app, load_verb
from llmtrain.config.reading.suggestions import all_keys
from llmtrain.config.reading.tasks import load_tasks

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = sorted([README, *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
PATH = re.compile(r"\.?[\w.-]+(/[\w.-]+)*/?")
SUFFIXES = (".py", ".md", ".toml", ".yaml")

MADE_BY_RUNS = ("quickstart", "checkpoints", "step-00000050", "tensorboard", "wandb", "profile", "train", "valid")
"""First parts of paths that commands make; they are not in the repository."""

FILES_OF_RUNS = ("config.yaml", "my-run.yaml")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, *languages: str) -> Iterator[str]:
    """The contents of fenced blocks in one of the languages, without the indentation of a list."""
    for language, content in FENCE.findall(text):
        if language in languages:
            yield dedent(content)


def spans(text: str) -> list[str]:
    """Inline code outside of fenced blocks."""
    return SPAN.findall(FENCE.sub("", text))


def missing_paths(text: str) -> list[str]:
    """Repository paths that a page names in backticks and that do not exist."""
    top = {entry.name for entry in ROOT.iterdir()}
    missing = []
    for span in spans(text):
        first = span.split("/")[0]
        if not PATH.fullmatch(span) or first in MADE_BY_RUNS or span in FILES_OF_RUNS:
            continue
        named = ("/" in span and first in top) or span.endswith(("/", *SUFFIXES))
        if named and not (ROOT / span).exists():
            missing.append(span)
    return missing


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of each command line in sh blocks, comments left out."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def parse_llmtrain(words: list[str]) -> dict[str, Any]:
    """Parse the arguments behind `llmtrain` as the command does, and run nothing. Raises where they are wrong."""
    assert words[0] in VERBS, f"no such verb: {words[0]}"
    command, rest, name = load_verb(words[0]), words[1:], words[0]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no such verb: {name} {rest[:1]}"
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    return command.make_context(name, list(rest)).params


def wrong_command(words: list[str]) -> str | None:
    """Why a documented command line would not be accepted; None where it would."""
    try:
        parameters = parse_llmtrain(words)
    except Exception as error:  # the usage errors of typer's own copy of click have no public class
        return f"llmtrain {shlex.join(words)}: {type(error).__name__}: {error}"
    for override in parameters.get("overrides") or ():
        key = re.sub(r"\.\d+\.", ".0.", override.partition("=")[0])
        if key not in all_keys():
            return f"llmtrain {shlex.join(words)}: no such key: {key}"
    return None


def dotted_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a YAML tree, entries of lists as entry 0."""
    children = tree.items() if isinstance(tree, dict) else [("0", child) for child in tree]
    for name, child in children:
        key = f"{prefix}{name}"
        if isinstance(tree, dict) and name != "base":
            yield key
        if isinstance(child, dict | list):
            yield from dotted_keys(child, f"{key}.")


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to files or headings that are not there."""
    broken = []
    for link in LINK.findall(FENCE.sub("", text)):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(link)
        elif heading:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text("utf-8")), re.MULTILINE)
            if heading not in map(anchor, headings):
                broken.append(link)
    return broken


def test_configuration_references_are_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, "run `make docs`"
    for name in generate.PAGES:
        (tmp_path / name).write_text(generate.page_text(name), "utf-8")
    for name in generate.PAGES:
        stale, text = tmp_path / name, generate.page_text(name)
        stale.unlink()
        assert generate.main(["--check"], tmp_path) == 1
        stale.write_text(text.replace("least", "most", 1), "utf-8")
        assert generate.main(["--check"], tmp_path) == 1
        assert f"{name} is out of date: run `make docs`" in capsys.readouterr().err
        assert generate.main([], tmp_path) == 0
        assert generate.main(["--check"], tmp_path) == 0
    assert generate.main(["--chekc"], tmp_path) == 2


references = pytest.mark.parametrize("name", generate.PAGES)


@references
def test_configuration_references_have_every_key_with_its_meaning(name: str) -> None:
    rows = [line.split(" | ") for line in generate.page_text(name).splitlines() if line.startswith("| `")]
    found = {row[0].removeprefix("| ").strip("`").replace(".N.", ".0.") for row in rows}
    assert found == set(all_keys(generate.PAGES[name][1]))
    assert [row for row in rows if len(row) != 4 or not row[3].rstrip(" |")] == []


@references
def test_defaults_are_whole_and_are_yaml(name: str) -> None:
    """What the page gives as a default can be written into a file, and means the default."""
    rows = [line.strip("| ").split(" | ") for line in generate.page_text(name).splitlines() if line.startswith("| `")]
    defaults = {row[0].strip("`"): row[2].strip("`").replace("&#124;", "|") for row in rows}
    compared = 0
    for key, section in generate.iter_sections(root=generate.PAGES[name][1]):
        for name, field in section.model_fields.items():
            written = defaults[f"{key}.{name}" if key else name]
            if written in ("required", "as below"):
                continue
            value = YAML(typ="safe", pure=True).load(io.StringIO(f"default: {written}"))["default"]
            kind = Annotated[field.annotation, None, *field.metadata]
            assert TypeAdapter(kind).validate_python(value) == field.default, (key, name, written)
            compared += 1
    assert compared > 100


@pages
def test_named_files_exist(page: Path) -> None:
    assert missing_paths(page.read_text("utf-8")) == []


def undefined_names(text: str, source: str) -> list[str]:
    """Single names in backticks that nothing in the source defines: no function, class, constant, field or key."""
    names = [span for span in spans(text) if re.fullmatch(r"[A-Za-z]+(_[A-Za-z]+)*", span)]
    return [
        name for name in names if not re.search(rf"^(def |class | {{4}})?{name}( =|: |\(|\b:)", source, re.MULTILINE)
    ]


def test_recipes_name_what_is_there() -> None:
    """What contributing.md says to write next to is defined in the library."""
    source = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "llmtrain").rglob("*.py")))
    recipes = (ROOT / "docs" / "contributing.md").read_text("utf-8").partition("## Add ")[2]
    assert len(spans(recipes)) > 10 and undefined_names(recipes, source) == []
    found = undefined_names("`TABLE`, `to_config`, `FAMILIES`, `obstacles`, `position`, `a/b.py`", source)
    assert found == ["obstacles"]


def test_a_missing_file_is_found() -> None:
    text = "`llmtrain/config/`, `llmtrain/gone.py`, `configs/none/`, `checkpoints/`, `nowhere.md`, `optim.lr`, `1/2`"
    assert missing_paths(text) == ["llmtrain/gone.py", "configs/none/", "nowhere.md"]


@pages
def test_commands_are_accepted(page: Path) -> None:
    text = page.read_text("utf-8")
    found = [words[1:] for words in shell_commands(text) if words[0] == "llmtrain"]
    assert [reason for words in found if (reason := wrong_command(words))] == []


def test_the_main_job_is_documented() -> None:
    """Were the blocks not found, no command would be checked."""
    verbs = [words[1:3] for words in shell_commands(README.read_text("utf-8")) if words[0] == "llmtrain"]
    assert [verb[0] for verb in verbs[:6]] == ["data", "data", "train", "report", "export", "generate"]


def test_a_wrong_command_is_found() -> None:
    text = """
```sh
llmtrain data verify shards  # fine
llmtrain data verfiy shards
llmtrain tran run.yaml
llmtrain train run.yaml --dry-rum
llmtrain train run.yaml optim.lr=1 optim.lrr=1
llmtrain data show shards --sample -1
llmtrain export a-run
llmtrain data
```
"""
    found = [wrong_command(words[1:]) for words in shell_commands(text)]
    assert [bool(reason) for reason in found] == [False] + [True] * 7


def test_commands_of_the_makefile_are_accepted() -> None:
    """Those that its recipes run, and those that the quickstart's last words suggest."""
    makefile = re.sub(r"\$(\(\w+\)|[@<])", "x", (ROOT / "Makefile").read_text("utf-8"))
    found = re.findall(r"^\tx/llmtrain (.+)$|^\t +\" +llmtrain (.+)\"", makefile, re.MULTILINE)
    lines = [shlex.split(run or suggested, comments=True) for run, suggested in found]
    assert {words[0] for words in lines} >= {"data", "train", "report", "export", "generate"}
    assert [reason for words in lines if (reason := wrong_command(words))] == []


@pages
def test_verbs_named_in_the_text_exist(page: Path) -> None:
    root = typer.main.get_command(app)
    assert set(getattr(root, "commands", ())) == set(VERBS)
    for span in spans(page.read_text("utf-8")):
        words = span.split()
        if words[0] != "llmtrain" or len(words) == 1 or words[1].startswith("-"):
            continue
        assert words[1] in VERBS, span
        group = getattr(load_verb(words[1]), "commands", None)
        assert group is None or words[2] in group, span


@pages
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    text = page.read_text("utf-8")
    lines = [shlex.join(words) for words in shell_commands(text)] + spans(text)
    for line in lines:
        words = line.split()
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), line


@pages
def test_keys_in_yaml_blocks_exist(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "yaml"):
        if block.startswith("tasks:"):
            file = tmp_path / "tasks.yaml"
            file.write_text(block, "utf-8")
            assert load_tasks([file])  # every key and value
            continue
        keys = set(dotted_keys(YAML(typ="safe", pure=True).load(io.StringIO(block))))
        assert keys <= set(all_keys()), keys - set(all_keys())


@pages
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text("utf-8")) == []


def pages_linked_from(page: Path) -> set[Path]:
    """The pages that a reader reaches by links, from this one on."""
    reached, left = set[Path](), [page]
    while left:
        here = left.pop()
        if here in reached or here.suffix != ".md":
            continue
        reached.add(here)
        names = [link.partition("#")[0] for link in LINK.findall(here.read_text("utf-8")) if "://" not in link]
        left += [target for name in names if (target := (here.parent / name).resolve()).is_file()]
    return reached


def test_every_page_is_reached_from_the_readme() -> None:
    assert sorted(set(PAGES) - pages_linked_from(README)) == []


def test_operations_are_pages_by_task() -> None:
    """The first page names all others, and none grows to a book."""
    linked = {(OPERATIONS.parent / link).resolve() for link in LINK.findall(OPERATIONS.read_text("utf-8"))}
    pages_of_tasks = set((OPERATIONS.parent / "operations").glob("*.md"))
    assert pages_of_tasks and pages_of_tasks <= linked
    assert [page.name for page in pages_of_tasks if len(page.read_text("utf-8").splitlines()) > 150] == []


def test_a_broken_link_is_found() -> None:
    text = (
        "[a](docs/concepts.md) [b](docs/none.md) [c](docs/concepts.md#resume) [d](docs/concepts.md#reusme) [e](#start)"
    )
    assert broken_links(README, text) == ["docs/none.md", "docs/concepts.md#reusme"]


def exit_codes_listed(text: str) -> list[int]:
    """The codes that begin the rows of a page's tables."""
    return [int(row) for row in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_the_exit_codes_are_listed(page: str) -> None:
    defined = {0, 1, errors.EXIT_PREEMPTED, errors.EXIT_TOLD_TWICE}
    defined |= {kind.exit_code for kind in errors.LlmtrainError.__subclasses__()}
    assert exit_codes_listed((ROOT / page).read_text("utf-8")) == sorted(defined)


def test_what_to_do_stands_with_every_exit_code() -> None:
    rows = [line.split(" | ") for line in OPERATIONS.read_text("utf-8").splitlines() if re.match(r"\| \d+ \|", line)]
    assert rows and [row for row in rows if len(row) != 4 or not all(cell.strip(" |") for cell in row)] == []
    assert exit_codes_listed("| Code |\n| 0 | done |\n| x | 7 |\n| 75 | again |") == [0, 75]


def test_the_changelog_is_sorted_by_version_and_kind() -> None:
    """Every version has the same three lists in the same order, and no line stands outside of them."""
    versions = re.split(r"^## (.+)\n", (ROOT / "docs" / "changelog.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    names, texts = versions[::2], versions[1::2]
    assert names[0] == "Unreleased" and names[1:] == sorted(names[1:], reverse=True) and len(names) > 1
    for name, text in zip(names, texts, strict=True):
        before, *kinds = re.split(r"^### (.+)\n", text, flags=re.MULTILINE)
        assert (before.strip(), kinds[::2]) == ("", ["Added", "Changed", "Fixed"]), name
        lists = [line for kind in kinds[1::2] for line in kind.splitlines() if line]
        assert [line for line in lists if not line.startswith(("- ", "  "))] == [], name


@pages
def test_lines_are_short_and_plain(page: Path) -> None:
    """Outside of tables a line has at most 120 characters, so that the pages read well as plain text."""
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        assert line.startswith("|") or len(line) <= 120, f"{page.name}:{number}"

"""Files, functions and parameter lists stay small, and modules are named after what they hold."""

import ast
from pathlib import PurePosixPath

from tests.architecture.source_tree import PACKAGES, SourceFile, read_sources

FILE_LINES = 300
FILE_LINES_CAP = 400
FILES_PER_LONG_ONE = 10
FUNCTION_LINES = 60
PARAMETERS = 6
MOST_IMPORTS = {"llmtrain/train/setup.py": 15}
"""How many modules of its own a file may import: what puts parts together knows them, and not what they are made of."""
SPECIAL_FILE_LINES = {"llmtrain/train/loop.py": 200}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}


def files_over_budget(sources: list[SourceFile]) -> list[str]:
    faults = [
        f"{source.path} has {source.num_lines} lines, the cap is {cap}"
        for source in sources
        if source.num_lines > (cap := SPECIAL_FILE_LINES.get(source.path, FILE_LINES_CAP))
    ]
    long = [source.path for source in sources if source.num_lines > FILE_LINES]
    if len(long) * FILES_PER_LONG_ONE > len(sources):
        faults.append(f"more than a tenth of {len(sources)} files exceed {FILE_LINES} lines: {', '.join(long)}")
    return faults


def imports_over_budget(sources: list[SourceFile]) -> list[str]:
    faults = []
    for source in sources:
        found = {name for _, name in source.imported_modules() if name.split(".")[0] in PACKAGES}
        if len(found) > (most := MOST_IMPORTS.get(source.path, len(found))):
            faults.append(f"{source.path} imports {len(found)} modules of ours, the cap is {most}")
    return faults


def functions_over_budget(sources: list[SourceFile]) -> list[str]:
    faults = []
    for source in sources:
        for node in ast.walk(source.parsed()):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                faults.append(f"{source.path}:{node.lineno} {node.name} has {lines} lines")
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            parameters = [name for name in names if name not in ("self", "cls")]
            # The parameters of a command's function are the options of the command.
            if len(parameters) > PARAMETERS and not source.path.startswith("llmtrain/cli/"):
                faults.append(f"{source.path}:{node.lineno} {node.name} has {len(parameters)} parameters")
    return faults


def names_that_say_nothing(sources: list[SourceFile]) -> list[str]:
    return [
        source.path
        for source in sources
        if NAMES_THAT_SAY_NOTHING & set(PurePosixPath(source.path).with_suffix("").parts)
    ]


def test_file_budget() -> None:
    assert files_over_budget(read_sources()) == []


def test_import_budget() -> None:
    sources = read_sources()
    assert imports_over_budget(sources) == []
    assert MOST_IMPORTS.keys() <= {source.path for source in sources}


def test_too_many_imports_are_caught() -> None:
    text = "".join(f"import llmtrain.a{n}\nfrom launch.b{n} import x\nimport torch.c{n}\n" for n in range(8))
    bad = [SourceFile("llmtrain/train/setup.py", text), SourceFile("llmtrain/train/other.py", text)]
    assert imports_over_budget(bad) == ["llmtrain/train/setup.py imports 16 modules of ours, the cap is 15"]


def test_long_files_are_caught() -> None:
    small = [SourceFile(f"llmtrain/small_{n}.py", "x = 1\n" * FILE_LINES) for n in range(18)]
    long = [SourceFile(f"llmtrain/long_{n}.py", "x = 1\n" * FILE_LINES_CAP) for n in range(3)]
    assert files_over_budget(small + long[:2]) == []
    assert "more than a tenth of 21 files" in files_over_budget(small + long)[0]
    assert files_over_budget([*small, SourceFile("launch/a.py", "x = 1\n" * (FILE_LINES_CAP + 1))]) == [
        "launch/a.py has 401 lines, the cap is 400"
    ]
    assert files_over_budget([SourceFile("llmtrain/train/loop.py", "x = 1\n" * 201)]) == [
        "llmtrain/train/loop.py has 201 lines, the cap is 200"
    ]


def test_function_budget() -> None:
    assert functions_over_budget(read_sources()) == []


def test_large_functions_are_caught() -> None:
    long = "class A:\n    def f(self):\n" + "        x = 1\n" * FUNCTION_LINES
    wide = "def g(a, b, c, d, /, e, *, f, h): ...\n"
    right = "class A:\n    def f(self, a, b, c, d, e, f, *rest, **others):\n" + "        x = 1\n" * (FUNCTION_LINES - 1)
    sources = [
        SourceFile("launch/a.py", long),
        SourceFile("launch/b.py", wide),
        SourceFile("launch/c.py", right),
        SourceFile("llmtrain/cli/d.py", wide),
    ]
    assert functions_over_budget(sources) == ["launch/a.py:2 f has 61 lines", "launch/b.py:1 g has 7 parameters"]


def test_names_say_what_is_inside() -> None:
    assert names_that_say_nothing(read_sources()) == []


def test_empty_names_are_caught() -> None:
    sources = [SourceFile(path, "") for path in ("llmtrain/utils/a.py", "launch/helpers.py", "launch/commonness.py")]
    assert names_that_say_nothing(sources) == ["llmtrain/utils/a.py", "launch/helpers.py"]

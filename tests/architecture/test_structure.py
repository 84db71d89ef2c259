"""Folders, modules and functions are worth opening: none too full, none too small, none that only tests use."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from tests.architecture.source_tree import ROOT, SourceFile, read_sources

FOLDER_MODULES = 16
MODULE_LINES = 30
CALLED_ONCE_LINES = 4

SMALL_MODULES = {
    "llmtrain/checks/parity/rank_pool_preload.py": "what the process that ranks are forked from imports first",
    "llmtrain/interop/families/mistral.py": "a row of the table of families",
    "data_pipelines/steps/length.py": "a row of the table of steps",
}
"""Modules below MODULE_LINES that are a seam, a row of a table or what a process has to import first, and why."""

CALLED_BY_LIBRARIES = {
    "set_deepspeed_parallelism": "DeepSpeed looks for it on modules with experts",
    "set_input_tensor": "megatron-core's schedules hand a stage its input",
    "get_model_parallel_group": "DeepSpeed's mpu",
    "get_model_parallel_rank": "DeepSpeed's mpu",
    "get_model_parallel_world_size": "DeepSpeed's mpu",
    "get_data_parallel_rank": "DeepSpeed's mpu",
    "get_data_parallel_world_size": "DeepSpeed's mpu",
    "get_data_parallel_group_ranks": "DeepSpeed's mpu",
    "eot_token_id": "lm-eval asks models for it",
    "loglikelihood_rolling": "lm-eval puts whole texts to models with it",
    "initialize_state": "Ray Serve calls it on a router",
    "choose_replicas": "Ray Serve asks a router which replica a call goes to",
    "readable": "Python's buffers ask a stream whether they may read it",
    "readinto": "Python's buffers read a stream so",
}
"""Names that no line of ours calls, and who does."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def full_folders(sources: list[SourceFile]) -> list[str]:
    modules = Counter(
        str(PurePosixPath(source.path).parent) for source in sources if not source.path.endswith("__init__.py")
    )
    return [f"{folder} has {number} modules" for folder, number in modules.items() if number > FOLDER_MODULES]


def small_modules(sources: list[SourceFile]) -> list[str]:
    return [
        f"{source.path} has {source.num_lines} lines"
        for source in sources
        if source.num_lines < MODULE_LINES
        and not source.path.endswith("__init__.py")
        and source.path not in SMALL_MODULES
    ]


def splinters(sources: list[SourceFile]) -> list[str]:
    """Private functions of fewer than CALLED_ONCE_LINES lines that are called once, and used in no other way."""
    faults = []
    for source in sources:
        tree = source.parsed()
        functions: dict[str, list[Function]] = defaultdict(list)
        calls, uses = Counter[str](), Counter[str]()
        for node in ast.walk(tree):
            if isinstance(node, Function):
                functions[node.name].append(node)
            elif isinstance(node, ast.Call):
                calls[_name(node.func)] += 1
            uses[_name(node)] += 1
        faults += [
            f"{source.path}:{found[0].lineno} {name}"
            for name, found in functions.items()
            if name.startswith("_") and not name.endswith("__") and len(found) == calls[name] == uses[name] == 1
            # Decorated, it may be a property, a context manager or a validator.
            if not found[0].decorator_list and _body_lines(found[0]) < CALLED_ONCE_LINES
        ]
    return faults


def names_of_several(sources: list[SourceFile]) -> list[str]:
    places: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for node in source.parsed().body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(source.path)
    return [f"{name} is in {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1]


def used_by_tests_alone(sources: list[SourceFile], others: str = "") -> list[str]:
    """Public functions, classes and methods whose name no code says, nor `others`: scripts, settings, generators.

    A name that is said somewhere else for another thing passes: this finds most, and nothing that is in use.
    """
    said = Counter(re.findall(r"\w+", others))
    for source in sources:
        for node in ast.walk(source.parsed()):
            said[_name(node)] += 1
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.:]+", node.value):
                said.update(re.findall(r"\w+", node.value))
    faults = []
    for source in sources:
        for node in source.parsed().body:
            members = node.body if isinstance(node, ast.ClassDef) else []
            for thing in (node, *members):
                if not isinstance(thing, Function | ast.ClassDef) or thing.name.startswith("_") or said[thing.name]:
                    continue
                registered = thing is node and thing.decorator_list and isinstance(thing, Function)
                if not registered and thing.name not in CALLED_BY_LIBRARIES:
                    faults.append(f"{source.path}:{thing.lineno} {thing.name}")
    return faults


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _body_lines(function: Function) -> int:
    """Lines of a function without its head and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def scripts() -> str:
    """The text of what else of the repository calls the packages."""
    paths = [ROOT / "pyproject.toml", ROOT / "Makefile", *Path(ROOT / "docs").rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def test_folders_can_be_overseen() -> None:
    assert full_folders(read_sources()) == []


def test_full_folders_are_caught() -> None:
    sources = [SourceFile(f"launch/rank/m{number}.py", "") for number in range(FOLDER_MODULES)]
    extra = [SourceFile("launch/rank/__init__.py", ""), SourceFile("launch/rank/deeper/m.py", "")]
    assert full_folders(sources + extra) == []
    assert full_folders([*sources, SourceFile("launch/rank/one.py", "")]) == ["launch/rank has 17 modules"]


def test_modules_are_worth_opening() -> None:
    sources = read_sources()
    assert small_modules(sources) == []
    assert SMALL_MODULES.keys() <= {source.path for source in sources if source.num_lines < MODULE_LINES}


def test_small_modules_are_caught() -> None:
    sources = [SourceFile("launch/a.py", "x = 1\n" * 29), SourceFile("launch/b.py", "x = 1\n" * 30)]
    assert small_modules([*sources, SourceFile("launch/__init__.py", "")]) == ["launch/a.py has 29 lines"]


def test_functions_are_worth_a_name() -> None:
    assert splinters(read_sources()) == []


def test_splinters_are_caught() -> None:
    text = '''
def f(x):
    return _once(x) + _long(x) + _twice(x) + _twice(x)
def _once(x):
    """Twice as much.

    And not more."""
    y = x
    return 2 * y
def _long(x):
    a = x
    b = a
    c = b
    return c
def _twice(x):
    return x
def _passed_on(x):
    return x
@property
def _decorated(x):
    return x
class A:
    def f(self):
        return self._own() + self._decorated + map(_passed_on, [])
    def _own(self):
        return 1
'''
    assert splinters([SourceFile("launch/a.py", text)]) == ["launch/a.py:4 _once", "launch/a.py:25 _own"]


def test_a_class_has_its_name_to_itself() -> None:
    assert names_of_several(read_sources()) == []


def test_classes_of_one_name_are_caught() -> None:
    text = "class Box: ...\nclass _Box: ...\n"
    assert names_of_several([SourceFile("launch/a.py", text), SourceFile("launch/b.py", text)]) == [
        "Box is in launch/a.py, launch/b.py"
    ]


def test_nothing_is_there_for_tests_alone() -> None:
    assert used_by_tests_alone(read_sources(), scripts()) == []


def test_what_only_tests_use_is_caught() -> None:
    text = '''
from elsewhere import imported_only
def used(): ...
def in_a_table(): ...
def imported_only(): ...
def in_a_script(): ...
@app.command()
def registered(): ...
class Engine:
    """Its docstring says unused(), which is no use."""
    def called(self): ...
    def never(self): ...
    def set_input_tensor(self): ...
    def _private(self): ...
used(); Engine().called(); TABLE = {"a": "launch.a:in_a_table"}
'''
    assert used_by_tests_alone([SourceFile("launch/a.py", text)], "launch.a:in_a_script") == [
        "launch/a.py:5 imported_only",
        "launch/a.py:12 never",
    ]

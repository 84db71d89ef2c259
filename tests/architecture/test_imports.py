"""Imports go down only, each third-party engine lives in one room, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.architecture.source_tree import ROOT, SourceFile, read_sources

ROOMS = {
    "ray": ("launch/on_ray/", "data_pipelines/"),
    "megatron": ("llmtrain/engines/megatron_engine/", "llmtrain/parallel/"),
    "deepspeed": ("llmtrain/engines/deepspeed_engine/",),
    "wandb": ("llmtrain/observe/wandb_tracker.py",),
    "webdataset": ("llmtrain/data/", "data_pipelines/"),
    "transformers": ("llmtrain/interop/",),
    "jinja2": ("llmtrain/data/",),
    "torchao": ("llmtrain/models/float8.py",),
    "llguidance": ("llmtrain/infer/guides.py",),
    "xllamacpp": ("llmtrain/interop/gguf/judge.py",),
    "onnx": ("llmtrain/interop/onnx_folder/",),
    "onnxscript": ("llmtrain/interop/onnx_folder/",),
    "onnxruntime": ("llmtrain/interop/onnx_folder/",),
    "lm_eval": ("llmtrain/infer/evaluation/harness.py",),
    "ftfy": ("data_pipelines/steps/normalization.py",),
    "resiliparse": ("data_pipelines/",),
    "trafilatura": ("data_pipelines/steps/main_text.py",),
    "py3langid": ("data_pipelines/steps/language.py",),
    "phonenumbers": ("data_pipelines/steps/phones.py",),
}
"""Where a guest may be imported: a file, or a folder with everything below it."""

APART = (
    ("llmtrain/train/", "llmtrain.infer"),
    ("llmtrain/preflight/", "llmtrain.infer"),
    ("data_pipelines/", "llmtrain.train"),
)
"""Files, and a room that they could import as the layers lie, and do not: a change of it must not touch them."""

NOT_IN_COMMANDS = ("torch", "numpy", "safetensors", "ruamel", "hashlib", "shutil", "tempfile", "socket", "subprocess")
"""What works on weights, files or machines does not lie in the command, which reads options and prints."""

UNCHECKED_COPY = "model_copy"
"""pydantic's own way to change a copy checks nothing: a misspelt key or a wrong type goes on. `with_keys` does."""

PURE = (
    *("llmtrain/config/", "llmtrain/runs/", "llmtrain/plan/", "llmtrain/preflight/"),
    *("llmtrain/parallel/layout.py", "llmtrain/files.py", "llmtrain/errors.py", "llmtrain/words.py"),
)
"""What the command reads before any device is thought of, and what only computes."""

HEAVY = ("torch", "ray", "megatron", "deepspeed", "transformers", "wandb")


def within(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def guests_out_of_their_room(sources: list[SourceFile]) -> list[str]:
    return [
        f"{source.path}:{line} imports {name}, which belongs in {', '.join(ROOMS[guest])}"
        for source in sources
        for line, name in source.imported_modules()
        if (guest := name.split(".")[0]) in ROOMS and not within(source.path, ROOMS[guest])
    ]


def imports_across(sources: list[SourceFile]) -> list[str]:
    return [
        f"{source.path}:{line} imports {name}"
        for source in sources
        for place, room in APART
        if source.path.startswith(place)
        for line, name in source.imported_modules()
        if name == room or name.startswith(f"{room}.")
    ]


def business_in_commands(sources: list[SourceFile]) -> list[str]:
    return [
        f"{source.path}:{line} imports {name}"
        for source in sources
        if source.path.startswith("llmtrain/cli/")
        for line, name in source.imported_modules()
        if name.split(".")[0] in NOT_IN_COMMANDS
    ]


def unchecked_copies(sources: list[SourceFile]) -> list[str]:
    return [
        f"{source.path}:{node.lineno} calls {UNCHECKED_COPY}: use with_keys"
        for source in sources
        for node in ast.walk(source.parsed())
        if isinstance(node, ast.Attribute) and node.attr == UNCHECKED_COPY
    ]


def heavy_imports_in_pure_modules(sources: list[SourceFile]) -> list[str]:
    return [
        f"{source.path}:{line} imports {name}"
        for source in sources
        if within(source.path, PURE)
        for line, name in source.imported_modules()
        if name.split(".")[0] in HEAVY
    ]


def heavy_modules_after_importing(modules: list[str]) -> set[str]:
    """The heavy packages that a fresh interpreter holds once it has imported the modules."""
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return {name for name in done.stdout.split() if name in HEAVY}


def run_import_linter(folder: Path, config: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--config", str(config)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def module_name(source: SourceFile) -> str:
    return source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_imports_go_down_only() -> None:
    done = run_import_linter(ROOT, ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout


def test_an_import_that_goes_up_is_caught(tmp_path: Path) -> None:
    for name, text in (("__init__", ""), ("upper", ""), ("lower", "def f():\n    import house.upper\n")):
        (tmp_path / "house").mkdir(exist_ok=True)
        (tmp_path / "house" / f"{name}.py").write_text(text)
    config = tmp_path / "contract.toml"
    config.write_text(
        '[tool.importlinter]\nroot_packages = ["house"]\n[[tool.importlinter.contracts]]\n'
        'name = "down"\ntype = "layers"\nlayers = ["house.upper", "house.lower"]\n'
    )
    done = run_import_linter(tmp_path, config)
    assert done.returncode == 1
    assert "house.lower is not allowed to import house.upper" in done.stdout


def test_one_guest_one_room() -> None:
    assert guests_out_of_their_room(read_sources()) == []


def test_a_guest_out_of_its_room_is_caught() -> None:
    bad = [
        SourceFile("llmtrain/data/a.py", "def f():\n    import wandb.sdk\n"),
        SourceFile("launch/on_ray_too.py", "from ray.util import x\n"),
        SourceFile("launch/late.py", "import importlib\nimportlib.import_module('megatron.core')\n"),
    ]
    good = [
        SourceFile("llmtrain/observe/wandb_tracker.py", "import wandb\n"),
        SourceFile("data_pipelines/a.py", "import ray.data\nimport webdataset\n"),
        SourceFile("llmtrain/engines/megatron_engine/a.py", "import megatron.core\nfrom .wandb import x\n"),
    ]
    assert [line.split(",")[0] for line in guests_out_of_their_room(bad + good)] == [
        "llmtrain/data/a.py:2 imports wandb.sdk",
        "launch/on_ray_too.py:1 imports ray.util",
        "launch/late.py:2 imports megatron.core",
    ]


def test_rooms_that_stay_apart() -> None:
    assert imports_across(read_sources()) == []


def test_an_import_across_is_caught() -> None:
    bad = [
        SourceFile("llmtrain/train/a.py", "def f():\n    from llmtrain.infer.model import x\n"),
        SourceFile("data_pipelines/a.py", "import llmtrain.train\n"),
        SourceFile("llmtrain/cli/a.py", "import llmtrain.infer.model\nimport llmtrain.train.setup\n"),
    ]
    assert imports_across(bad) == [
        "llmtrain/train/a.py:2 imports llmtrain.infer.model",
        "data_pipelines/a.py:1 imports llmtrain.train",
    ]


def test_no_business_in_commands() -> None:
    assert business_in_commands(read_sources()) == []


def test_business_in_a_command_is_caught() -> None:
    bad = SourceFile("llmtrain/cli/a.py", "def f():\n    import torch.cuda\n    from shutil import rmtree\n")
    good = SourceFile("llmtrain/infer/a.py", "import torch\n")
    assert business_in_commands([bad, good]) == [
        "llmtrain/cli/a.py:2 imports torch.cuda",
        "llmtrain/cli/a.py:3 imports shutil",
    ]


def test_configurations_are_changed_with_checks_only() -> None:
    assert unchecked_copies(read_sources(packages=("llmtrain", "launch", "data_pipelines", "tests"))) == []


def test_an_unchecked_copy_is_caught() -> None:
    bad = SourceFile("launch/a.py", "def f(c):\n    return c.launch.model_copy(update={'num_worker': 1})\n")
    assert unchecked_copies([bad]) == ["launch/a.py:2 calls model_copy: use with_keys"]


def test_pure_modules_name_nothing_heavy() -> None:
    assert heavy_imports_in_pure_modules(read_sources()) == []


def test_a_heavy_import_in_a_pure_module_is_caught() -> None:
    bad = SourceFile("llmtrain/config/a.py", "from torch import nn\n")
    good = SourceFile("llmtrain/models/a.py", "import torch\n")
    assert heavy_imports_in_pure_modules([bad, good]) == ["llmtrain/config/a.py:1 imports torch"]


def test_pure_modules_bring_in_nothing_heavy_by_others() -> None:
    pure = [module_name(source) for source in read_sources() if within(source.path, PURE)]
    assert "llmtrain.config.reading.load" in pure
    checks = ["llmtrain.cli", "llmtrain.preflight.storage", "llmtrain.preflight.dry_run"]
    assert heavy_modules_after_importing(pure + checks) == set()


def test_a_run_waits_for_no_library_that_it_does_not_use() -> None:
    assert heavy_modules_after_importing(["launch.rank.worker", "llmtrain.engines.torch_engine"]) == {"torch"}


def test_a_heavy_module_brought_in_by_others_is_caught() -> None:
    assert heavy_modules_after_importing(["llmtrain.values.batch"]) == {"torch"}

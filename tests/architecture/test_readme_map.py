"""The README's file map has a line for every room of the house, and for none that is gone."""

import re
import subprocess
from pathlib import Path

from tests.architecture.source_tree import ROOT

MAP_BLOCK = re.compile(r"^## Where things are\n+```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAP_LINE = re.compile(r"( *)(\S+) {2,}\S")


def tracked_folders(root: Path) -> set[str]:
    """Top-level folders and the packages of llmtrain/ that hold tracked files, each with a slash at its end."""
    done = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    folders = set()
    for path in done.stdout.splitlines():
        parts = path.split("/")
        if len(parts) > 1 and not parts[0].startswith("."):
            folders.add(f"{parts[0]}/")
        if len(parts) > 2 and parts[0] == "llmtrain":
            folders.add(f"llmtrain/{parts[1]}/")
    return folders


def mapped_paths(readme: str) -> set[str]:
    """The paths that the map explains: a tree whose levels are indented by two spaces."""
    block = MAP_BLOCK.search(readme)
    paths: set[str] = set()
    above: list[str] = []
    for line in block.group(1).splitlines() if block else ():
        match = MAP_LINE.match(line)
        if match is not None:
            above = [*above[: len(match.group(1)) // 2], match.group(2)]
            paths.add("".join(above))
    return paths


def map_faults(readme: str, folders: set[str], root: Path) -> list[str]:
    named = mapped_paths(readme)
    missing = [f"no line for {folder}" for folder in sorted(folders - named)]
    return missing + [f"{path} does not exist" for path in sorted(named) if not (root / path).exists()]


def test_readme_maps_every_room() -> None:
    assert map_faults((ROOT / "README.md").read_text(encoding="utf-8"), tracked_folders(ROOT), ROOT) == []


def test_missing_and_stale_lines_are_caught(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, timeout=60, check=True)
    for path in ("llmtrain/config/a.py", "launch/a.py", "llmtrain/errors.py", ".ci/run"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, timeout=60, check=True)
    folders = tracked_folders(tmp_path)
    assert folders == {"llmtrain/", "llmtrain/config/", "launch/"}
    readme = (
        "## Where things are\n\n```text\nllmtrain/      the library\n  config/      keys\n  errors.py    faults\n"
        "gone/          -\nlaunch/\n```\n"
    )
    assert map_faults(readme, folders, tmp_path) == ["no line for launch/", "gone/ does not exist"]
    assert "no line for llmtrain/" in map_faults("# A page without a map\n", folders, tmp_path)

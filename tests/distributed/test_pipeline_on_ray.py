"""A pipeline as tasks of a Ray cluster: the same bytes as in one process, also where a node dies on the way."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.collections import run_quietly, tree_hash, write_collection, write_pipeline
from tests.support.command import COMMAND, llmtrain, wait_until
from tests.support.ray_cluster import ray_head


def test_a_node_that_dies_changes_nothing(tmp_path: Path) -> None:
    write_collection(tmp_path, 60)
    expected = tree_hash(run_quietly(write_pipeline(tmp_path, output_dir=str(tmp_path / "whole"))))
    write_pipeline(tmp_path)
    done = tmp_path / "out" / "corpus" / "done"
    with ray_head(num_cpus=1, is_outward=True) as head:
        node = head.add_node(1)
        line = [COMMAND, "data", "run", "pipeline.yaml", "run.backend=ray", f"run.address={head.address}"]
        with (tmp_path / "output.txt").open("w") as output:
            command = subprocess.Popen(line, cwd=tmp_path, env=head.environ, stdout=output, stderr=output, text=True)
        wait_until(lambda: done.is_dir() and len(list(done.iterdir())) >= 4, command)
        head.end_node(node, signal.SIGKILL)
        assert command.wait(timeout=300) == 0, (tmp_path / "output.txt").read_text()
    assert tree_hash(tmp_path / "out" / "corpus") == expected


@pytest.mark.whole_grid
def test_a_ray_of_its_own_gives_the_same(tmp_path: Path) -> None:
    write_collection(tmp_path)
    expected = tree_hash(run_quietly(write_pipeline(tmp_path, output_dir=str(tmp_path / "whole"))))
    write_pipeline(tmp_path)
    ended = llmtrain("data", "run", "pipeline.yaml", "run.backend=ray", "run.workers=2", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert tree_hash(tmp_path / "out" / "corpus") == expected


def test_a_cluster_that_is_not_there_is_named_by_the_key(tmp_path: Path) -> None:
    write_collection(tmp_path, 4)
    write_pipeline(tmp_path)
    ended = llmtrain("data", "run", "pipeline.yaml", "run.backend=ray", "run.address=127.0.0.1:9", folder=tmp_path)
    assert ended.returncode == 1
    assert "run.address = 127.0.0.1:9: no Ray head answers there" in ended.stderr and "Traceback" not in ended.stderr

"""Nobody else gets into the folder of a Ray that a run has started, where its token lies; and what that Ray is."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.run_files import write_good_run

SCRIPT = """
import os, stat
from pathlib import Path
import psutil
from launch.on_ray.cluster import ray_cluster
from llmtrain.config.reading.load import load_config

config = load_config(Path("run.yaml")).config
with ray_cluster(config.launch) as cluster:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.read_text() == cluster.token
    for path in (token, *token.parents):
        found = path.stat()
        print(path, oct(stat.S_IMODE(found.st_mode)), found.st_uid)
    for process in psutil.Process().children(recursive=True):
        print("started:", *process.cmdline())
"""


@pytest.mark.timeout(180)
def test_its_folder_is_its_owners_alone_and_nothing_needless_is_started(tmp_path: Path) -> None:
    write_good_run(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    # Ray writes lines of its own.
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("/") and len(line.split()) == 3]
    modes = {Path(path): int(mode, 8) for path, mode, _ in found}
    token = Path(found[0][0])
    assert modes[token] & 0o077 == 0, "read by its owner only"
    assert modes[token.parent] & 0o077 == 0, "Ray has opened its own folder only"
    writable = [path for path in token.parent.parents if modes[path] & 0o022 and not modes[path] & 0o1000]
    assert not writable, "a folder above it in which others can rename has the sticky bit"

    started = [line for line in done.stdout.splitlines() if line.startswith("started:")]
    assert any("/raylet" in line for line in started)
    needless = ("/monitor.py", "/log_monitor.py", "/dashboard.py")
    assert not [line for line in started if any(name in line for name in needless)]

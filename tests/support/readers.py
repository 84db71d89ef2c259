"""Programs that read exports, each installed into a folder of its own beside the project's packages: `make readers`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

READERS = Path(sys.prefix, "readers")
_SCRIPT = Path(__file__).with_name("read_export.py")
_PATHS = {
    "transformers 4": ("transformers",),
    "transformers 5": (),
    "ctranslate2": ("ctranslate2", "transformers"),
    "llama_cpp": ("llama_cpp",),
}


def require_reader(name: str) -> None:
    """Skip a test where a reader is not installed."""
    folders = [*_PATHS[name], *["llama.cpp"] * (name == "llama_cpp")]
    if missing := [folder for folder in folders if not (READERS / folder / ".installed").is_file()]:
        pytest.skip(
            f"{name} is not installed ({', '.join(missing)} in {READERS}): make readers, which needs a compiler"
        )


TORCHAO = READERS / "torchao"


def require_torchao() -> None:
    """Skip a test where torchao is not installed."""
    if not (TORCHAO / ".installed").is_file():
        pytest.skip(f"torchao is not installed in {TORCHAO}: make readers")


def use_torchao() -> None:
    """Let this process import torchao. For ranks alone: whatever imports transformers would import it, too."""
    sys.path.append(str(TORCHAO))


DATASKETCH = READERS / "datasketch"


def use_datasketch() -> None:
    """Let this process import datasketch, behind everything else that it imports."""
    if str(DATASKETCH) not in sys.path:
        sys.path.append(str(DATASKETCH))


DATATROVE = READERS / "datatrove"


def require_datatrove() -> None:
    """Skip a test where datatrove is not installed; else let this process import it."""
    if not (DATATROVE / ".installed").is_file():
        pytest.skip(f"datatrove is not installed in {DATATROVE}: make readers")
    use_datatrove()


def use_datatrove() -> None:
    """Let this process import datatrove, behind everything else that it imports."""
    if str(DATATROVE) not in sys.path:
        sys.path.append(str(DATATROVE))


ONNX = READERS / "onnx"


def require_onnx() -> None:
    """Skip a test where the packages of the extra `onnx` are not installed; else let this process import them."""
    if not (ONNX / ".installed").is_file():
        pytest.skip(f"onnxruntime is not installed in {ONNX}: make readers")
    use_onnx()


def use_onnx() -> None:
    """Let this process import onnx, onnxscript and onnxruntime, behind everything else that it imports."""
    if str(ONNX) not in sys.path:
        sys.path.append(str(ONNX))


def read_by(name: str, folders: Sequence[Path], job: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """What a reader makes of each folder: one process reads all."""
    require_reader(name)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(READERS / folder) for folder in _PATHS[name]),
        "CONVERTER": str(READERS / "llama.cpp" / "convert_hf_to_gguf.py"),
        "HF_HUB_OFFLINE": "1",
    }
    # -P: modules beside the script are not those of the same name that a reader imports.
    done = subprocess.run(
        [sys.executable, "-P", str(_SCRIPT), name.split(" ")[0]],
        input=json.dumps({**job, "folders": [str(folder) for folder in folders]}),
        capture_output=True, text=True, env=environment, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {Path(folder): answer for folder, answer in json.loads(done.stdout.splitlines()[-1]).items()}


GGUF = READERS / "gguf"


def use_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process and those that it starts import what the extra gguf brings. Skips where it is not installed."""
    if not (GGUF / ".installed").is_file():
        pytest.skip(f"xllamacpp and gguf are not installed in {GGUF}: make readers")
    monkeypatch.syspath_prepend(GGUF)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(GGUF), os.environ.get("PYTHONPATH")))))


PEFT = READERS / "peft"
_JUDGE = Path(__file__).with_name("peft_judge.py")


def judged_by_peft(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """What PEFT finds wrong with tasks of peft_judge.py, all in one process: "" where it is nothing. Skips where it is
    not installed."""
    if not (PEFT / ".installed").is_file():
        pytest.skip(f"peft is not installed in {PEFT}: make readers")
    done = subprocess.run(
        [sys.executable, "-P", str(_JUDGE)], input=json.dumps(tasks), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(PEFT), "HF_HUB_OFFLINE": "1"}, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


ADAPTERS = READERS / "adapters"
_ADAPTERHUB = Path(__file__).with_name("adapterhub_judge.py")


def judged_by_adapterhub(tasks: Sequence[dict[str, str]]) -> None:
    """Let the library `adapters`, which needs transformers 4, compute what tasks of adapterhub_judge.py ask for, all in
    one process. Skips where one of them is not installed."""
    require_reader("transformers 4")
    if not (ADAPTERS / ".installed").is_file():
        pytest.skip(f"adapters is not installed in {ADAPTERS}: make readers")
    path = os.pathsep.join(map(str, (ADAPTERS, READERS / "transformers")))
    done = subprocess.run(
        [sys.executable, "-P", str(_ADAPTERHUB)], input=json.dumps(tasks), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


COMPRESSED_TENSORS = READERS / "compressed_tensors"


def use_compressed_tensors() -> None:
    """Let this process, and those that it starts, import compressed-tensors. Skips a test where it is not installed."""
    if not (COMPRESSED_TENSORS / ".installed").is_file():
        pytest.skip(f"compressed-tensors is not installed in {COMPRESSED_TENSORS}: make readers")
    if str(COMPRESSED_TENSORS) not in sys.path:
        sys.path.append(str(COMPRESSED_TENSORS))


LM_EVAL = READERS / "lm_eval"
_LM_EVAL_JUDGE = Path(__file__).with_name("lm_eval_judge.py")


def lm_eval_environment() -> dict[str, str]:
    """The environment of a process that may import lm-eval. Skips a test where it is not installed."""
    if not (LM_EVAL / ".installed").is_file():
        pytest.skip(f"lm-eval is not installed in {LM_EVAL}: make readers")
    return {**os.environ, "PYTHONPATH": str(LM_EVAL), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def judged_by_lm_eval(folder: Path, include: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """What lm-eval's adapter for Hugging Face makes of a folder: `metrics` by task, and what the model `said`."""
    job = {"folder": str(folder), "include": str(include), "tasks": list(tasks)}
    done = subprocess.run(
        [sys.executable, "-P", str(_LM_EVAL_JUDGE)], input=json.dumps(job), capture_output=True, text=True,
        env=lm_eval_environment(), timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

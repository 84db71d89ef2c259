"""Checks that transformers and ONNX can be imported in this environment, and finds the package that breaks it.

transformers imports other packages when they are installed, whether they are needed or not. A torchvision built for
another PyTorch then breaks the import of every model, with an error that names the model.
"""

import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from traceback import extract_tb

from llmtrain.errors import ConfigError, InstallationError

CONFIGURATIONS = ("transformers.models.llama.configuration_llama",)
MODELS = ("transformers.modeling_utils", *CONFIGURATIONS)
"""Modules that everything of transformers imports as well. Its models bring in another second of imports."""


_OWN = ("llmtrain", "launch", "data_pipelines", "tests")


def require_transformers(needed: Sequence[str] = MODELS) -> None:
    """Raise InstallationError where transformers cannot be imported, with the package to mend."""
    try:
        for module in needed:
            import_module(module)
    except Exception as error:  # extensions that do not fit fail in many ways
        package = broken_package(error) or "transformers"
        advice = f"Install the {package} that belongs to this torch"
        if package not in ("transformers", "tokenizers", "torch", "safetensors", "numpy"):
            advice += f", or remove it, for llmtrain does not need it: {sys.executable} -m pip uninstall {package}"
        raise InstallationError(
            f"transformers cannot be imported, because {package} {_version(package)} fails beside torch "
            f"{_version('torch')}: {root_of(error)}. {advice}."
        ) from error


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise ConfigError that names the packages that cannot be imported."""
    missing = dict[str, str]()
    for package in ONNX_PACKAGES:
        try:
            import_module(package)
        except ImportError as error:
            missing[package] = str(error)
    if missing:
        raise ConfigError(
            f"--to onnx: needs {', '.join(missing)}, which cannot be imported ({next(iter(missing.values()))}). Run "
            "pip install 'llmtrain[onnx]', or try --to torch-export, which needs nothing more."
        )


def root_of(error: BaseException) -> str:
    """The first of a chain of errors, in words."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def broken_package(error: BaseException) -> str | None:
    """The package whose code led to the first of a chain of errors; None where it is nobody's.

    PyTorch is named where nobody else called it: what was built for another one fails inside of it.
    """
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    found = [package for frame in extract_tb(error.__traceback__) if (package := _package_of(frame.filename))]
    return next((package for package in reversed(found) if package != "torch"), found[-1] if found else None)


def _package_of(filename: str) -> str | None:
    """The top package of a source file, where it is an installed one."""
    path = Path(filename)
    places = [place for place in map(Path, filter(None, sys.path)) if path.is_relative_to(place)]
    if not places:
        return None
    package = path.relative_to(max(places, key=lambda place: len(place.parts))).parts[0].removesuffix(".py")
    return None if package in sys.stdlib_module_names or package in _OWN else package


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(of unknown version)"

"""The data sets of a run that needs more of a document than its tokens: all have it, and mean the same by it."""

from collections.abc import Iterator, Sequence

from llmtrain.config.data import DataConfig
from llmtrain.data.storage.manifest import Manifest
from llmtrain.errors import DataError

WANTED = {"chat": "trained", "labels": "labels"}
"""The second member that an objective needs, by its name. Others read none."""

WRITTEN_BY = {"trained": "llmtrain data chat", "labels": "llmtrain data labels"}


def target_faults(manifests: Sequence[Manifest], names: Sequence[str], data: DataConfig) -> Iterator[tuple[int, str]]:
    """What is wrong with data sets for a run's objective: the number of each such, and why. The first sets the rest."""
    wanted = WANTED.get(data.objective)
    if wanted is None:
        return
    fitting = [number for number, manifest in enumerate(manifests) if manifest.targets == wanted]
    for number, manifest in enumerate(manifests):
        if number not in fitting:
            yield (
                number,
                (
                    f"has no {wanted} members, which data.objective = {data.objective} needs. Write it with "
                    f"`{WRITTEN_BY[wanted]}`, or set another objective."
                ),
            )
        elif (fault := _difference(manifests[fitting[0]], manifest)) is not None:
            yield number, f"{fault} than {names[fitting[0]]}. Write both alike."


def _difference(first: Manifest, other: Manifest) -> str | None:
    if first.chat is not None and other.chat is not None:
        if first.chat.template_sha256 != other.chat.template_sha256:
            return f"has another chat template (sha256 {other.chat.template_sha256[:12]})"
        if first.chat.end_ids != other.chat.end_ids:
            return f"ends turns with other tokens ({list(other.chat.end_ids)})"
    if first.labels is None or other.labels is None:
        return None
    differences = first.labels.differences(other.labels)
    return f"has other labels ({differences[0]})" if differences else None


def require_targets(manifests: Sequence[Manifest], names: Sequence[str], data: DataConfig) -> None:
    """Raise DataError where a data set does not fit the objective."""
    for number, fault in target_faults(manifests, names, data):
        raise DataError(f"{names[number]}: {fault}")

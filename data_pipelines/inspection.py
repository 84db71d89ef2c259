"""Looking at a data set: checked completely, counted, and as text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipelines.foreign_shards import megatron_files
from data_pipelines.indexing import has_manifest, scan_documents, target_problems, token_problems
from data_pipelines.sharding import SPLITS
from llmtrain.data.packing import PackingPlan
from llmtrain.data.packing_table import Packing
from llmtrain.data.storage.folders import find_tokenizer
from llmtrain.data.storage.manifest import (
    DTYPES,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    check_file,
    file_sha256,
    read_index,
    read_manifest,
)
from llmtrain.data.storage.remote import scheme_of
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.storage.targets import Targets
from llmtrain.data.stream import DataUse, Sample, data_use
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.errors import ConfigError, DataError
from llmtrain.values.tokenizer import Tokenizer


def datasets_in(folder: Path) -> list[Path]:
    """The data sets that a folder means: itself, or the splits that `llmtrain data shards` wrote into it.

    Raises ConfigError for a URL, and where the folder does not exist or holds neither a manifest nor a shard.
    """
    if (scheme := scheme_of(str(folder))) is not None:
        raise ConfigError(
            f"{scheme}: this command reads folders on a file system, and no URLs. Copy the data set here first; "
            "`llmtrain train` reads it where it is."
        )
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Name one written by `llmtrain data shards`.")
    splits = [folder / name for name in SPLITS if (folder / name).is_dir()]
    found = splits if splits and not has_manifest(folder) else [folder]
    if not any(has_manifest(dataset) or any(dataset.glob("*.tar")) or megatron_files(dataset) for dataset in found):
        near = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{MANIFEST_NAME}"))
        advice = f"Try {near[0]}." if near else "Name one written by `llmtrain data shards`."
        if any(folder.glob("*.mds*")):
            advice = "Its .mds files are MosaicML's, which are not read. Write their ids as .npy members of tars."
        raise ConfigError(f"{folder}: is not a data set: it holds neither a {MANIFEST_NAME} nor a .tar file. {advice}")
    return found


def verify_dataset(folder: Path) -> list[str]:
    """Everything that is wrong with a data set, one line each; empty where nothing is."""
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems = list[str]()
    for number, entry in enumerate(manifest.shards):
        found = list(_shard_problems(folder, manifest, entry))
        problems += found or target_problems(folder, manifest, number)
    problems += _stray_files(folder, manifest)
    problems += _tokenizer_problems(folder, manifest)
    return problems


def _shard_problems(folder: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    path, index_path = folder / entry.file, folder / entry.index_file
    checks = ((path, entry.bytes, entry.sha256), (index_path, None, entry.index_sha256))
    for file, size_bytes, sha256 in checks:
        try:
            check_file(file, size_bytes, sha256)
        except DataError as error:
            yield str(error)
    if not path.is_file():
        return
    try:
        payloads = scan_documents(path, manifest, entry)
    except DataError as error:
        yield str(error)
        return
    if index_path.is_file():
        try:
            if not np.array_equal(read_index(index_path), payloads):
                yield f"{index_path}: its places are not those of {entry.file}. Run `llmtrain data index {folder}`."
        except DataError as error:
            yield str(error)
    dtype = DTYPES[manifest.dtype]
    tokens = int(payloads[:, 1].sum()) // dtype.itemsize
    if (len(payloads), tokens) != (entry.samples, entry.tokens):
        yield (
            f"{path}: expected {entry.samples} documents with {entry.tokens} tokens, "
            f"actual {len(payloads)} with {tokens}. Copy the file again."
        )
    yield from token_problems(path, payloads, dtype, manifest.vocab_size)


def _stray_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = {entry.file for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path}: the manifest does not name it, so nothing reads it. Delete it, or index the folder again."


def _tokenizer_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        path = find_tokenizer(folder, manifest.tokenizer_sha256)
    except ConfigError:
        return  # data sets may be kept without a copy of their tokenizer
    except DataError as error:
        yield str(error)
        return
    settings = path.parent / SETTINGS_NAME
    if manifest.settings_sha256 and not settings.is_file():
        yield f"{settings}: missing, but {folder}/manifest.json says that it lies beside the tokenizer. Copy it again."
    elif manifest.settings_sha256 and (actual := file_sha256(settings)) != manifest.settings_sha256:
        yield f"{settings}: expected sha256 {manifest.settings_sha256} as in {folder}/manifest.json, actual {actual}."


QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class DatasetSummary:
    """Counts of one data set. `length_quantiles` maps a quantile to tokens per document, its end left out."""

    path: str
    shards: int
    documents: int
    tokens: int
    size_bytes: int
    vocab_size: int
    dtype: str
    tokenizer_sha256: str
    eos_id: int
    bos_ids: tuple[int, ...]
    lossy: bool
    targets: Targets
    targets_text: str
    """What the second members say, in words; empty where documents have none."""
    mean_length: float
    length_quantiles: dict[str, int]
    seq_len: int
    samples: int
    unused_tokens: int
    per_shard: DataUse
    """The same where every sample lies in one shard; the two counts before it are of samples that cross their ends."""
    best_fit: DataUse
    """The same where samples are put together of whole documents."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def summarize(folder: Path, seq_len: int) -> DatasetSummary:
    """Summarize a data set, with the number of samples of `seq_len` tokens. Raises DataError where it is damaged."""
    manifest = read_manifest(folder)
    shards = range(len(manifest.shards))
    counts = [ShardFile(folder, manifest, number, hashed=False).lengths for number in shards]
    lengths = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    use = data_use(manifest, seq_len, "continuous")
    packing = Packing(seq_len, tuple(PackingPlan.of(count, seq_len).summary for count in counts))
    quantiles = np.quantile(lengths, QUANTILES, method="nearest") if lengths.size else np.zeros(len(QUANTILES))
    return DatasetSummary(
        path=str(folder),
        shards=len(manifest.shards),
        documents=manifest.num_documents,
        tokens=manifest.num_tokens,
        size_bytes=sum(entry.bytes for entry in manifest.shards),
        vocab_size=manifest.vocab_size,
        dtype=manifest.dtype,
        tokenizer_sha256=manifest.tokenizer_sha256,
        eos_id=manifest.eos_id,
        bos_ids=manifest.bos_ids,
        lossy=manifest.lossy,
        targets=manifest.targets,
        targets_text=_targets_text(manifest),
        mean_length=float(lengths.mean()) if lengths.size else 0.0,
        length_quantiles={str(q): int(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        seq_len=seq_len,
        samples=int(use.samples),
        unused_tokens=use.unused_tokens,
        per_shard=data_use(manifest, seq_len, "per_shard"),
        best_fit=data_use(manifest, seq_len, "continuous", packing),
    )


def _targets_text(manifest: Manifest) -> str:
    if manifest.chat is not None:
        counts = ", ".join(f"{count:,} of {role}" for role, count in manifest.chat.trained_tokens.items())
        return f"trained tokens: {counts}; template {manifest.chat.template_sha256[:12]}"
    if manifest.labels is not None:
        return f"labels of {manifest.labels.task}: {', '.join(manifest.labels.names) or 'bounds of answers'}"
    return ""


def document_texts(sample: Sample, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """A sample's text, cut at document boundaries: for each part whether its document begins there, and the text."""
    bounds = sorted({0, *sample.document_starts.tolist(), len(sample.tokens)})
    starts = set(sample.document_starts.tolist())
    return [(begin in starts, tokenizer.decode(sample.tokens[begin:end].tolist())) for begin, end in pairwise(bounds)]

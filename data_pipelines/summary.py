"""What a data set holds, in numbers and as text."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from llmtrain.data.storage.manifest import Manifest, read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.stream import Sample
from llmtrain.data.usage import DataUse, data_use
from llmtrain.values.tokenizer import Tokenizer

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
    mean_length: float
    length_quantiles: dict[str, int]
    seq_len: int
    samples: int
    unused_tokens: int
    per_shard: DataUse
    """The same where every sample lies in one shard; the two counts before it are of samples that cross their ends."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def summarize(folder: Path, seq_len: int) -> DatasetSummary:
    """Summarize a data set, with the number of samples of `seq_len` tokens. Raises DataError where it is damaged."""
    manifest = read_manifest(folder)
    lengths = _document_lengths(folder, manifest)
    use = data_use(manifest, seq_len, "continuous")
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
        mean_length=float(lengths.mean()) if lengths.size else 0.0,
        length_quantiles={str(q): int(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        seq_len=seq_len,
        samples=int(use.samples),
        unused_tokens=use.unused_tokens,
        per_shard=data_use(manifest, seq_len, "per_shard"),
    )


def _document_lengths(folder: Path, manifest: Manifest) -> np.ndarray:
    shards = range(len(manifest.shards))
    lengths = [ShardFile(folder, manifest, number, hashed=False).lengths for number in shards]
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)


def document_texts(sample: Sample, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """A sample's text, cut at document boundaries: for each part whether its document begins there, and the text."""
    bounds = sorted({0, *sample.document_starts.tolist(), len(sample.tokens)})
    starts = set(sample.document_starts.tolist())
    return [(begin in starts, tokenizer.decode(sample.tokens[begin:end].tolist())) for begin, end in pairwise(bounds)]

"""How much of a data set samples of one length make use of. Pure arithmetic on manifests."""

from dataclasses import dataclass

from llmtrain.config.schema import WindowKind
from llmtrain.data.storage.manifest import Manifest


@dataclass(frozen=True)
class DataUse:
    """Of one data set: `tokens`, ends of sequence included, samples of one epoch, and what no epoch ever shows.

    `unused_tokens` lie at the ends of shards, or in data too short for one sample. Epochs of continuous windows end
    inside of samples.
    """

    tokens: int
    samples: float
    unused_tokens: int

    @property
    def unused_text(self) -> str:
        """`no token is left out`, or how many are."""
        if not self.unused_tokens:
            return "no token is left out"
        share = self.unused_tokens / self.tokens
        return f"{self.unused_tokens:,} of {self.tokens:,} tokens ({share:.1%}) are in no sample"


def data_use(manifest: Manifest, seq_len: int, windows: WindowKind) -> DataUse:
    """What samples of `seq_len` tokens make of a data set."""
    tokens = manifest.stream_tokens
    if windows == "continuous":
        return DataUse(tokens, tokens / seq_len, 0) if tokens > seq_len else DataUse(tokens, 0, tokens)
    counts = [shard.num_windows(seq_len) for shard in manifest.shards]
    used = sum(count * seq_len + 1 for count in counts if count)
    return DataUse(tokens, sum(counts), tokens - used)


def samples_once(manifest: Manifest, seq_len: int, windows: WindowKind) -> int:
    """How many whole samples a data set holds that is read through once, as an evaluation does."""
    if windows == "continuous":
        return max(0, manifest.stream_tokens - 1) // seq_len
    return sum(shard.num_windows(seq_len) for shard in manifest.shards)

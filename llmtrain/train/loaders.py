"""The micro-batches of a rank, for training and for evaluation."""

from typing import Literal

from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.row_config import build_recipe
from llmtrain.preflight.resolve import ResolvedRun


def build_loader(
    resolved: ResolvedRun, split: Literal["train", "valid"], rank: int = 0, once: bool = False
) -> BatchLoader:
    """The micro-batches of a rank: those of its place on the data axis. With `once`, data that ends is followed by
    samples without targets."""
    config, layout = resolved.config, resolved.layout
    sources, manifests = {
        "train": (config.data.train, resolved.train),
        "valid": (config.data.valid, resolved.valid),
    }[split]
    stream = build_stream(sources, config.data, config.seed, resolved.run_dir, once, manifests)
    recipe = build_recipe(config, stream, lambda: resolved.tokenizer)
    sizes = (config.train.global_batch_size, config.train.micro_batch_size)
    return BatchLoader(stream, recipe, *sizes, layout.coordinates(rank).data, layout.data)

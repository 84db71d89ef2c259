"""Micro-batches for comparing layouts: random tokens in the shapes that a run's objective gives its batches."""

import torch
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import sample_lengths
from llmtrain.values.batch import IGNORED_LABEL, PADDING, Batch
from llmtrain.values.keyed_hash import derived_key


def probe_batches(config: RunConfig, step: int, first: int, stride: int) -> list[Batch]:
    """Micro-batches first, first + stride, ... of a step: random tokens, a different number of targets in each."""
    numbers = range(first, config.train.global_batch_size // config.train.micro_batch_size, stride)
    return [probe_batch(config, step, number) for number in numbers]


def probe_batch(config: RunConfig, step: int, number: int) -> Batch:
    """Micro-batch `number` of a step. An encoder-decoder's inputs end in padding, of a different length in each."""
    generator = torch.Generator().manual_seed(derived_key("probe", config.seed, step, number) & (2**63 - 1))
    lengths, size = sample_lengths(config.model.family, config.data), config.train.micro_batch_size
    seq_len = lengths.main

    def tokens(length: int) -> Tensor:
        return torch.randint(0, config.model.vocabulary, (size, length), generator=generator)

    whole = tokens(seq_len + 1)
    labels = whole[:, 1:].clone()
    labels[:, : number * 3 % (seq_len // 2)] = IGNORED_LABEL
    positions = torch.arange(seq_len).expand(size, seq_len)
    segments, prefix, encoder_tokens, encoder_segments = None, None, None, None
    if config.data.parts_attention:
        segments = (positions >= 1 + number % (seq_len - 2)).long()
    if config.model.family == "encoder_decoder":
        encoder_tokens = tokens(lengths.encoder)
        encoder_segments = torch.zeros_like(encoder_tokens)
        encoder_segments[:, lengths.encoder - number % 3 :] = PADDING  # none where the number is 0
    elif config.data.objective == "prefix":
        prefix = torch.full((size,), 1 + number % (seq_len // 2))
    return Batch(
        whole[:, :-1],
        positions,
        segments,
        labels_BS=labels,
        prefix_B=prefix,
        encoder_tokens_BT=encoder_tokens,
        encoder_segments_BT=encoder_segments,
    )

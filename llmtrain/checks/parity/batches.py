"""Micro-batches for comparing layouts: random tokens in the shapes that a run's objective gives its batches."""

import torch
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.values.batch import IGNORED_LABEL, PADDING, Batch
from llmtrain.values.keyed_hash import derived_key


def probe_batches(config: RunConfig, step: int, first: int, stride: int) -> list[Batch]:
    """Micro-batches first, first + stride, ... of a step: random tokens, a different number of targets in each."""
    numbers = range(first, config.train.global_batch_size // config.train.micro_batch_size, stride)
    return [probe_batch(config, step, number) for number in numbers]


def probe_batch(config: RunConfig, step: int, number: int) -> Batch:
    """Micro-batch `number` of a step. An encoder-decoder's inputs end in padding, of a different length in each."""
    generator = torch.Generator().manual_seed(derived_key("probe", config.seed, step, number) & (2**63 - 1))
    lengths, size = config.lengths, config.train.micro_batch_size
    seq_len = lengths.main

    def tokens(length: int) -> Tensor:
        return torch.randint(0, config.model.vocabulary, (size, length), generator=generator)

    whole = tokens(seq_len + 1)
    labels = whole[:, 1:].clone()
    labels[:, : number * 3 % (seq_len // 2)] = IGNORED_LABEL
    positions = torch.arange(seq_len).expand(size, seq_len)
    if config.model.predicts_labels:
        return label_batch(config, whole[:, :-1], positions, number, generator)
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


def label_batch(
    config: RunConfig, tokens_BS: Tensor, positions_BS: Tensor, number: int, draws: torch.Generator
) -> Batch:
    """A micro-batch for a head for labels: padding and the second of two texts begin elsewhere in each sample."""
    model, (size, seq_len) = config.model, tokens_BS.shape
    ends_B1 = seq_len - (3 * number + torch.arange(size)[:, None]) % (seq_len // 2)  # none where both are 0
    types_BS = (positions_BS >= 1 + (number + torch.arange(size)[:, None]) % 5).long()
    segments_BS = torch.where(positions_BS < ends_B1, 0, PADDING)
    labels_BS = torch.full_like(tokens_BS, IGNORED_LABEL)
    if model.head == "span":
        begin_B1 = torch.randint(0, seq_len // 4, (size, 1), generator=draws)
        labels_BS[:, :2] = torch.cat(
            (begin_B1, begin_B1 + torch.randint(0, seq_len // 4, (size, 1), generator=draws)), 1
        )
    else:
        drawn_BS = torch.randint(0, model.num_classes, (size, seq_len), generator=draws)
        is_target_BS = (positions_BS + number) % 3 == 0
        if model.head == "classifier":
            is_target_BS = positions_BS == (0 if model.family == "encoder" else ends_B1 - 1)
        labels_BS = torch.where(is_target_BS & (segments_BS != PADDING), drawn_BS, labels_BS)
        if number % 3 == 1:
            labels_BS[0] = IGNORED_LABEL  # as a sample that stands for none
    return Batch(
        tokens_BS,
        positions_BS,
        segments_BS,
        labels_BS=labels_BS,
        token_types_BS=types_BS if model.token_types > 1 else None,
    )

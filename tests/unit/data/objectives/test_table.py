import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.data.objectives.causal import document_numbers, document_positions, stack_samples
from llmtrain.data.objectives.table import causal
from llmtrain.data.row_config import RowConfig
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL


def sample_of(tokens: list[int], starts: list[int]) -> Sample:
    return Sample(0, np.array(tokens), np.array(starts, np.int64), 0, 0, 0, 0)


def row_config(reset_positions: bool = False, reset_attention: bool = False) -> RowConfig:
    data = DataConfig(
        train=(SourceConfig(path="none"),), reset_positions=reset_positions, reset_attention=reset_attention
    )
    return RowConfig(data, seed=1, eos_id=3)


def test_plain_causal() -> None:
    row = causal(sample_of([5, 6, 3, 7, 8], [3]), row_config())
    assert row.tokens_S.tolist() == [5, 6, 3, 7]
    assert row.labels_S.tolist() == [6, 3, 7, 8]
    assert row.positions_S.tolist() == [0, 1, 2, 3]
    assert row.segments_S is None


def test_reset_positions_count_from_each_document() -> None:
    row = causal(sample_of([5, 6, 3, 7, 8, 3, 9], [3, 6]), row_config(reset_positions=True))
    assert row.positions_S.tolist() == [0, 1, 2, 0, 1, 2]
    assert row.labels_S.tolist() == [6, 3, 7, 8, 3, 9]
    assert row.segments_S is None


def test_reset_attention_numbers_documents_and_ignores_their_first_tokens() -> None:
    sample = sample_of([5, 6, 3, 7, 8, 3, 9], [0, 3, 6])
    row = causal(sample, row_config(reset_attention=True))
    assert row.segments_S is not None
    assert row.segments_S.tolist() == [0, 0, 0, 1, 1, 1]
    assert row.labels_S.tolist() == [6, 3, IGNORED_LABEL, 8, 3, IGNORED_LABEL]
    assert row.positions_S.tolist() == [0, 1, 2, 3, 4, 5]
    assert sample.tokens.tolist() == [5, 6, 3, 7, 8, 3, 9]  # the sample itself is left as it was


@given(starts=st.sets(st.integers(0, 20)), seq_len=st.integers(1, 20))
@settings(deadline=None)
def test_positions_and_numbers_equal_a_slow_reference(starts: set[int], seq_len: int) -> None:
    inside = np.array(sorted(start for start in starts if start <= seq_len), np.int64)
    positions, numbers, position, number = [], [], 0, 0
    for index in range(seq_len):
        if index in starts:
            number += index > 0
            position = 0
        positions.append(position)
        numbers.append(number)
        position += 1
    assert document_positions(inside, seq_len).tolist() == positions
    assert document_numbers(inside, seq_len).tolist() == numbers


def test_stacking() -> None:
    rows = [causal(sample_of([n, 6, 3, 7, 8], [3]), row_config(reset_attention=True)) for n in range(4, 7)]
    batch = stack_samples(rows, first_sample=40)
    assert (len(batch.tokens_BS), batch.first_sample, batch.num_valid_tokens) == (3, 40, 9)
    assert batch.tokens_BS[:, 0].tolist() == [4, 5, 6]
    assert batch.segments_BS is not None
    tensors = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.segments_BS)
    assert {(str(t.dtype), tuple(t.shape), t.is_contiguous()) for t in tensors} == {("torch.int64", (3, 4), True)}

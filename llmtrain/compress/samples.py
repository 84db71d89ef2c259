"""Text to calibrate and to measure on: shards or a text file, made into rows as the run's objective does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from llmtrain.config.data import DataConfig, DataSetConfig, ObjectiveName, needed_tokens
from llmtrain.config.model import ModelConfig
from llmtrain.config.sequence_lengths import num_sentinels
from llmtrain.data.loader import build_stream
from llmtrain.data.objectives.causal import stack_samples
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import PieceTable, RowConfig, word_begins
from llmtrain.data.stream import Sample
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_text
from llmtrain.values.batch import Batch
from llmtrain.values.tokenizer import Tokenizer

USUAL_LENGTH = 512
"""Of samples where no run says how long they are; a model may allow less."""
_ROWS = 8
_LONGEST_FILE = 1 << 30


def usual_objective(model: ModelConfig, special: Mapping[str, Any]) -> ObjectiveName:
    """The objective of a model that no run says it of, by the special tokens that there are."""
    if model.family == "encoder_decoder":
        return "span_corruption" if special.get("sentinels") else "prefix"
    return "masked" if model.family == "encoder" else "causal"


@dataclass(frozen=True)
class SampleText:
    """What makes rows for a model: its tokenizer, and the data section of its run, or what stands for it."""

    model: ModelConfig
    tokenizer: Tokenizer
    section: Mapping[str, Any]
    seed: int = 0

    def batches(self, place: str, count: int) -> list[Batch]:
        """Up to so many samples of a folder with shards, or of a text file, in micro-batches.

        Raises ConfigError for a place that is none, DataError where it is damaged, of another tokenizer, or too short.
        """
        data = self._data(place)
        samples, row_config = (self._of_file if Path(place).is_file() else self._of_shards)(place, data)
        rows = [pack_sample(sample, row_config) for sample in islice(samples, count)]
        found = [stack_samples(rows[start : start + _ROWS], start) for start in range(0, len(rows), _ROWS)]
        if not sum(batch.num_valid_tokens for batch in found):
            raise DataError(f"{place}: has no whole sample of {data.seq_len} tokens. Give more text.")
        return found

    def _data(self, place: str) -> DataConfig:
        section = {key: value for key, value in self.section.items() if key not in ("train", "valid", "schedule")}
        section.setdefault("objective", usual_objective(self.model, section.get("special_tokens") or {}))
        length = section.setdefault("seq_len", min(USUAL_LENGTH, self.model.max_seq_len))
        try:
            data = DataConfig.model_validate({**section, "train": [{"path": place}], "prefetch_steps": 0})
            # A run is refused whose samples have more spans than there are sentinels. Here are shorter ones.
            sentinels = data.special_tokens.sentinels or ()
            while sentinels and data.objective == "span_corruption" and num_sentinels(data) > len(sentinels):
                length //= 2
                data = data.with_keys({"seq_len": length})
        except ValidationError as error:
            raise DataError(f"the data section of the model's configuration: {error}") from None
        missing = [
            name
            for name in needed_tokens(self.model.family, data.objective)
            if getattr(data.special_tokens, name) is None
        ]
        if missing:
            raise ConfigError(
                f"{place}: cannot be made into samples: data.objective = {data.objective} needs a token for "
                f"{', '.join(missing)}, and the tokenizer names none."
            )
        return data

    def _of_shards(self, place: str, data: DataConfig) -> tuple[Iterator[Sample], RowConfig]:
        stream = build_stream([DataSetConfig(path=place)], data, self.seed, once=True)
        known = (self.tokenizer.sha256, *self.tokenizer.roles.equal_sha256)
        if stream.tokenizer_sha256 not in known:
            raise DataError(
                f"{place}: was written with a tokenizer of sha256 {stream.tokenizer_sha256[:12]}, and the model has "
                f"one of {known[0][:12]}. Give data of the model's tokenizer, or a text file."
            )
        samples = (stream.sample(number) for number in range(stream.length_once))
        return samples, self._row_config(data, stream.eos_id, stream.bos_ids, (stream.end_ids, stream.labels))

    def _of_file(self, place: str, data: DataConfig) -> tuple[Iterator[Sample], RowConfig]:
        if data.needs_targets:
            raise ConfigError(
                f"{place}: is a text, and data.objective = {data.objective} needs more than that. Give a folder of "
                "shards that `llmtrain data chat` or `llmtrain data labels` has written."
            )
        before, eos_id = tuple(self.tokenizer.bos_ids), self.tokenizer.eos_id
        row_config = self._row_config(data, eos_id, before, ((), None))
        return _windows(Path(place), self.tokenizer, before, data.seq_len), row_config

    def _row_config(
        self, data: DataConfig, eos_id: int, bos_ids: Sequence[int], more: tuple[tuple[int, ...], Any]
    ) -> RowConfig:
        pieces = None
        if data.objective == "masked":
            tokenizer = self.tokenizer
            pieces = PieceTable(tokenizer.special, word_begins(tokenizer.pieces, tokenizer.piece_style))
        return RowConfig(data, self.seed, eos_id, self.model.family, pieces, tuple(bos_ids), *more)


def _windows(path: Path, tokenizer: Tokenizer, before: tuple[int, ...], seq_len: int) -> Iterator[Sample]:
    """The windows of one text, which is one document."""
    try:
        text = read_text(path, _LONGEST_FILE)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text: {error}") from None
    ids = np.array([*before, *tokenizer.encode(text), tokenizer.eos_id], np.int64)
    for number in range((len(ids) - 1) // seq_len):
        window = ids[number * seq_len : (number + 1) * seq_len + 1]
        starts = np.array([0] if number == 0 else [], np.int64)
        yield Sample(number, window, starts, source=0, epoch=0, shard=0, window=number)

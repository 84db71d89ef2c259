"""The tokenizer of a data set: trained so that it gives every text back unchanged, or asked whether it does."""

import io
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from llmtrain.data.tokenizer import SPACE_MARK, SentencePieceTokenizer
from llmtrain.errors import ConfigError
from llmtrain.files import replace_file
from llmtrain.interop.text.tokenizer_json import export_obstacles
from llmtrain.values.tokenizer import Tokenizer

Kind = Literal["bpe", "unigram"]

SPECIAL_PIECES = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>"}
MASK_PIECES = ("<mask>", "<cls>", "<sep>")

_NUM_THREADS = 8  # fixed: sums over threads depend on their number
_CHUNK_CHARACTERS = 8192
_LONGEST_CHUNK_BYTES = 1 << 20  # far above 4 bytes a character: sentencepiece leaves out longer ones without an error
# sentencepiece leaves out a whole chunk for one NUL or U+2585, and takes U+2581 for a space. None becomes a piece.
_NOT_LEARNED = re.compile(f"[\0\u2585{SPACE_MARK}]")
_LIMIT = re.compile(r"value <= (\d+)|required_chars\. \d+ vs (\d+)")


def train_tokenizer(
    documents: Iterable[str], out: Path, vocab_size: int, kind: Kind = "bpe", control_pieces: int = 0
) -> SentencePieceTokenizer:
    """Train a tokenizer on documents and write it to `out`, which ends with .model.

    `control_pieces` are pieces that no text gives, for later use, such as in a chat template. The same documents in the
    same order give the same file. Raises ConfigError where the vocabulary size does not suit the text.
    """
    if out.suffix != ".model":
        raise ConfigError(f"{out}: the tokenizer's name must end with .model")
    source = _Chunks(documents)
    model = io.BytesIO()
    try:
        with _ended_by_signals():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(source),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                **_settings(control_pieces),
            )
    except RuntimeError as error:
        if source.error is not None:
            raise source.error from None
        raise _training_error(error, source.count, vocab_size) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, with_rounded_scores(model.getvalue()) if kind == "unigram" else model.getvalue())
    return SentencePieceTokenizer(out)


def train_byte_tokenizer(documents: Iterable[str], out: Path, vocab_size: int, control_pieces: int = 0) -> None:
    """Train a tokenizer of merged bytes (Radford et al. 2019, section 2.2) and write it to `out`, a tokenizer.json.

    Raises ConfigError where the vocabulary size does not suit the text.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = [*SPECIAL_PIECES.values(), *MASK_PIECES, *reserved_pieces(control_pieces)]
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = _Chunks(documents)
    with _ended_by_signals():
        library.train_from_iterator(iter(source), trainer)
    if not source.count:
        raise ConfigError("the inputs hold no text to train a tokenizer on. Name files with text.")
    if (found := library.get_vocab_size()) != vocab_size:
        raise ConfigError(
            f"a vocabulary of {vocab_size}: the text yields {found} tokens. Try {found}, or give more text."
        )
    replace_file(out, library.to_str().encode())


def reserved_pieces(number: int) -> list[str]:
    """Pieces that no text gives and that mean nothing yet."""
    return [f"<|reserved_{index}|>" for index in range(number)]


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end the process at once. Nothing is on storage yet, and Python's handlers wait for native code to
    return: for hours, where there is much text.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_rounded_scores(model: bytes, steps_per_unit: int = 16) -> bytes:
    """A unigram model whose scores add up without rounding in fp32, over a million units.

    sentencepiece adds scores in fp32, the tokenizers library in fp64: with other scores, splits of a text that score
    nearly the same come out differently, and an export would not give the same ids.
    """
    # protobuf makes the class when the module is imported; a checker does not see it.
    proto = sentencepiece_model.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    for piece in proto.pieces:
        piece.score = round(piece.score * steps_per_unit) / steps_per_unit
    return proto.SerializeToString()


def _settings(control_pieces: int) -> dict[str, Any]:
    """The settings without which `decode(encode(text)) == text` does not hold, and the special pieces."""
    special = {f"{name}_id": number for number, name in enumerate(SPECIAL_PIECES)}
    pieces = {f"{name}_piece": piece for name, piece in SPECIAL_PIECES.items()}
    return {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "split_digits": False,
        "control_symbols": [*MASK_PIECES, *reserved_pieces(control_pieces)],
        "shuffle_input_sentence": False,
        "max_sentence_length": _LONGEST_CHUNK_BYTES,
        "num_threads": _NUM_THREADS,
        "minloglevel": 2,
        **special,
        **pieces,
    }


class _Chunks:
    """Pieces of documents for sentencepiece, which reports an error of its source without its type."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.error: Exception | None = None
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._documents:
                for text in _NOT_LEARNED.split(document):
                    for chunk in iter_chunks(text):
                        self.count += 1
                        yield chunk
        except Exception as error:
            self.error = error
            raise


def iter_chunks(text: str) -> Iterator[str]:
    """Cut a text after the ends of lines, which stay in it, so that newlines and indentation become pieces."""
    begin = 0
    while begin < len(text):
        end = begin + _CHUNK_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def _training_error(error: RuntimeError, num_chunks: int, vocab_size: int) -> ConfigError:
    if not num_chunks:
        return ConfigError("the inputs hold no text to train a tokenizer on. Name files with text.")
    limit = _LIMIT.search(str(error))
    if limit is None:
        return ConfigError(f"--vocab-size {vocab_size}: sentencepiece refuses to train: {error}")
    most, fewest = limit.groups()
    if most:
        return ConfigError(
            f"--vocab-size {vocab_size}: the text yields at most {most} pieces. Try {most}, or give more text."
        )
    return ConfigError(
        f"--vocab-size {vocab_size}: must be at least {fewest}, for 256 bytes, the special pieces and the text's "
        f"characters. Try {max(512, 2 * int(fewest))}."
    )


PROBES = {
    "line breaks": "a\nb\n\nc\n",
    "tabs": "\ta\tb",
    "spaces in a row": "a  b   c",
    "spaces at the begin or end": "  a b ",
    "capital letters": "A bC",
    "accents": "é à ñ ü",
    "signs that Unicode calls compatible (ﬁ, ①, ½, full width)": "ﬁ ① ½ Ａ",
    "other scripts": "中文 日本 Ελ Жя عر",
    "emoji": "😀 👨‍👩‍👧",
    "control characters": "a\0b\x07\r\nc",
    "spaces around punctuation": "a , b . f( x ) don 't",
}
"""Texts that many tokenizers change, by what is lost then."""


def lost_in_texts(tokenizer: Tokenizer) -> list[str]:
    """Names of what is lost when texts are encoded and decoded; empty where everything comes back."""
    return [what for what, text in PROBES.items() if tokenizer.decode(tokenizer.encode(text)) != text]


def tokenizer_notes(tokenizer: Tokenizer) -> list[str]:
    """Warnings for the user: text that does not come back, exports that will be refused."""
    notes = list(tokenizer.roles.notes)
    if lost := lost_in_texts(tokenizer):
        notes.append(
            f"{tokenizer.path} does not give every text back as it was. Changed or lost are: {', '.join(lost)}. "
            "A model that is trained on these shards never sees them. Tokenizers that `llmtrain data tokenizer` trains "
            "give back everything."
        )
    if obstacles := export_obstacles(tokenizer):
        notes.append(f"a model that is trained on these shards cannot be exported: {'; '.join(obstacles)}.")
    return notes

"""sentencepiece's changes to a text before it is cut into pieces, and to pieces when they become text, as parts of a
tokenizer.json: Unicode normalization, white space that is merged, and a space in front (the dummy prefix).

A space is a space in such a tokenizer.json, not U+2581; a text that holds U+2581 holds a space for sentencepiece.
"""

import sysconfig
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, normalizers

SPACE_MARK = "\u2581"

_ALL = 1 << 30
_NUM_TRIED, _TRIED_CHARACTERS = 20, 10_000
_TRIALS = (
    " ",
    "  a  b \n\n",
    "\r\nline\r\n\r\n\tend\r",
    "\u2581\u2581 a\u2581b",
    "é̀ ß 中文字 \u00a0\ufb01 ½ 😀",
    "<s> x</s><unk>",
)


def keeps_marks(proto: Any, num_bytes: int) -> bool:
    """True where U+2581 in a text stays what it is, spelled in bytes: so llmtrain treats models that lose nothing."""
    return num_bytes == 256 and not proto.normalizer_spec.add_dummy_prefix


def is_plain(proto: Any) -> bool:
    """True where texts stay as they are, as with the models that llmtrain trains."""
    spec = proto.normalizer_spec
    return not (spec.precompiled_charsmap or spec.remove_extra_whitespaces or spec.add_dummy_prefix)


def trial_texts() -> list[str]:
    """Some text that every machine with Python has, and some that is seldom treated alike."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:_NUM_TRIED]
    return [path.read_text("utf-8", "replace")[:_TRIED_CHARACTERS] for path in sources] + list(_TRIALS)


def normalizer_of(proto: Any, num_bytes: int) -> Any:
    """The normalizer, None where a text stays as it is."""
    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if not keeps_marks(proto, num_bytes):
        steps.append(normalizers.Replace(SPACE_MARK, " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence(steps) if steps else None


def decoder_of(proto: Any) -> Any:
    """Pieces to text: bytes become characters, and the space in front goes, or all of them where they are merged.

    Bytes are never a step of an outer Sequence: llama.cpp's converter would take the file for Llama's, whose space is
    U+2581, and read every text wrongly. So it refuses where there is no tokenizer.model.
    """
    spec = proto.normalizer_spec
    if not (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        return decoders.ByteFallback()
    stripped = decoders.Strip(" ", _ALL if spec.remove_extra_whitespaces else 1, 0)
    return decoders.Sequence([decoders.Sequence([decoders.ByteFallback()]), decoders.Fuse(), stripped])

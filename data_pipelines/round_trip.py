"""Whether a tokenizer gives texts back as they were, and what is lost where it does not."""

from llmtrain.data.tokenizer import Tokenizer

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
    """What does not come back when texts are encoded and decoded; empty where everything does."""
    return [what for what, text in PROBES.items() if tokenizer.decode(tokenizer.encode(text)) != text]

"""Whether a tokenizer gives texts back as they were, and what is lost where it does not."""

from llmtrain.interop.text.tokenizer_json import export_obstacles
from llmtrain.values.tokenizer import Tokenizer

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


def tokenizer_notes(tokenizer: Tokenizer) -> list[str]:
    """What a user would wonder about later: text that does not come back, exports that will be refused."""
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

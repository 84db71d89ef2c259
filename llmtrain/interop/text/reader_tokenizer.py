"""The tokenizer of a Hugging Face folder as transformers uses it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.interop.weight_files import read_json

_VOCABULARIES = ("*.model", "vocab.*", "merges.txt", "tokenizer.json", "*.tiktoken")


@dataclass(frozen=True)
class ReaderTokenizer:
    """A tokenizer.json, and the ids that transformers puts before a text."""

    json: str
    before: tuple[int, ...]


def reader_tokenizer(folder: Path, notes: list[str]) -> ReaderTokenizer | None:
    """What transformers makes of a folder's tokenizer files; None, and a note, where it cannot use them.

    No code of the folder is run.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        return None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            read_json(folder / name)  # the fault of a damaged file is its own
    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        plain = loaded.encode("a", add_special_tokens=False)
        whole = loaded.encode("a")
        text = loaded.backend_tokenizer.to_str()
    except Exception as error:  # transformers raises nothing narrower, and of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        notes.append(f"transformers cannot use the folder's tokenizer: {reason}")
        return None
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return ReaderTokenizer(text, tuple(whole[: next(starts, 0)]))

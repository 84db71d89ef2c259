"""How a tokenizer over bytes cuts a text into words first: the steps of a tokenizer.json by llama.cpp's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LETTERS_AND_MARKS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = rf"{_ENDINGS}|{_LETTERS_AND_MARKS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENDINGS}|{_LETTERS_AND_MARKS}|\p{{N}}|{_REST}"


@dataclass(frozen=True)
class Cutting:
    """What is done to a text before merges: an expression (None: GPT-2's own, within the step over bytes), each digit
    apart, and whether a word that is a token is that one, whatever the merges say."""

    expression: str | None = None
    digits_apart: bool = False
    ignore_merges: bool = False


CUTTINGS = {
    "gpt-2": Cutting(),
    "starcoder": Cutting(digits_apart=True),
    "llama-bpe": Cutting(LLAMA3, ignore_merges=True),
    "smaug-bpe": Cutting(LLAMA3),
    "qwen2": Cutting(QWEN2),
}
"""By the value of `tokenizer.ggml.pre`."""

OTHER_NAMES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "dbrx": "smaug-bpe", "smollm": "starcoder",
    "refact": "starcoder", "phi-2": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2", "stablelm2": "qwen2",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2",
}  # fmt: skip
"""Names of the same ways in files of others."""


def pretokenizer_name(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for what a tokenizer.json does; None for what it has no name for, or llmtrain does not know."""
    step = content.get("pre_tokenizer") or {}
    steps = list(step.get("pretokenizers", ())) if step.get("type") == "Sequence" else [step]
    normalizer = content.get("normalizer") or {}
    cutting = _cutting(steps, bool(content["model"].get("ignore_merges")))
    if cutting is None or normalizer.get("type", "NFC") != "NFC":
        return None
    return next((name for name, known in CUTTINGS.items() if known == cutting), None)


def _cutting(steps: list[dict[str, Any]], ignore_merges: bool) -> Cutting | None:
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own, before = bool(steps[-1].get("use_regex", True)), steps[:-1]
    if own:
        digits = [{"type": "Digits", "individual_digits": True}]
        return Cutting(None, before == digits, ignore_merges) if before in ([], digits) else None
    if len(before) != 1 or before[0].get("type") != "Split":
        return None
    pattern = before[0]["pattern"].get("Regex")
    plain = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
    return Cutting(pattern, False, ignore_merges) if plain and isinstance(pattern, str) else None


def pretokenizer_steps(cutting: Cutting) -> dict[str, Any]:
    """The steps of a tokenizer.json."""
    steps: list[dict[str, Any]] = []
    if cutting.digits_apart:
        steps.append({"type": "Digits", "individual_digits": True})
    if cutting.expression is not None:
        split = {"type": "Split", "pattern": {"Regex": cutting.expression}, "behavior": "Isolated", "invert": False}
        steps.append(split)
    own = cutting.expression is None
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own})
    return {"type": "Sequence", "pretokenizers": steps}

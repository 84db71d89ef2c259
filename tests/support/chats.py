"""Tokenizers with control tokens, and conversations of all kinds."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.tokenizer import reserved_pieces, train_byte_tokenizer
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.values.tokenizer import Tokenizer
from tests.support.tokenizers import train_sentencepiece

TEXT = ["user assistant system tool Hello there, how are you today? 1 2 3 clock {} <think> </think>\n"] * 20
CHATML = ("<|im_start|>", "<|im_end|>")


def sentencepiece_file(path: Path, reserved: int = 8) -> Path:
    """A sentencepiece model with reserved pieces."""
    names = ["<mask>", "<cls>", "<sep>", *reserved_pieces(reserved)]
    path.write_bytes(train_sentencepiece(TEXT, "bpe", 400, control_symbols=names))
    return path


def chatml_file(path: Path) -> Path:
    """A tokenizer.json that has the control tokens of chatml, as published ones do."""
    train_byte_tokenizer(TEXT, path, 310, 4)
    text = path.read_text()
    for number, name in enumerate(CHATML):
        text = text.replace(f"<|reserved_{number}|>", name)
    path.write_text(text)
    return path


def chatml_tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(str(chatml_file(path)))


WORDS = ["Hello", "there", "é 中", " 😀\n", "two  spaces", "1+1=2", "\tx", "user", "assistant\n", "<b>", "…"]


def random_chat(seed: int) -> dict[str, Any]:
    """A conversation of some turns, in OpenAI's form."""
    draw = np.random.default_rng(seed)

    def says() -> str:
        return " ".join(str(word) for word in draw.choice(WORDS, draw.integers(1, 7)))

    messages: list[dict[str, Any]] = []
    if draw.random() < 0.5:
        messages.append({"role": "system", "content": says()})
    for _ in range(draw.integers(1, 4)):
        messages.append({"role": "user", "content": says()})
        if draw.random() < 0.3:
            call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": says()}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": says()})
        answer: dict[str, Any] = {"role": "assistant", "content": says()}
        if draw.random() < 0.3:
            answer["reasoning_content"] = says()
        messages.append(answer)
    return {"messages": messages}


MARKED = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""chatml with generation blocks."""

"""Conversations with a trained model: its template, the ids before an answer, and examples to prove an export with."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.chat.conversation import Conversation, conversation_of
from llmtrain.data.chat.encoding import ChatEncoder, control_names, template_variables
from llmtrain.data.chat.template import ChatTemplate
from llmtrain.data.token_roles import CHAT_TEMPLATE, TOKENIZER_CONFIG
from llmtrain.errors import ConfigError, DataError, ExportError
from llmtrain.files import read_json
from llmtrain.interop.text.proof import ChatExample, ChatExamples
from llmtrain.values.tokenizer import Tokenizer

_CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Europe/Zürich", "n": [1, 2.5]}}}
_TOOL = {"type": "function", "function": {"name": "clock", "description": "The <time> & date.", "parameters": {}}}
_ANSWER = {"role": "assistant", "content": "  def f(x):\n\treturn x  # 中文 😀\n"}
_EXAMPLES: tuple[Mapping[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "Hello, you."}, {"role": "assistant", "content": "Hello!"}]},
    {
        "messages": [
            {"role": "system", "content": "You\n\nhelp."},
            {"role": "user", "content": " a  b\n"},
            _ANSWER,
            {"role": "user", "content": "Grüße, 1+1?"},
            {"role": "assistant", "reasoning_content": "Two.", "content": "2"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "The time?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": '{"time": "12:00"}'},
            {"role": "assistant", "content": "Noon."},
        ],
        "tools": [_TOOL],
    },
)
"""Conversations with what templates and tokenizers treat in ways of their own."""

_MESSAGES_FORM = 'Give {"messages": [{"role": "user", "content": "Hello"}, ...]}, and perhaps tools.'


def chat_encoder(tokenizer: Tokenizer) -> ChatEncoder:
    """Raises ConfigError where nothing says how a conversation becomes a text, DataError where the template is none."""
    files = tokenizer.roles.files
    text = files.get(CHAT_TEMPLATE) or files.get(TOKENIZER_CONFIG, {}).get("chat_template")
    if not isinstance(text, str):
        raise ConfigError(
            f"{tokenizer.path}: no chat template lies beside it: the model was not trained on conversations. Train it "
            "on shards of `llmtrain data chat`, or leave --chat out."
        )
    template = ChatTemplate(text, CHAT_TEMPLATE, control_names(tokenizer), template_variables(tokenizer))
    return ChatEncoder(template, tokenizer, "text")


def chat_prompt(encoder: ChatEncoder, said: Mapping[str, Any]) -> list[int]:
    """The ids before the next message of a conversation, an object with `messages` and perhaps `tools`.

    Raises DataError for what is no conversation.
    """
    # As training reads them; the answer that is asked for stands for one here.
    if not isinstance(said["messages"], list) or not said["messages"]:
        raise DataError("messages: must be a list of at least one object with role and content.")
    answered = {**said, "messages": [*said["messages"], {"role": "assistant", "content": "."}]}
    whole = conversation_of(answered)
    return encoder.prompt(Conversation(whole.messages[:-1], frozenset(), whole.tools))


def said_with(text: str, earlier: Path | None) -> dict[str, Any]:
    """A conversation that ends with a user's text, behind the messages of a JSON file.

    Raises ConfigError, and DataError for a file that is no conversation.
    """
    said: dict[str, Any] = {} if earlier is None else _earlier(earlier)
    return {**said, "messages": [*said.get("messages", ()), {"role": "user", "content": text}]}


def _earlier(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--messages {path}: no such file. {_MESSAGES_FORM}")
    try:
        said = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"--messages {path}: no JSON that can be read: {error}. {_MESSAGES_FORM}") from None
    if not isinstance(said, dict) or not isinstance(said.get("messages"), list):
        raise DataError(f"--messages {path}: has no list of messages. {_MESSAGES_FORM}")
    return said


def chat_examples(tokenizer: Tokenizer) -> ChatExamples:
    """The conversations that an export is proved with, those that the template can write. Raises as `chat_encoder`."""
    encoder, found, special = chat_encoder(tokenizer), list[ChatExample](), tokenizer.special
    for item in _EXAMPLES:
        whole = conversation_of(item)
        prompt = Conversation(whole.messages[:-1], frozenset(), whole.tools)
        with suppress(DataError):  # of tools, say, which not every template knows
            ids = (encoder.encode(whole).ids.tolist(), encoder.prompt(prompt))
            for conversation, each in zip((whole, prompt), ids, strict=True):
                prompts = conversation is prompt
                found.append(ChatExample(conversation.messages, conversation.tools, prompts, tuple(each)))
    if not found:
        raise ExportError(f"{tokenizer.path}: its chat template can write no conversation. Write the shards again.")
    ids = np.unique(np.concatenate([example.ids for example in found]))
    return ChatExamples(encoder.template.text, frozenset(ids[special[ids]].tolist()), tuple(found))

"""A conversation as one JSON object, in the three forms that people keep them in, and as messages for a template.

`messages` (OpenAI's), with `tools`, tool calls and what the assistant thinks; `conversations` (ShareGPT's), from and
value; `prompt` and `completion`, texts or lists of messages, of which the completion alone is trained. Everything that
a message holds reaches the template, but its weight.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.config.reading.suggestions import nearest
from llmtrain.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"

SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT,
    "function_call": ASSISTANT, "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Names that ShareGPT's data sets have for roles."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which an assistant's thoughts are kept: a template finds them under the first two."""

_REFUSED = {
    "function_call": "is OpenAI's older form. Write it as tool_calls",
    "audio": "is no text, and only text is trained. Remove it",
    "refusal": "is what an assistant refused with. Write it as content, or leave the conversation out",
}
_FORMS = "messages (a list of role and content), conversations (a list of from and value), or prompt and completion"


@dataclass(frozen=True)
class Conversation:
    """Messages as a template takes them. `trained` are those of the assistant that it is to learn from, by number."""

    messages: tuple[Mapping[str, Any], ...]
    trained: frozenset[int]
    tools: tuple[Any, ...] | None = None
    where: str = ""

    def fault(self, reason: str) -> DataError:
        """The error for something in it, with its place."""
        return DataError(f"{self.where}: {reason}" if self.where else reason)


def conversation_of(item: Any, where: str = "") -> Conversation:
    """The conversation in a JSON object. Raises DataError that begins with `where`."""
    try:
        if not isinstance(item, Mapping):
            raise DataError(f"is {_kind(item)}; a conversation is an object with {_FORMS}.")
        found = _parsed(item)
        if not found.messages:
            raise DataError("has no messages. Leave it out.")
        if not found.trained:
            raise DataError("has nothing that an assistant says and that is to be trained. Leave it out.")
        return Conversation(found.messages, found.trained, found.tools, where)
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from None


def _parsed(item: Mapping[str, Any]) -> Conversation:
    forms = [key for key in ("messages", "conversations", "prompt") if key in item]
    if len(forms) != 1:
        found = ", ".join(map(str, list(item)[:6])) or "nothing"
        raise DataError(f"has the keys {found}; a conversation has one of {_FORMS}.")
    tools = _tools(item.get("tools"))
    if forms == ["prompt"]:
        prompt, completion = _side(item, "prompt", "user"), _side(item, "completion", ASSISTANT)
        messages = [*prompt, *completion]
        learnt = range(len(prompt), len(messages))
    else:
        form = forms[0]
        if not isinstance(item[form], Sequence) or isinstance(item[form], str):
            raise DataError(f"{form} is {_kind(item[form])}, and must be a list.")
        read = _message if form == "messages" else _sharegpt_message
        messages = [read(message, f"{form}[{number}]") for number, message in enumerate(item[form])]
        if form == "conversations" and isinstance(item.get("system"), str) and item["system"]:
            messages.insert(0, {"role": "system", "content": item["system"]})
        learnt = range(len(messages))
    trained = {number for number in learnt if messages[number]["role"] == ASSISTANT}
    trained -= {number for number in trained if messages[number].get("weight", 1) == 0}
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return Conversation(tuple(plain), frozenset(trained), tools)


def _side(item: Mapping[str, Any], key: str, role: str) -> list[dict[str, Any]]:
    """A prompt or a completion: a text, or messages."""
    value = item.get(key)
    if isinstance(value, str):
        return [_message({"role": role, "content": value}, key)]
    if isinstance(value, Sequence):
        return [_message(message, f"{key}[{number}]") for number, message in enumerate(value)]
    raise DataError(f"{key} is {_kind(value)}, and must be a text or a list of messages.")


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is {_kind(message)}, and must be an object with role and content.")
    role = message.get("role")
    if role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else None
        advice = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"{place}.role = {role!r}: must be one of {', '.join(ROLES)}.{advice}")
    for key, why in _REFUSED.items():
        if message.get(key) is not None:
            raise DataError(f"{place}.{key}: {why}.")
    if "weight" in message and message["weight"] not in (0, 1):
        raise DataError(f"{place}.weight = {message['weight']!r}: must be 0 (not trained) or 1.")
    found = {key: value for key, value in message.items() if value is not None}
    found["content"] = _content(message.get("content"), f"{place}.content")
    thought = next((found[key] for key in REASONING if key in found), None)
    if thought is not None:
        if not isinstance(thought, str):
            raise DataError(f"{place}: what it thinks is {_kind(thought)}, and must be a text.")
        found |= dict.fromkeys(REASONING[:2], _text(thought, place))
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], f"{place}.tool_calls")
    elif thought is None and not found["content"] and (role == ASSISTANT or "content" not in message):
        raise DataError(f"{place}: says nothing: it has neither content nor tool_calls. Leave the message out.")
    return found


def _content(value: Any, place: str) -> str:
    """A text, or the texts of its parts; null stands for none, where there are tool calls."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _text(value, place)
    if not isinstance(value, Sequence):
        raise DataError(f"{place} is {_kind(value)}, and must be a text or a list of parts.")
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise DataError(f"{place}[{number}] is {kind}: only parts of the type text with a text are read.")
        texts.append(_text(part["text"], place))
    return "".join(texts)


def _text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: holds half of a surrogate pair, which is no text. Repair it.") from None
    return text


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls whose arguments are objects, as templates want them; OpenAI's files have them as text."""
    if not isinstance(calls, Sequence) or isinstance(calls, str) or not calls:
        raise DataError(f"{place} is {_kind(calls)}, and must be a list of calls.")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}[{number}]: must be an object with a function that has a name and arguments.")
        function = {**function, "arguments": _arguments(function.get("arguments", {}), f"{place}[{number}]")}
        around = {key: value for key, value in call.items() if "function" in call and key != "function"}
        found.append({"type": "function", **around, "function": function})
    return found


def _arguments(value: Any, place: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: its arguments are not JSON ({error}).") from None
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: its arguments are {_kind(value)}, and must be an object.")
    return value


def _tools(value: Any) -> tuple[Any, ...] | None:
    """Descriptions of tools; some data sets have the list as text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools: is a text that is not JSON ({error}).") from None
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"tools is {_kind(value)}, and must be a list of objects.")
    return tuple(value)


def _sharegpt_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
        raise DataError(f"{place} must be an object with from and value, a text.")
    given = message.get("from")
    role = SHAREGPT_ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise DataError(f"{place}.from = {given!r}: must be one of {', '.join(SHAREGPT_ROLES)}.")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if given == "function_call":
        call = _arguments(message["value"], place)
        return _message({"role": role, "content": "", "tool_calls": [call], **rest}, place)
    return _message({"role": role, "content": message["value"], **rest}, place)


def _kind(value: Any) -> str:
    """The type of a value as JSON calls it."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

"""`llmtrain data chat` as a user runs it: three forms of conversations, and what is wrong with some, each explained."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from typer.testing import CliRunner, Result

from llmtrain.cli.data import app
from llmtrain.data.chat.conversation import conversation_of
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError, DataError
from tests.support.chats import MARKED, chatml_file, random_chat, sentencepiece_file

USER = {"role": "user", "content": "Hello"}
GOOD = {"messages": [USER, {"role": "assistant", "content": "Hello, you."}]}
END = "<|im_end|>"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(*items: Any) -> str:
    return "".join(f"{json.dumps(item, ensure_ascii=False)}\n" for item in items)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    sentencepiece_file(folder / "t.model")
    sentencepiece_file(folder / "none.model", reserved=1)
    chatml_file(folder / "tokenizer.json")
    return folder


def chat(folder: Path, out: Path, *more: object, content: str | None = None, template: str = "chatml") -> Result:
    file = out.parent / "f.jsonl"
    if content is not None:
        file.write_text(content, "utf-8", errors="surrogatepass")
    return run("chat", file, out, "--tokenizer", folder / "t.model", "--template", template, *more)


def test_shards_of_all_forms(folder: Path, tmp_path: Path) -> None:
    forms = [
        GOOD,
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello, you."}]},
        {"prompt": "Hello", "completion": "Hello, you."},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "Hello, you."}]},
    ]
    (tmp_path / "f.jsonl").write_text(lines(*forms))
    with gzip.open(tmp_path / "g.jsonl.gz", "wt") as packed:
        packed.write(lines(*(random_chat(seed) for seed in range(20))) + "\n")
    inputs = (tmp_path / "f.jsonl", tmp_path / "g.jsonl.gz", tmp_path / "out")
    result = run("chat", *inputs, "--tokenizer", folder / "t.model", "--template", "chatml", "--valid-fraction", 0.3)
    assert result.exit_code == 0, result.output
    assert "<|im_start|> is the piece <|reserved_0|>" in result.stderr and "read 24 conversations" in result.stderr
    manifests = [read_manifest(tmp_path / "out" / split) for split in ("train", "valid")]
    assert sum(manifest.num_documents for manifest in manifests) == 24
    assert run("verify", tmp_path / "out").exit_code == 0
    for split, manifest in zip(("train", "valid"), manifests, strict=True):
        assert manifest.chat is not None and manifest.chat.trained_tokens["assistant"] > 0
        shard = str(tmp_path / "out" / split / "shard-000000.tar")
        found = list(webdataset.WebDataset(shard, shardshuffle=False, empty_check=False))
        spans = [np.frombuffer(sample["trained"], "<u4").reshape(-1, 2) for sample in found]
        assert sum(int((s[:, 1] - s[:, 0]).sum()) for s in spans) == manifest.chat.trained_tokens["assistant"]
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer.model"))
    assert tokenizer.end_ids == (3, tokenizer.special_id(END)) and "chat_template.jinja" in tokenizer.roles.files


def test_the_four_forms_are_one_conversation() -> None:
    forms = [
        GOOD,
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello, you."}]},
        {"prompt": "Hello", "completion": "Hello, you."},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": [{"type": "text", "text": "Hello, you."}]}]},
    ]
    assert len({str(conversation_of(form)) for form in forms}) == 1
    earlier = {"messages": [*GOOD["messages"], *GOOD["messages"]]}
    assert conversation_of(earlier).trained == {1, 3}
    assert conversation_of({"prompt": GOOD["messages"], "completion": GOOD["messages"]}).trained == {3}
    call = {"name": "clock", "arguments": {"zone": "UTC"}}
    text = {"id": "1", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
    called = conversation_of({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [text]}]})
    assert called.messages[1]["tool_calls"] == [{"id": "1", "type": "function", "function": call}]
    shared = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)}]
    of_shared = conversation_of({"conversations": shared, "system": "s", "tools": json.dumps([{"name": "clock"}])})
    assert [message["role"] for message in of_shared.messages] == ["system", "user", "assistant"]
    assert of_shared.messages[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert of_shared.tools == ({"name": "clock"},)
    thought = conversation_of({"messages": [USER, {"role": "assistant", "content": "a", "thinking": "b"}]})
    assert thought.messages[1]["reasoning_content"] == thought.messages[1]["thinking"] == "b"


def test_show_marks_what_is_trained(folder: Path, tmp_path: Path) -> None:
    assert chat(folder, tmp_path / "out", "--valid-fraction", 0, content=lines(GOOD)).exit_code == 0
    shown = run("show", tmp_path / "out", "--seq-len", 64).stdout
    assert f"<|im_start|>assistant\n[[Hello, you.{END}]]\n</s>" in shown and shown.count("[[") == 1
    text = run("inspect", tmp_path / "out").stdout
    assert "trained tokens: " in text and " of assistant, 0 of user; template " in text


def turn(**message: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **message}]}


def with_user(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message}, GOOD["messages"][1]]}


CONVERSATIONS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", r"f\.jsonl:2: not JSON"),
    "not an object": ("[]", r"f\.jsonl:2: is a list; a conversation is an object"),
    "no known form": ('{"text": "a"}', r"f\.jsonl:2: has the keys text; a conversation has one of messages"),
    "two forms": ('{"messages": [], "prompt": "a"}', "has the keys messages, prompt"),
    "messages are no list": ('{"messages": "a"}', "messages is a text, and must be a list"),
    "no messages": ('{"messages": []}', "has no messages. Leave it out"),
    "a message is no object": ('{"messages": [1]}', r"messages\[0\] is a number, and must be an object"),
    "an unknown role": (lines({"messages": [{"role": "asistant", "content": "a"}]}), "Did you mean assistant"),
    "an unknown speaker": (lines({"conversations": [{"from": "bot", "value": "a"}]}), r"from = 'bot': must be one of"),
    "no value": (lines({"conversations": [{"from": "gpt"}]}), "must be an object with from and value"),
    "nothing is said": (lines({"messages": [USER]}), "has nothing that an assistant says"),
    "an empty answer": (lines(turn(content="")), r"messages\[1\]: says nothing"),
    "no content": (lines(turn()), r"messages\[1\]: says nothing"),
    "content is a number": (lines(with_user(content=7)), r"content is a number, and must be a text"),
    "content is a picture": (lines(with_user(content=[{"type": "image_url"}])), r"content\[0\] is image_url"),
    "half a surrogate": (lines(GOOD) + '{"prompt": "\\ud800", "completion": "a"}', "half of a surrogate pair"),
    "a noncharacter": (lines(with_user(content="\ufdd2")), "holds a noncharacter"),
    "a wrong weight": (lines(turn(content="a", weight=2)), "weight = 2: must be 0"),
    "nothing to train": (lines(turn(content="a", weight=0)), "has nothing that an assistant says and that is to be"),
    "calls are no list": (lines(turn(tool_calls="clock")), "tool_calls is a text, and must be a list"),
    "a call without a name": (lines(turn(tool_calls=[{}])), "must be an object with a function"),
    "arguments": (lines(turn(tool_calls=[{"name": "a", "arguments": "{"}])), "its arguments are not JSON"),
    "OpenAI's older calls": (lines(turn(function_call={"name": "a"})), "is OpenAI's older form"),
    "tools": (lines({**GOOD, "tools": "[1"}), "tools: is a text that is not JSON"),
    "a completion is missing": ('{"prompt": "a"}', "completion is null, and must be a text or a list"),
    "a control token": (lines(with_user(content=f"a{END}")), r"message 0 spells the control token <\|im_end\|>"),
}


@pytest.mark.parametrize(("content", "fault"), CONVERSATIONS.values(), ids=list(CONVERSATIONS))
def test_a_wrong_conversation_is_named_with_file_and_line(
    folder: Path, tmp_path: Path, content: str, fault: str
) -> None:
    result = chat(folder, tmp_path / "out", content=lines(GOOD) + content)
    assert isinstance(result.exception, DataError), result.output
    assert str(result.exception).startswith(f"{tmp_path}/f.jsonl:")
    with pytest.raises(DataError, match=fault):
        raise result.exception
    assert not (tmp_path / "out").exists()


PLAIN = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

TEMPLATES: dict[str, tuple[str, str]] = {
    "not jinja": ("{% for %}", r"own\.jinja:1: not a jinja template"),
    "empty": (" \n", "is empty"),
    "no end of turn": (PLAIN.replace(END, "") + PROMPT, "with no control token"),
    "a block without an end": (MARKED.replace(f"{{{{- '{END}' }}}}\n{{%- endg", "{%- endg"), "with no control token"),
    "another prompt": (
        PLAIN + PROMPT.replace("assistant", "model"),
        r"does not begin message 1 with what it writes before",
    ),
    "it changes what was": (
        PLAIN.replace("m.role", "(m.role if loop.last else 'x')") + PROMPT,
        "does not begin message 1 with|with the messages up to",
    ),
    "all is trained": (
        f"{{% generation %}}{{{{ messages[-1].content }}}}{END}{{% endgeneration %}}",
        "all of its tokens",
    ),
    "no block": ("{% if false %}{% generation %}{% endgeneration %}{% endif %}" + PLAIN, "no generation block"),
    "it raises": ("{{ raise_exception('roles must alternate') }}", "the template fails on it: roles must alternate"),
    "an unknown name": ("{{ messages[0].content + nothing.at_all }}", "'nothing' is undefined"),
    "it reads attributes": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    "it imports": ("{% include '/etc/passwd' %}", "no loader"),
    "it changes messages": ("{{ messages.append(1) }}", "is not safely callable|access"),
    "it counts without end": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "counts through",
    ),
    "it grows": ("{{ 'x' * 10 ** 10 }}", "multiplies something that is too large"),
    "it grows by width": ("{{ '%99999999d' % 1 }}", "formats with a width"),
    "a power": ("{{ 10 ** 99999 }}", "raises to a power"),
    "it recurs": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "does not end|recursion"),
}


@pytest.mark.parametrize(("text", "fault"), TEMPLATES.values(), ids=list(TEMPLATES))
def test_a_wrong_template_is_explained(folder: Path, tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "own.jinja").write_text(text)
    controls = ("--control", "<|im_start|>", "--control", END)
    result = chat(folder, tmp_path / "out", *controls, content=lines(GOOD), template=str(tmp_path / "own.jinja"))
    assert isinstance(result.exception, DataError), result.output
    assert "own.jinja" in str(result.exception)
    with pytest.raises(DataError, match=fault):
        raise result.exception
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_explained(folder: Path, tmp_path: Path) -> None:
    good, out = tmp_path / "f.jsonl", tmp_path / "out"
    good.write_text(lines(GOOD))
    (tmp_path / "empty.jsonl").write_text("\n")
    model = ("--tokenizer", folder / "t.model")
    for arguments, fault in (
        ((good, out, *model, "--template", "chatmll"), "--template chatmll: no such file. Give chatml, llama3"),
        ((good, out, "--tokenizer", folder / "none.model", "--template", "chatml"), "and 1 reserved pieces"),
        ((good, out, *model, "--template", "chatml", "--control", "e"), "--control e: is an ordinary piece"),
        ((good, out, *model, "--template", "chatml", "--control", " "), "must be the text of a token"),
        ((tmp_path / "empty.jsonl", out, *model, "--template", "chatml"), "there is no conversation in it"),
        ((tmp_path / "none.jsonl", out, *model, "--template", "chatml"), "no such file"),
        ((good, out, *model, "--template", "chatml"), "both need one"),
    ):
        result = run("chat", *arguments)
        assert isinstance(result.exception, ConfigError), (arguments, result.output)
        assert fault in str(result.exception), result.exception
    assert not out.exists()

"""Exports of models trained on conversations: readers give them the ids of training, and stop where turns end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner, Result

from data_pipelines.conversations import ChatSource, chat_source
from data_pipelines.tokenizer import train_byte_tokenizer
from llmtrain.cli.app import app
from llmtrain.data.chat.conversation import Conversation, conversation_of
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.chat import chat_encoder, chat_examples, chat_prompt, said_with
from llmtrain.interop.hf_export import ExportSettings, write_export
from llmtrain.interop.text.special_tokens import named_tokens
from tests.support.chats import MARKED, TEXT, chatml_file, random_chat, sentencepiece_file
from tests.support.readers import read_by
from tests.unit.interop.models import LLAMA, model_for, random_model, weights_of

CHAT = {"objective": "chat"}


def carried_folder(folder: Path) -> Path:
    """A tokenizer as published ones are, with settings of its own that do not suit."""
    folder.mkdir()
    path = chatml_file(folder / "tokenizer.json")
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "</s>", "add_bos_token": False,
        "split_special_tokens": True, "chat_template": "{{ messages[0].content }}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3], "temperature": 0.5}))
    return path


def source_of(kind: str, folder: Path, template: str = "chatml") -> ChatSource:
    if kind == "sentencepiece":
        path = sentencepiece_file(folder / "t.model")
    elif kind == "json":
        path = chatml_file(folder / "tokenizer.json")
    elif kind == "carried":
        path = carried_folder(folder / "carried")
    else:
        path = folder / "reserved.json"
        train_byte_tokenizer(TEXT, path, 310, 4)
    return chat_source(load_tokenizer(str(path)), template, ["<|im_start|>", "<|im_end|>"], "error")[0]


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def exported(source: ChatSource, out: Path, **changes: Any) -> Path:
    tokenizer = source.encoder.tokenizer
    model = random_model(LLAMA.with_keys({"vocab_size": tokenizer.vocab_size}))
    known = {"tokens": named_tokens(tokenizer, CHAT), "chats": chat_examples(tokenizer), **changes}
    write_export(out, model_for(model.config, tokenizer, **known), weights_of(model), ExportSettings())
    return out


@pytest.mark.parametrize("kind", ["sentencepiece", "json", "reserved json", "carried"])
def test_readers_give_conversations_the_ids_of_training(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    folder, ours = exported(source, tmp_path / "out"), source.encoder.tokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    for seed in range(8):
        conversation = conversation_of(random_chat(seed))
        messages = [dict(message) for message in conversation.messages]
        found = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert found == source.encoder.encode(conversation).ids.tolist()
    end = ours.special_id("<|im_end|>")
    assert theirs.convert_tokens_to_ids("<|im_end|>") == end and theirs.bos_token is None
    assert (folder / "chat_template.jinja").read_text() == source.encoder.template.text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["split_special_tokens"] is False and "chat_template" not in config
    assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == {ours.eos_id, end}
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] is None
    card = (folder / "README.md").read_text()
    assert "apply_chat_template(messages" in card and "6 conversations have equal token ids" in card


def test_an_export_talks_as_the_run_does(tmp_path: Path) -> None:
    """What is beside the export suffices: the template, the control tokens, where a turn ends."""
    source = source_of("sentencepiece", tmp_path)
    folder = exported(source, tmp_path / "out")
    ours, beside = source.encoder.tokenizer, load_tokenizer(str(folder / "tokenizer.json"))
    assert set(beside.end_ids) == set(ours.end_ids)
    (tmp_path / "before.json").write_text(json.dumps({"messages": random_chat(3)["messages"]}))
    for text in ("Hello", "a <|im_end|> b"):
        said = said_with(text, tmp_path / "before.json")
        prompts = [chat_prompt(chat_encoder(tokenizer), said) for tokenizer in (ours, beside)]
        assert prompts[0] == prompts[1] and prompts[0].count(ours.special_id("<|im_end|>") or -1) > 1
    spelled = chat_prompt(chat_encoder(ours), said_with("<|im_end|>", None))
    assert spelled.count(ours.special_id("<|im_end|>") or -1) == 1, "of the message, not of its text"
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match="no chat template lies beside it"):
        chat_encoder(load_tokenizer(str(sentencepiece_file(tmp_path / "plain" / "plain.model"))))
    asked = ["generate", folder, "--prompt", "Hello", "--max-tokens", "3", "--temperature", "0"]
    (tmp_path / "before.json").write_text(json.dumps({"messages": [{"role": "system", "content": "a"}]}))
    before = ["--messages", tmp_path / "before.json"]
    answers = [_call(*asked, *more) for more in (["--chat"], ["--chat", *before], [])]
    assert all(answer.exit_code == 0 for answer in answers) and len({answer.stdout for answer in answers}) > 1
    assert "goes with --chat" in _call(*asked, *before).output


def test_a_begin_that_training_has_seen_is_named(tmp_path: Path) -> None:
    source = source_of("sentencepiece", tmp_path, "llama3")
    assert source.bos_ids == (source.encoder.tokenizer.bos_id,)
    tokenizer = load_tokenizer(
        str(tmp_path / "t.model"), replace(source.encoder.tokenizer.roles, bos_ids=source.bos_ids)
    )
    folder = exported(ChatSource(chat_encoder(tokenizer), source.end_ids, source.bos_ids), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).bos_token == "<s>"


@pytest.mark.parametrize(("data", "begin"), [({}, "</s>"), ({"reset_attention": True}, None)])
def test_pretraining_names_the_begin_that_a_document_saw(
    data: dict[str, Any], begin: str | None, tmp_path: Path
) -> None:
    """The end of the document before it, or where documents are kept apart nothing."""
    tokenizer = load_tokenizer(str(sentencepiece_file(tmp_path / "t.model")))
    model = random_model(LLAMA.with_keys({"vocab_size": tokenizer.vocab_size}))
    trained = model_for(model.config, tokenizer, tokens=named_tokens(tokenizer, data))
    write_export(tmp_path / "out", trained, weights_of(model), ExportSettings())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == begin
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == (None if begin is None else tokenizer.eos_id)


def test_other_ids_of_a_conversation_are_caught(tmp_path: Path) -> None:
    source = source_of("sentencepiece", tmp_path)
    chats = chat_examples(source.encoder.tokenizer)
    whole = chats.examples[0]
    shifted = replace(chats, examples=(replace(whole, ids=(*whole.ids[:-2], whole.ids[-1], whole.ids[-2])),))
    with pytest.raises(ExportError, match="The exported tokenizer differs at token"):
        exported(source, tmp_path / "out", chats=shifted)
    names_as_text = replace(chats, controls=frozenset())
    spelled = replace(source.encoder.tokenizer.roles, names={})
    tokenizer = load_tokenizer(str(tmp_path / "t.model"), spelled)
    model = random_model(LLAMA.with_keys({"vocab_size": tokenizer.vocab_size}))
    trained = model_for(model.config, tokenizer, tokens=named_tokens(tokenizer, CHAT), chats=names_as_text)
    with pytest.raises(ExportError, match="The exported tokenizer differs at token 0"):
        write_export(tmp_path / "out", trained, weights_of(model), ExportSettings())
    assert not (tmp_path / "out").exists()


def test_a_template_that_transformers_refuses_is_caught(tmp_path: Path) -> None:
    source = source_of("json", tmp_path)
    chats = replace(chat_examples(source.encoder.tokenizer), template="{{ raise_exception('no') }}")
    with pytest.raises(ExportError, match="transformers cannot render a conversation with the template: no"):
        exported(source, tmp_path / "out", chats=chats)


@pytest.mark.whole_grid
@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_transformers_4_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    (tmp_path / "marked.jinja").write_text(MARKED)
    source = source_of(kind, tmp_path, str(tmp_path / "marked.jinja"))
    folder = exported(source, tmp_path / "out")
    chats = [conversation_of(random_chat(seed)) for seed in range(8)]
    job = {"texts": ["Hello"], "prompt": "Hello", "max_new_tokens": 2, "tokens": [list(range(5, 25))]}
    job["chats"] = [[dict(message) for message in chat.messages] for chat in chats]
    answers = read_by("transformers 4", [folder], job)[folder]
    assert answers["chats"] == [source.encoder.encode(chat).ids.tolist() for chat in chats]
    prompt = Conversation(chats[0].messages[:-1], frozenset())
    assert answers["chats"][0][: len(source.encoder.prompt(prompt))] == source.encoder.prompt(prompt)

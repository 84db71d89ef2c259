"""An imported folder's tokenizer as transformers uses it, and its settings, written back into an export as they were.

Weights and sizes are the trained model's. What only says how a model is used is the folder's: its files win over
what is known here. Nothing is executed: code that a folder names (auto_map) is left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import processors

from llmtrain.interop.folder_files import read_json
from llmtrain.values.tokenizer import Around

_VOCABULARIES = ("*.model", "vocab.*", "merges.txt", "tokenizer.json", "*.tiktoken")


@dataclass(frozen=True)
class ReaderTokenizer:
    """A tokenizer.json, and the ids that transformers puts before a text."""

    json: str
    before: tuple[int, ...]


def reader_tokenizer(folder: Path, notes: list[str]) -> ReaderTokenizer | None:
    """transformers' tokenizer of a folder; None, and a note, where it cannot use the files.

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


CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = re.compile(r"special_tokens_map\.json|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja")
"""Files that are written back whole; their names come from a file, so no others are."""

USE_KEYS = (
    "finetuning_task", "id2label", "initializer_factor", "initializer_range", "label2id", "prefix", "pretraining_tp",
    "problem_type", "task_specific_params", "tokenizer_class", "use_cache",
)  # fmt: skip
"""Keys of a config.json that no weight depends on."""

_CODE = ("auto_map", "custom_pipelines")
_OURS = {
    "architectures", "dtype", "model_type", "quantization_config", "rope_scaling", "rope_theta", "torch_dtype",
    "transformers_version", *_CODE,
}  # fmt: skip
"""Keys that the trained model answers, or nobody does."""


def carry_config(folder: Path, files: Mapping[str, Any], start_id: int | None, ends: Sequence[int] = ()) -> list[str]:
    """Put the keys of the imported config.json and generation_config.json into those of an export; returns notes.

    Token ids become exactly those of the imported file. `start_id` is what a trained decoder begins with, where there
    is an encoder: it stays. Generation stops at `ends`, where there are some, beside the file's.
    """
    notes: list[str] = []
    written, said = read_json(folder / CONFIG), files.get(CONFIG)
    if said is not None:
        kept = {key: value for key, value in written.items() if not _is_token_id(key)}
        for key, value in said.items():
            if _is_token_id(key) or key in USE_KEYS or (key not in kept and key not in _OURS and key[0] != "_"):
                kept[key] = value
        if start_id is not None and kept.get("decoder_start_token_id") != start_id:
            notes.append(f"{CONFIG}: decoder_start_token_id is {start_id}, with which the decoder was trained to begin")
            kept["decoder_start_token_id"] = start_id
        _write_json(folder / CONFIG, dict(sorted(kept.items())))
    if GENERATION in files:
        generation = {**files[GENERATION], "transformers_version": transformers.__version__}
        if start_id is not None and "decoder_start_token_id" in generation:
            generation["decoder_start_token_id"] = start_id
        _write_json(folder / GENERATION, generation)
    elif said is not None:
        (folder / GENERATION).unlink(missing_ok=True)  # transformers derives one from config.json, as before
    if ends:
        generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
        generation.pop("_from_model_config", None)  # else readers make it anew of config.json, with one end alone
        was = generation.get("eos_token_id", read_json(folder / CONFIG).get("eos_token_id"))
        named = was if isinstance(was, list) else [] if was is None else [was]
        generation["eos_token_id"] = list(dict.fromkeys((*ends, *named)))
        _write_json(folder / GENERATION, {**generation, "transformers_version": transformers.__version__})
    return notes


def _is_token_id(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids"))


def carry_tokenizer(folder: Path, files: Mapping[str, Any], added: Mapping[str, str]) -> list[str]:
    """Write tokenizer_config.json and the files beside it as they were; returns notes.

    `added` are roles of tokens that the export adds to the tokenizer, with their names.
    """
    content = {key: value for key, value in files[TOKENIZER_CONFIG].items() if key not in _CODE}
    notes = [f"{TOKENIZER_CONFIG}: {key} names code, left out" for key in _CODE if key in files[TOKENIZER_CONFIG]]
    _write_json(folder / TOKENIZER_CONFIG, {**added, **content})
    for name, content in files.items():
        if TOKENIZER_FILES.fullmatch(name) is None:
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content, "utf-8")
        else:
            _write_json(folder / name, content)
    return notes


def write_template(folder: Path, template: str | None) -> list[str]:
    """Write the chat template that a model was trained with, of which the control tokens are those; returns notes."""
    if template is None:
        return []
    (folder / CHAT_TEMPLATE).write_text(template, "utf-8")
    content = read_json(folder / TOKENIZER_CONFIG)
    older = content.pop("chat_template", None)
    # Without it, readers of some versions spell the names of control tokens out.
    _write_json(folder / TOKENIZER_CONFIG, {**content, "split_special_tokens": False})
    changed = older is not None and older != template
    return [f"{TOKENIZER_CONFIG}: its chat_template is replaced by that of training"] if changed else []


def follow_training(
    folder: Path, converted: HfTokenizer, own: Around, wanted: Around, joins_pairs: bool = False
) -> list[str]:
    """Have an exported tokenizer put the tokens of training around a text, and not `own`, those it puts by itself.

    `joins_pairs`: one beginning for both texts of a pair, the second of which is of type 1 (BERT). Returns notes. Then
    a reader's prompt has the ids that `llmtrain generate` gives it.
    """
    if own == wanted:
        return []
    converted.post_processor = _template(wanted, converted, joins_pairs)
    converted.save(str(folder / "tokenizer.json"))
    if own == ((), ()):
        return []
    config = folder / TOKENIZER_CONFIG
    content = read_json(config)
    for flag in ("add_bos_token", "add_eos_token"):
        content.pop(flag, None)
    _write_json(config, content)

    def shown(side: tuple[int, ...]) -> str:
        return " ".join(str(converted.id_to_token(token)) for token in side)

    notes = []
    if own[0] and not wanted[0]:
        notes.append(
            f"the tokenizer no longer puts {shown(own[0])} before a text: documents were trained without (data shards "
            "--bos)"
        )
    elif own != wanted:
        notes.append(
            f"the tokenizer now puts {shown(wanted[0])} [text] {shown(wanted[1])} around a text, as in training"
        )
    return notes


def _template(around: Around, converted: HfTokenizer, joins_pairs: bool) -> Any:
    ids = [(str(converted.id_to_token(token)), token) for token in dict.fromkeys((*around[0], *around[1]))]
    before, behind = ([str(converted.id_to_token(token)) for token in side] for side in around)
    single, pair = [*before, "$A", *behind], [*before, "$A", *behind, *before, "$B", *behind]
    if joins_pairs:
        pair = [*before, "$A", *behind, "$B:1", *(f"{name}:1" for name in behind)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

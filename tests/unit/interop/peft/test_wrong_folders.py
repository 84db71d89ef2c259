"""Folders that are no adapters for a base, each with what is wrong and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.errors import ConfigError, DataError, LlmtrainError
from llmtrain.interop.hf import FAMILIES
from llmtrain.interop.peft.reading import open_peft_folder
from llmtrain.interop.peft.settings import OTHER_TYPES
from llmtrain.interop.peft.writing import PeftSettings, write_peft
from tests.unit.interop.peft.adapters import MODELS, random_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter of the Llama."""
    write_peft(tmp_path, random_adapter("llama", {"method": "lora", "lora": {"rank": 4}}), PeftSettings())
    return tmp_path


def setting(**values: Any) -> Change:
    """Settings with other values; None removes one."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        content = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def tensor(**changes: Tensor | None) -> Change:
    """Tensors of the first query, or by whole names with _ for dots, with other values; None removes one."""

    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        held = load_file(file)
        for key, value in changes.items():
            name = f"{Q}{key}.weight" if key in ("A", "B") else key.replace("__", ".")
            held.pop(name, None)
            if value is not None:
                held[name] = value
        save_file(held, file)

    return change


def flipped(folder: Path) -> None:
    """A length in the header that no longer is one."""
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[5] ^= 0xFF
    file.write_bytes(content)


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


UNKNOWN = "base_model__model__model__layers__0__self_attn__query__lora_A__weight"
WHOLE = "base_model__model__model__norm__weight"

WRONG: list[tuple[str, Change, type[LlmtrainError], str]] = [
    ("no settings", lambda f: (f / "adapter_config.json").unlink(), ConfigError, "holds no adapter_config.json"),
    ("settings are no JSON", lambda f: (f / "adapter_config.json").write_text("{"), DataError, "no valid JSON"),
    ("settings are a list", lambda f: (f / "adapter_config.json").write_text("[]"), DataError, "must be a JSON object"),
    ("no kind", setting(peft_type=None), ConfigError, "peft_type = None is not read. LORA and PROMPT_TUNING are"),
    ("of AdapterHub", setting(peft_type=None, model_type="llama"), ConfigError, "AdapterHub.*only written"),
    ("unknown kind", setting(peft_type="FOO"), ConfigError, "peft_type = 'FOO' is not read. LORA"),
    ("kind is a list", setting(peft_type=["LORA"]), ConfigError, "peft_type = .*is not read"),
    *(
        (kind, setting(peft_type=kind), ConfigError, f"'{kind}' is not read: it {OTHER_TYPES[kind]}")
        for kind in ("IA3", "PREFIX_TUNING", "ADALORA")
    ),
    ("DoRA", setting(use_dora=True), ConfigError, "use_dora = True.*merge_and_unload"),
    ("biases", setting(bias="all"), ConfigError, "bias = 'all'"),
    ("bias of B", setting(lora_bias=True), ConfigError, "lora_bias = True"),
    ("patterns", setting(alpha_pattern={r".*\.(q|k)_proj": 8}), ConfigError, "are no plain names of modules"),
    ("patterns of numbers", setting(rank_pattern=[1]), ConfigError, "rank_pattern = .*no plain names"),
    ("changed base", setting(init_lora_weights="pissa_niter_4"), ConfigError, "has changed the base's weights"),
    ("key of a later version", setting(new_idea={"x": 1}), ConfigError, "new_idea = "),
    ("rank 0", setting(r=0), DataError, "r = 0: must be a number greater than 0"),
    ("rank is a text", setting(r="8"), DataError, "r = '8': must be a number"),
    ("alpha is missing", setting(lora_alpha=None), DataError, "lora_alpha = None"),
    ("no weights", lambda f: (f / "adapter_model.safetensors").unlink(), DataError, "Copy the folder again"),
    ("a pickle", only_a_pickle, ConfigError, "is a pickle, which can run any code"),
    ("a damaged header", flipped, DataError, "is no valid safetensors file"),
    ("cut", lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10"), DataError, "is no valid safetensors"),
    ("A alone", tensor(B=None), DataError, "q_proj has no lora_B"),
    ("no rank", tensor(A=torch.zeros(0, 48), B=torch.zeros(48, 0)), DataError, "no matrices with a rank"),
    ("vectors", tensor(A=torch.zeros(48)), DataError, "no matrices with a rank"),
    ("another width", tensor(A=torch.zeros(4, 64)), DataError, "takes 64 and gives 48, the base's takes 48"),
    ("another height", tensor(B=torch.zeros(96, 4)), DataError, "does not fit the base"),
    ("A and B of two ranks", tensor(A=torch.zeros(8, 48)), DataError, "A has the rank 8 and B 4"),
    ("no such rank", tensor(A=torch.zeros(8, 48), B=torch.zeros(48, 8)), DataError, "the rank 8, and .* says 4"),
    ("rank of a setting", setting(rank_pattern={"q_proj": 8}), DataError, "has the rank 4, and .* says 8"),
    ("unknown module", tensor(**{UNKNOWN: torch.zeros(4, 48)}), DataError, "query has no lora_B"),
    (
        "unknown modules",
        tensor(**{UNKNOWN: torch.zeros(4, 48), UNKNOWN.replace("_A_", "_B_"): torch.zeros(48, 4)}),
        DataError, r"layers\.0\.self_attn\.query is no linear .*The nearest is model\.layers\.0\.self_attn\.[a-z]_proj",
    ),
    ("unknown tensor", tensor(base_model__model__model__nrm__weight=torch.zeros(48)), DataError, "nearest is .*norm"),
    ("norm of another width", tensor(**{WHOLE: torch.zeros(64)}), DataError, r"has the shape \[64\].*\[48\]"),
    (
        "grown vocabulary", tensor(base_model__model__lm_head__weight=torch.zeros(310, 48)), DataError, "had grown",
    ),
    ("no tensors", lambda f: save_file({}, f / "adapter_model.safetensors"), DataError, "has no lora_A and lora_B"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "says"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_it_is_explained(folder: Path, change: Change, kind: type[LlmtrainError], says: str) -> None:
    open_peft_folder(folder, FAMILIES["llama"], MODELS["llama"])
    change(folder)
    with pytest.raises(kind, match=f"(?s){says}") as error:
        open_peft_folder(folder, FAMILIES["llama"], MODELS["llama"])
    assert type(error.value) is kind and str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "bert", "mixtral", "llama head_dim"])
def test_an_adapter_of_another_base_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"another base|another one") as error:
        open_peft_folder(folder, FAMILIES[name.split()[0]], MODELS[name])
    assert "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting(num_virtual_tokens=9), r"\[9, 48\]"),
        (setting(num_transformer_submodules=2), "prompt of the decoder's own"),
        (
            lambda f: save_file({"x": torch.zeros(1)}, f / "adapter_model.safetensors"),
            "has no tensor prompt_embeddings",
        ),
    ],
)
def test_wrong_prompts(tmp_path: Path, change: Change, says: str) -> None:
    write_peft(tmp_path, random_adapter("llama", {"method": "prompt", "prompt": {"tokens": 5}}), PeftSettings())
    found = open_peft_folder(tmp_path, FAMILIES["llama"], MODELS["llama"])
    assert found.finetune.prompt.tokens == 5 and list(found.tensors) == ["embeddings.prompt.weight"]
    change(tmp_path)
    with pytest.raises(LlmtrainError, match=says):
        open_peft_folder(tmp_path, FAMILIES["llama"], MODELS["llama"])

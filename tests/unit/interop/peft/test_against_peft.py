"""PEFT computes from our folders what we compute, and we from its folders what it computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.interop.examples import Example
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.peft.adapted import AdaptedWeights
from llmtrain.interop.peft.reading import open_peft_folder
from llmtrain.interop.peft.writing import PeftSettings, write_peft
from llmtrain.interop.proof import their_inputs
from tests.support.readers import judged_by_peft
from tests.unit.interop.models import random_example
from tests.unit.interop.peft.adapters import (
    MODELS,
    adapted_logits,
    merged_logits,
    random_adapter,
    write_base,
    write_inputs,
)

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rank": 4, "alpha": 8}),
    "llama some layers": (
        "llama", {"rank": 3, "alpha": 5, "rslora": True, "targets": ["attention.q", "decoder.layers.1.mlp.*"]},
    ),
    "llama norms and head": ("llama", {"rank": 2, "train_also": ["*norm*", "head.weight"]}),
    "llama tied embeddings": ("llama tied", {"rank": 2, "train_also": ["embeddings.word.weight"]}),
    "gpt2 tied embeddings": ("gpt2", {"rank": 2, "train_also": ["embeddings.*"]}),
    "bert tied embeddings": ("bert", {"rank": 2, "train_also": ["embeddings.*"]}),
    "t5 tied embeddings": ("t5", {"rank": 2, "train_also": ["embeddings.*", "*position_bias*"]}),
    "mistral": ("mistral", {"rank": 4}),
    "qwen3": ("qwen3", {"rank": 4, "train_also": ["*.q_norm.*"]}),
    "gpt2": ("gpt2", {"rank": 4, "alpha": 8}),
    "gpt2 q and v": ("gpt2", {"rank": 4, "alpha": 6, "rslora": True, "targets": ["attention.q", "attention.v"]}),
    "gpt2 q": ("gpt2", {"rank": 4, "targets": ["attention.q", "decoder.layers.1.attention.k"]}),
    "bert": ("bert", {"rank": 4, "train_also": ["mlm.dense.*", "mlm.norm.*"]}),
    "bert classifier": ("bert classifier", {"rank": 4}),
    "bert token_classifier": ("bert token_classifier", {"rank": 4, "targets": ["attention"]}),
    "bert span": ("bert span", {"rank": 4}),
    "llama token_classifier": ("llama token_classifier", {"rank": 2, "targets": ["mlp"]}),
    "t5": ("t5", {"rank": 4}),
    "t5 cross": ("t5 v1.1", {"rank": 4, "targets": ["cross_attention", "mlp.gate"]}),
    "switch": ("switch_transformers", {"rank": 4}),
    "mixtral": ("mixtral", {"rank": 4, "alpha": 8}),
    "mixtral up": ("mixtral", {"rank": 3, "rslora": True, "targets": ["attention", "experts.up"]}),
    "mixtral down": ("mixtral", {"rank": 2, "targets": ["experts.down"]}),
}  # fmt: skip
"""Our adapters: the model, and finetune.lora."""

EVERY_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": EVERY_LLAMA}),
    "llama patterns": (
        "llama",
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3},
        },
    ),
    "llama first layer": ("llama", {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [0]}),
    "llama head": ("llama", {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 triple rank": (
        "gpt2", {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "rank_pattern": {"c_attn": 6}},
    ),
    "bert": ("bert", {"r": 4, "target_modules": ["query", "value", "attention.output.dense"]}),
    "bert classifier": ("bert classifier", {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bert span": ("bert span", {"r": 4, "target_modules": ["query"], "task_type": "QUESTION_ANS"}),
    "t5": ("t5", {"r": 4, "target_modules": ["q", "v", "wi"]}),
    "switch": ("switch_transformers", {"r": 4, "target_modules": ["q", "expert_1.wi"]}),
    "mixtral": (
        "mixtral",
        {
            "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "mixtral down": (
        "mixtral", {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
}  # fmt: skip
"""Adapters that PEFT makes, with random A and B: the model, and its LoraConfig."""


PROMPTS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TOKENS = 5


def shorter_example(name: str) -> Example:
    """Learned positions leave room for a prompt."""
    example = random_example(MODELS[name])
    return Example(example.tokens_BS[:, :40]) if MODELS[name].family == "decoder" else example


def prompted(example: Example) -> Example:
    """The places of a prompt before what the model reads; their tokens do not matter."""

    def behind(tokens_BS: torch.Tensor | None, value: int) -> torch.Tensor | None:
        return None if tokens_BS is None else torch.nn.functional.pad(tokens_BS, (TOKENS, 0), value=value)

    if example.encoder_tokens_BT is None:
        return Example(torch.nn.functional.pad(example.tokens_BS, (TOKENS, 0), value=7))
    valid_BT = example.encoder_valid_BT
    encoder = (behind(example.encoder_tokens_BT, 7), None if valid_BT is None else behind(valid_BT, True))
    return Example(example.tokens_BS, example.valid_BS, *encoder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that PEFT is asked, in one process: importing it takes longer than all of it."""
    place = tmp_path_factory.mktemp("peft")
    tasks: list[dict[str, Any]] = []
    for number, name in enumerate(sorted({model for model, _ in (*OURS.values(), *THEIRS.values())})):
        write_base(place / "bases" / name, name)
        write_inputs(place / f"inputs-{name}.safetensors", name)
        assert number < len(MODELS)
    for case, (name, lora) in OURS.items():
        folder = place / "ours" / case
        folder.mkdir(parents=True)
        write_peft(folder, random_adapter(name, {"method": "lora", "lora": lora}), PeftSettings())
        tasks.append({"adapter": str(folder), **_task(place, name, f"ours-{case}")})
    for case, (name, config) in THEIRS.items():
        kinds = {"bert": None, "t5": "SEQ_2_SEQ_LM", "switch_transformers": "SEQ_2_SEQ_LM"}
        settings = {"class": "LoraConfig", "task_type": kinds.get(name, "CAUSAL_LM"), **config}
        made = {"config": settings, "seed": 11, "make": str(place / "theirs" / case)}
        tasks.append({**made, **_task(place, name, f"theirs-{case}")})
    for name, kind in PROMPTS.items():
        folder, adapter = place / "ours" / f"prompt {name}", random_adapter(name, PROMPT)
        folder.mkdir(parents=True)
        write_peft(folder, adapter, PeftSettings())
        inputs = place / f"inputs-prompt {name}.safetensors"
        held = their_inputs(shorter_example(name))
        save_file({key: value.contiguous() for key, value in held.items() if value is not None}, inputs)
        task = _task(place, name, f"ours-prompt {name}") | {"inputs": str(inputs)}
        tasks.append({"adapter": str(folder), **task})
        config = {"class": "PromptTuningConfig", "task_type": kind, "num_virtual_tokens": TOKENS}
        config |= {"num_transformer_submodules": 1}
        made = {"config": config, "seed": 12, "make": str(place / "theirs" / f"prompt {name}")}
        tasks.append({**made, **task, "out": str(place / f"theirs-prompt {name}.safetensors")})
    for task, fault in zip(tasks, judged_by_peft(tasks), strict=True):
        Path(f"{task['out']}.txt").write_text(fault)
    return place


PROMPT = {"method": "prompt", "prompt": {"tokens": TOKENS}}


def _task(place: Path, name: str, out: str) -> dict[str, str]:
    files = {"base": place / "bases" / name, "inputs": place / f"inputs-{name}.safetensors"}
    return {key: str(path) for key, path in {**files, "out": place / f"{out}.safetensors"}.items()}


def logits_in(file: Path) -> dict[str, torch.Tensor]:
    """What PEFT has computed, adapted and merged."""
    assert not (fault := Path(f"{file}.txt").read_text()), fault
    return load_file(file)


def require_near(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    valid = random_example(MODELS[name]).valid_BS
    apart = (ours - theirs).abs().amax(-1)
    if valid is not None and apart.dim() == 2:
        apart = apart.masked_fill(~valid, 0.0)
    difference, bound = float(apart.max()), 1e-5 * max(1.0, float(theirs.abs().max()))
    assert difference <= bound


@pytest.mark.parametrize("case", OURS)
def test_peft_computes_what_we_compute(place: Path, case: str) -> None:
    name, lora = OURS[case]
    adapter, example = random_adapter(name, {"method": "lora", "lora": lora}), random_example(MODELS[name])
    theirs = logits_in(place / f"ours-{case}.safetensors")
    adapted = adapted_logits(adapter.source, adapter.model, adapter.finetune, example)
    merged = merged_logits(adapter.source, adapter.model, adapter.finetune, example)
    for ours in (adapted, merged):
        for logits in theirs.values():
            require_near(ours, logits, name)


@pytest.mark.parametrize("case", THEIRS)
def test_we_compute_what_peft_computes(place: Path, case: str) -> None:
    name, _ = THEIRS[case]
    base = open_hf_folder(place / "bases" / name)
    found = open_peft_folder(place / "theirs" / case, base.family, base.model)
    source, example = AdaptedWeights(base, found.tensors), random_example(MODELS[name])
    theirs = logits_in(place / f"theirs-{case}.safetensors")
    for ours in (
        adapted_logits(source, base.model, found.finetune, example),
        merged_logits(source, base.model, found.finetune, example),
    ):
        for logits in theirs.values():
            require_near(ours, logits, name)


@pytest.mark.parametrize("name", PROMPTS)
def test_soft_prompts_are_the_same_on_both_sides(place: Path, name: str) -> None:
    """The logits of the text are compared."""
    base, adapter = open_hf_folder(place / "bases" / name), random_adapter(name, PROMPT)
    read = open_peft_folder(place / "theirs" / f"prompt {name}", base.family, base.model)
    example = shorter_example(name)
    for made, source, finetune in (
        ("ours", adapter.source, adapter.finetune),
        ("theirs", AdaptedWeights(base, read.tensors), read.finetune),
    ):
        ours = adapted_logits(source, base.model, finetune, prompted(example))[:, -example.tokens_BS.shape[1] :]
        theirs = logits_in(place / f"{made}-prompt {name}.safetensors")["adapted"][:, -example.tokens_BS.shape[1] :]
        require_near(ours, theirs, name)

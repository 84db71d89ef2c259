"""A run continues a checkpoint only with what it was trained with, or with what is allowed by name."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llmtrain.config.data import DataConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.models.transformer import build_model
from llmtrain.preflight.data_identity import FREE_DATA_KEYS
from llmtrain.preflight.differences import FREE_MODEL_KEYS, shape_keys
from llmtrain.preflight.resume_rules import is_allowed
from llmtrain.runs.audit import iter_events
from tests.support.run_files import GOOD_RUN, write_data_set, write_good_run
from tests.unit.checkpoint.saved import save
from tests.unit.train.saved_run import check, save_of_run, start

NEWEST = "runs/small/checkpoints/step-00000010"

SHAPES = {
    "num_layers": ("3", "2"),
    "hidden_size": ("96", "64"),
    "num_heads": ("2", "4"),
    "num_kv_heads": ("2", "4"),
    "head_dim": ("32", "16"),
    "ffn_hidden_size": ("128", "192"),
    "tie_embeddings": ("false", "true"),
    "position": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("post", "pre"),
    "activation": ("gelu", "swiglu"),
    "bias": ("true", "false"),
    "qk_norm": ("true", "false"),
    "token_types": ("2", "0"),
    "embedding_norm": ("true", "false"),
}
"""Keys that change the weights' shapes: the value now, and the checkpoint's."""

NUMBERS = {
    "dropout": ("0.5", "0.0"),
    "attention_dropout": ("0.5", "0.0"),
    "rope_theta": ("500000.0", "10000.0"),
    "rope_scaling": ("{factor: 4.0}", "null"),
    "norm_eps": ("0.001", "1e-05"),
    "activation": ("geglu", "swiglu"),
    "gelu_approximate": ("none", "tanh"),
    "scaled_head": ("true", "false"),
}
"""Keys that change what the same weights compute."""

STREAM = {
    "seq_len": ("32", "64"),
    "reset_positions": ("true", "false"),
    "reset_attention": ("true", "false"),
    "shuffle_shards": ("4", "8"),
    "objective": ("prefix", "causal"),
    "windows": ("per_shard", "continuous"),
}
"""Keys that change what sample n is."""

ALLOWABLE = [*(("model", key, *values) for key, values in NUMBERS.items()),
             *(("data", key, *values) for key, values in STREAM.items())]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The good run with a checkpoint of step 10."""
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    save_of_run(10)
    return tmp_path


def write_key(section: str, key: str, value: str) -> int:
    """Set a key in run.yaml; returns its line."""
    lines, inside = [], ""
    for line in GOOD_RUN.splitlines():
        inside = line if line.endswith(":") else inside
        if not (inside == f"{section}:" and line.startswith(f"  {key}:")):
            lines.append(line)
    place = lines.index(f"{section}:") + 1
    Path("run.yaml").write_text("\n".join([*lines[:place], f"  {key}: {value}", *lines[place:]]) + "\n")
    return place + 1


def test_the_unchanged_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys) == (0, "")
    assert start().step == 10
    assert capsys.readouterr().err == ""
    assert list(iter_events(Path("runs/small"))) == []


@pytest.mark.parametrize(("key", "now", "was"), [(key, *values) for key, values in SHAPES.items()])
def test_another_shape_is_refused_whatever_is_allowed(
    key: str, now: str, was: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = write_key("model", key, now)
    code, err = check(capsys, f"checkpoint.allow_change=[model, model.{key}]")
    assert code == 2
    assert f"model.{key} = {now} (run.yaml:{line}): the checkpoint {NEWEST} has {was}. Set it back." in err
    assert "can never be allowed" in err
    assert err.endswith("1 problem in run.yaml; nothing was started.\n")
    with pytest.raises(ConfigError, match=f"model.{key} = {now}: the checkpoint"):
        start("checkpoint.allow_change=[model]")


@pytest.mark.parametrize(("section", "key", "now", "was"), ALLOWABLE)
def test_other_numbers_are_refused_unless_allowed(
    section: str, key: str, now: str, was: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = write_key(section, key, now)
    code, err = check(capsys)
    assert code == 2
    assert f"error: {section}.{key} = " in err
    assert f"(run.yaml:{line}): the checkpoint {NEWEST} has {was}. Set it back, choose another name, " in err
    assert f"or allow it with checkpoint.allow_change=[{section}.{key}]." in err
    assert err.endswith("1 problem in run.yaml; nothing was started.\n")
    for allowed in (f"{section}.{key}", section):
        assert check(capsys, f"checkpoint.allow_change=[{allowed}]") == (0, "")
    assert check(capsys, f"checkpoint.allow_change=[{section}.train, seed, model.attention]")[0] == 2


def test_every_key_of_model_and_data_is_tried() -> None:
    """A new key is compared by itself; this test asks for its place in the tables above."""
    one_choice = {"family", "attention"}
    elsewhere = {"vocab_size", "max_seq_len", "num_encoder_layers", "head", "moe"}
    elsewhere |= {"num_labels", "labels", "head_dropout"}  # in test_label_heads.py
    elsewhere |= {"relative_buckets", "relative_max_distance"}  # a rule refuses them where they have no effect
    assert {*SHAPES, *NUMBERS, *FREE_MODEL_KEYS, *one_choice, *elsewhere} == set(ModelConfig.model_fields)
    of_objectives = {"masked", "span_corruption", "ul2", "prefix", "fim", "chat", "labels", "special_tokens", "augment"}
    elsewhere = {"train", "tokenizer", "schedule", "packing"}  # the last two in test_source_use.py
    assert {*STREAM, *FREE_DATA_KEYS, *of_objectives, *elsewhere} == set(DataConfig.model_fields)


def test_an_objective_s_own_keys_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    save_of_run(20, "data.objective=prefix", name="other")
    same = ("name=other", "data.objective=prefix")
    assert check(capsys, *same) == (0, "")
    code, err = check(capsys, *same, "data.prefix.min_share=0.5")
    assert code == 2 and "data.prefix.min_share = 0.5 (command line): the checkpoint" in err and "has 0.25" in err
    assert check(capsys, *same, "data.prefix.min_share=0.5", "checkpoint.allow_change=[data.prefix]") == (0, "")


def test_shape_keys_are_those_that_change_the_model_s_tensors() -> None:
    base: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 300}
    one = ModelConfig(**base)
    tried = {
        **SHAPES,
        "vocab_size": ("500", ""),
        **{key: values for key, values in NUMBERS.items() if key != "activation"},
    }
    values = {key: ModelConfig.model_validate({**base, **yaml_of(f"{key}: {now}")}) for key, (now, _) in tried.items()}
    shapes = {key: tensors(model) for key, model in values.items()}
    assert len(shapes) > 15
    for key, found in shapes.items():
        # As many heads as there are, each half as wide: the same tensors, read in another way.
        assert (found != tensors(one) or key == "num_heads") == (key in shape_keys(one, values[key])), key
    moe = {"moe": {"num_experts": 4, "ffn_hidden_size": 64}}
    changed: dict[str, list[dict[str, Any]]] = {
        "num_encoder_layers": [{"family": "encoder_decoder", "num_encoder_layers": count} for count in (2, 3)],
        "head": [{"family": "encoder", "head": head} for head in ("linear", "mlm")],
        "position": [{"position": position} for position in ("none", "t5_relative")],
        "relative_buckets": [{"position": "t5_relative", "relative_buckets": count} for count in (8, 16)],
        "moe": [{}, moe],
    }
    inner = {"num_experts": 8, "every_n_layers": 2, "num_shared_experts": 1}
    pairs = [*changed.items(), *(("moe", [moe, {"moe": {**moe["moe"], key: value}}]) for key, value in inner.items())]
    for key, (before, after) in pairs:
        was, now = (ModelConfig.model_validate({**base, **keys}) for keys in (before, after))
        assert tensors(was) != tensors(now) and key in shape_keys(was, now), key
    learned = [ModelConfig(**base, position="learned", max_seq_len=size) for size in (64, 128)]
    assert tensors(learned[0]) != tensors(learned[1])
    assert "max_seq_len" in shape_keys(*learned)


def yaml_of(text: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(text)


def tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build_model(model).named_parameters()}


def test_all_differences_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    write_key("model", "num_layers", "3")
    write_data_set(Path("shards/other"), tokens=2000)
    others = ("data.train.0.path=shards/other", "seed=7", "model.dropout=0.1", "data.seq_len=32")
    code, err = check(capsys, *others, "optim.lr=fast")
    assert code == 2
    for said in ("model.num_layers = 3", "seed = 7 (command line)", "model.dropout", "data.seq_len", "shards/other"):
        assert said in err
    assert "optim.lr = fast" in err
    assert err.endswith("6 problems in run.yaml; nothing was started.\n")


def test_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("run.yaml").open("a") as file:
        file.write("seed: 7\n")
    code, err = check(capsys)
    assert code == 2
    assert err.startswith(
        f"error: seed = 7 (run.yaml:14): the checkpoint {NEWEST} has 1234. Set it back, choose another name, or allow "
        "it with checkpoint.allow_change=[seed]."
    )
    assert check(capsys, "checkpoint.allow_change=[seed]") == (0, "")
    assert check(capsys, "name=other") == (0, "")


def test_what_is_allowed_is_recorded_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = start("seed=7", "model.dropout=0.5", "optim.lr=0.1", "checkpoint.allow_change=[seed, model.dropout]")
    assert found.step == 10
    said = capsys.readouterr().err
    assert said == f"changed since {NEWEST}: model.dropout 0.0 -> 0.5, seed 1234 -> 7, optim.lr 0.0003 -> 0.1\n"
    events = [{name: event[name] for name in event if name != "time"} for event in iter_events(Path("runs/small"))]
    place = {"event": "changed", "checkpoint": NEWEST, "step": 10}
    assert events == [
        {**place, "key": "model.dropout", "was": 0.0, "now": 0.5},
        {**place, "key": "seed", "was": 1234, "now": 7},
    ]


@pytest.mark.parametrize(
    "change",
    [
        ("train.global_batch_size=16", "train.micro_batch_size=2", "train.precision=bf16", "train.recompute=full"),
        ("train.steps=50", "train.compile=true", "optim.lr=1e-2", "optim.schedule=constant", "health.rollback=true"),
        ("engine.name=megatron", "parallel.tensor=2", "launch.num_workers=2", "observe.log_every_steps=7"),
        ("engine.name=deepspeed", "engine.zero_stage=3", "launch.num_workers=2", "checkpoint.keep=9"),
        ("data.prefetch_steps=0", "data.verify=always", "data.on_corrupt=skip", "data.cache_dir=cache"),
        ("data.valid=[{path: shards/train}]", "evaluate.every_steps=5", "model.init.std=0.5", "model.max_seq_len=256"),
        ("model.num_kv_heads=4", "model.head_dim=16", "model.vocab_size=300", "data.train.0.weight=3"),
    ],
)
def test_what_may_change_at_any_time(change: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, *change) == (0, "")
    assert start(*change).step == 10
    assert list(iter_events(Path("runs/small"))) == []


def test_moments_of_another_optimizer_are_refused_whatever_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = check(capsys, "optim.name=lion", "checkpoint.allow_change=[optim]")
    assert code == 2
    assert f"the checkpoint {NEWEST} has the moments of another optimizer, adamw. Set it back." in err
    with pytest.raises(ConfigError, match=r"optim\.name = lion: the checkpoint"):
        start("optim.name=lion", "checkpoint.allow_change=[optim]")


def test_batch_size_and_optimizer_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    start("train.global_batch_size=16", "optim.betas=[0.9, 0.99]", "optim.loss_scale.minimum=2.0")
    assert capsys.readouterr().err == (
        f"changed since {NEWEST}: optim.betas [0.9, 0.95] -> [0.9, 0.99], optim.loss_scale.minimum 1.0 -> 2.0, "
        "train.global_batch_size 8 -> 16\n"
    )


def test_learned_positions_have_a_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_of_run(20, "model.position=learned", name="learned")
    code, err = check(capsys, "name=learned", "model.position=learned", "model.max_seq_len=256")
    assert code == 2
    assert "model.max_seq_len = 256" in err and "can never be allowed" in err


def test_a_newer_checkpoint_with_damage_is_left_to_the_opening(capsys: pytest.CaptureFixture[str]) -> None:
    newer = save_of_run(20, "seed=7")
    state = newer / "state.json"
    state.write_bytes(state.read_bytes().replace(b"1", b"2", 1))
    code, err = check(capsys)
    assert code == 0 and err.startswith(f"warning: {state}: its sha256 is not") and "passed over" in err
    assert start().step == 10
    assert not newer.exists() and newer.with_name(f"damaged-{newer.name}").exists()


def test_the_decision_at_the_start_sees_what_the_early_look_could_not() -> None:
    """The newest one is whole in its small files and damaged in its tensors: an older one counts, with another seed."""
    newer = save_of_run(20, "seed=7")
    tensors = newer / "rank-00000.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=f"seed = 7: the checkpoint {NEWEST} has 1234"):
        start("seed=7")


def test_a_checkpoint_of_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    resume = "checkpoint.resume=runs/small"
    assert check(capsys, "name=new", resume) == (0, "")
    code, err = check(capsys, "name=new", resume, "seed=7")
    assert code == 2
    assert "Set it back, take another checkpoint, or allow it with checkpoint.allow_change=[seed]." in err
    save_of_run(5, "seed=7", name="new")
    assert check(capsys, "name=new", resume, "seed=7") == (0, "")  # it has one of its own by now


def test_an_architecture_of_another_version(capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("runs/small/checkpoints"), 20, config_text="model: {attention: {kind: spiral}}\n")
    code, err = check(capsys)
    assert code == 3
    assert "model.attention.kind" in err and "Another version of llmtrain" in err
    with pytest.raises(CheckpointError, match=r"model\.attention\.kind"):
        start()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("sed", "Did you mean seed?"),
        ("data.trian", "Did you mean data.train?"),
        ("dropout", "Did you mean model.dropout, finetune.lora.dropout or distill.model.dropout?"),
        ("xyzzy", "Write keys or sections"),
    ],
)
def test_allowing_an_unknown_key_is_a_mistake(name: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = check(capsys, f"checkpoint.allow_change=[seed, {name}]", "seed=7")
    assert code == 2
    assert f"checkpoint.allow_change.1 = {name} (command line): is not a key. {advice}" in err
    assert err.endswith("1 problem in run.yaml; nothing was started.\n")


def test_a_name_allows_what_lies_below_it_only() -> None:
    assert is_allowed("data.train.0.path", ["data.train"])
    assert is_allowed("data.train", ["data.train"])
    assert not is_allowed("data.train", ["data.train.0"])
    assert not is_allowed("data.tokenizer", ["data.train", "data.token"])
    assert not is_allowed("seed", [])


def test_the_number_of_experts_is_fixed_and_their_loss_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    save_of_run(20, "model.moe={num_experts: 4}", name="experts")
    same = ("name=experts", "model.moe={num_experts: 4}", "checkpoint.allow_change=[model]")
    assert check(capsys, *same, "model.moe.aux_loss_coeff=0.5") == (0, "")
    code, err = check(capsys, *same, "model.moe.num_experts=8")
    assert code == 2 and "model.moe.num_experts = 8" in err and "can never be allowed" in err

"""A run continues a checkpoint only with what it was trained with, or with what is allowed by name."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llmtrain.cli import main
from llmtrain.config.load import load_config
from llmtrain.config.model import ModelConfig
from llmtrain.config.rendering import to_yaml
from llmtrain.config.schema import DataConfig
from llmtrain.data.shards import ShardEntry, file_sha256, read_manifest, write_manifest
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.models.build import build_model
from llmtrain.observe.audit import iter_events
from llmtrain.train.continuity import FREE_DATA_KEYS, FREE_MODEL_KEYS, is_allowed, shape_keys
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.setup import find_start
from tests.support.run_files import GOOD_RUN, write_data_set, write_good_run
from tests.unit.checkpoint.saved import save
from tests.unit.train.saved_run import save_import, save_of_run

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
}
"""Keys that change what the same weights compute."""

STREAM = {
    "seq_len": ("32", "64"),
    "reset_positions": ("true", "false"),
    "reset_attention": ("true", "false"),
    "shuffle_shards": ("4", "8"),
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


def check(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    """Exit code and stderr of the real command, which stops before it starts anything."""
    with pytest.raises(SystemExit) as ended:
        main(["train", "run.yaml", *overrides, "--dry-run"])
    return int(ended.value.code or 0), capsys.readouterr().err


def start(*overrides: str) -> Any:
    """What a rank decides, with the run folder locked."""
    config = load_config(Path("run.yaml"), overrides).config
    with RunFolder(Path("runs/small")) as held:
        return find_start(config, held)


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


def rewrite_shards(folder: Path, *shards: ShardEntry) -> None:
    """Other shards in a data set's manifest."""
    write_manifest(folder, replace(read_manifest(folder), shards=shards))


def shard(number: int, content: str) -> ShardEntry:
    return ShardEntry(f"{number}.tar", 1, content * 64, f"{number}.idx", "0" * 64, samples=10, tokens=1000)


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
    elsewhere = {"vocab_size", "max_seq_len"}
    assert {*SHAPES, *NUMBERS, *FREE_MODEL_KEYS, *one_choice, *elsewhere} == set(ModelConfig.model_fields)
    one_choice, elsewhere = {"objective"}, {"train", "tokenizer"}
    assert {*STREAM, *FREE_DATA_KEYS, *one_choice, *elsewhere} == set(DataConfig.model_fields)


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


def test_a_moved_data_set_is_no_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(folder / "shards", folder / "elsewhere")
    entry = read_manifest(folder / "elsewhere/train").shards[0]
    rewrite_shards(folder / "elsewhere/train", replace(entry, file="renamed.tar", index_file="renamed.idx"))
    moved = "data.train.0.path=elsewhere/train"
    assert check(capsys, moved) == (0, "")
    assert start(moved).step == 10


@pytest.mark.parametrize("change", ["one more", "one less", "other order", "other tokens"])
def test_a_changed_data_set_is_refused(change: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three = [shard(0, "a"), shard(1, "b"), shard(2, "c")]
    rewrite_shards(folder / "shards/train", *three)
    save_of_run(20)
    assert check(capsys) == (0, "")
    after = {
        "one more": [*three, shard(3, "d")],
        "one less": three[:2],
        "other order": [three[1], three[0], three[2]],
        "other tokens": [*three[:2], shard(2, "d")],
    }
    rewrite_shards(folder / "shards/train", *after[change])
    code, err = check(capsys)
    assert code == 2
    assert err.startswith("error: data.train.0.path = shards/train (run.yaml:8): its content has sha256 ")
    assert "the checkpoint runs/small/checkpoints/step-00000020 was trained on shards/train with " in err
    assert err.endswith("1 problem in run.yaml; nothing was started.\n")
    with pytest.raises(ConfigError, match="its content has sha256"):
        start()
    for allowed in ("data.train", "data.train.0.path", "data"):
        assert check(capsys, f"checkpoint.allow_change=[{allowed}]") == (0, "")


def test_a_mixture_s_sources_shares_and_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data_set(folder / "shards/more", tokens=2000)

    def mixture(*sources: tuple[str, int]) -> str:
        return f"data.train=[{', '.join(f'{{path: shards/{name}, weight: {weight}}}' for name, weight in sources)}]"

    save_of_run(20, mixture(("train", 2), ("more", 4)))
    assert check(capsys, mixture(("train", 1), ("more", 2))) == (0, "")

    code, err = check(capsys, mixture(("train", 1), ("more", 3)))
    assert code == 2 and "data.train.0.weight = 1" in err and "step-00000020 has 4." in err
    code, err = check(capsys, mixture(("more", 2), ("train", 4)))
    assert code == 2 and "data.train.0.path = shards/more" in err and "data.train.1.path = shards/train" in err
    code, err = check(capsys)
    assert code == 2 and 'was trained on ["shards/train", "shards/more"]' in err
    assert "allow_change=[data.train]." in err


def test_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = folder / "other.model"
    tokenizer.write_text("other pieces")
    write_data_set(folder / "shards/other", vocab_size=301, tokenizer_sha256=file_sha256(tokenizer))
    others = ("data.train.0.path=shards/other", "data.tokenizer=other.model")
    code, err = check(capsys, *others)
    assert code == 2
    told = file_sha256(tokenizer)[:12]
    assert f"data.tokenizer = other.model (command line): the tokenizer of shards/other has sha256 {told}" in err
    assert f"that of the checkpoint {NEWEST} has {'a' * 12}. " in err
    assert "model.vocab_size = 301 (default): the checkpoint" in err
    assert err.endswith("3 problems in run.yaml; nothing was started.\n")


def test_a_newer_checkpoint_with_damage_is_left_to_the_opening(capsys: pytest.CaptureFixture[str]) -> None:
    newer = save_of_run(20, "seed=7")
    state = newer / "state.json"
    state.write_bytes(state.read_bytes().replace(b"1", b"2", 1))
    assert check(capsys) == (0, "")
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


def test_imported_weights_need_their_shape_and_tokenizer_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(Path("run.yaml"), ["model.vocab_size=300"]).config
    save_import(folder / "weights", to_yaml(config))
    resume = ("name=tuned", "checkpoint.resume=weights")
    assert check(capsys, *resume, "seed=7", "data.seq_len=32", "model.dropout=0.1") == (0, "")
    with RunFolder(Path("runs/tuned")) as held:
        find_start(load_config(Path("run.yaml"), [*resume, "seed=7", "model.dropout=0.1"]).config, held)
    assert "model.dropout 0.0 -> 0.1\n" in capsys.readouterr().err
    assert list(iter_events(Path("runs/tuned"))) == []

    code, err = check(capsys, *resume, "model.num_layers=3")
    assert code == 2 and "model.num_layers = 3 (command line): the checkpoint" in err
    (folder / "weights/tokenizer.json").write_text("{}")
    code, err = check(capsys, *resume)
    assert code == 2 and "the tokenizer of shards/train has sha256 aaaaaaaaaaaa" in err
    write_data_set(folder / "fitting", tokenizer_sha256=file_sha256(folder / "weights/tokenizer.json"))
    assert check(capsys, *resume, "data.train.0.path=fitting") == (0, "")


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
        ("dropout", "Did you mean model.dropout?"),
        ("xyzzy", "Write keys or sections"),
    ],
)
def test_allowing_an_unknown_key_is_a_mistake(name: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = check(capsys, f"checkpoint.allow_change=[seed, {name}]", "seed=7")
    assert code == 2
    assert f"checkpoint.allow_change.1 = {name} (command line): is no key. {advice}" in err
    assert err.endswith("1 problem in run.yaml; nothing was started.\n")


def test_a_name_allows_what_lies_below_it_only() -> None:
    assert is_allowed("data.train.0.path", ["data.train"])
    assert is_allowed("data.train", ["data.train"])
    assert not is_allowed("data.train", ["data.train.0"])
    assert not is_allowed("data.tokenizer", ["data.train", "data.token"])
    assert not is_allowed("seed", [])

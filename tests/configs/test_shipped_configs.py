"""Every shipped YAML loads and keeps the rules."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llmtrain.config.reading.load import load_config
from llmtrain.config.reading.pipeline import load_pipeline
from llmtrain.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))
PIPELINES = sorted((CONFIGS / "data").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
PRESETS = sorted((CONFIGS / "finetune").glob("*.yaml"))

RUN_AROUND_A_MODEL = """\
name: preset
model: {{base: "{base}"}}
data: {{train: [{{path: nowhere}}], seq_len: 16, objective: {objective}}}
train: {{steps: 1}}
"""
OBJECTIVES = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "span_corruption"}


def run_around(model: Path, folder: Path) -> Path:
    """A minimal run of a model's file."""
    file = folder / "run.yaml"
    family = YAML(typ="safe", pure=True).load(model.read_text("utf-8")).get("family", "decoder")
    text = RUN_AROUND_A_MODEL.format(base=model, objective=OBJECTIVES[family])
    file.write_text(text, encoding="utf-8")
    return file


def test_there_are_configs() -> None:
    assert RUNS
    assert PIPELINES
    assert MODELS
    assert PRESETS


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_run_loads(file: Path) -> None:
    """Schema and arithmetic; its data need not be on this machine."""
    assert load_config(file).config.name == file.stem


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.stem)
def test_pipeline_loads(file: Path) -> None:
    """Schema and rules; its inputs need not be on this machine."""
    assert load_pipeline(file).config.name == file.stem


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_model_loads(file: Path, tmp_path: Path) -> None:
    locations = load_config(run_around(file, tmp_path)).locations
    assert any(str(file) in place for place in locations.values())


LABEL_PRESETS = ("classification", "tagging", "qa")


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_preset_loads(file: Path, tmp_path: Path) -> None:
    """A run names its data; one of conversations or labels leaves the objective to the preset."""
    labels = file.stem in LABEL_PRESETS
    model = CONFIGS / "models" / ("bert-tiny.yaml" if labels else "llama-tiny.yaml")
    run = run_around(model, tmp_path)
    text = run.read_text("utf-8").replace("train: {steps: 1}\n", "")
    if labels:  # behind an import, whose head it takes the place of
        (tmp_path / "import.yaml").write_text(f"model: {{base: {model}}}\ndata: {{objective: masked}}\n", "utf-8")
        text = "name: preset\ndata: {train: [{path: nowhere}], valid: [{path: nowhere}], seq_len: 16}\n"
        base, overrides = f"[{tmp_path / 'import.yaml'}, {file}]", list[str]()
    else:
        base, overrides = str(file), ["train.steps=100", *(["data.objective=chat"] if file.stem == "chat" else [])]
    run.write_text(f"base: {base}\n{text}finetune: {{base: nowhere}}\n", "utf-8")
    config = load_config(run, overrides).config
    method = "full" if labels or file.stem in ("chat", "recover") else file.stem
    assert (config.method, config.finetune and config.finetune.base) == (method, "nowhere")
    assert config.model.predicts_labels == labels and (config.train.epochs is not None) == labels


def test_a_broken_model_is_caught(tmp_path: Path) -> None:
    broken = tmp_path / "model.yaml"
    broken.write_text("num_heads: 3\nhidden_size: 64\n")
    with pytest.raises(ConfigError, match=r"model\.num_heads = 3 .*model\.yaml:1"):
        load_config(run_around(broken, tmp_path))


SMALL_OVERRIDES = (
    ("train.steps=20", "train.tokens=null"),
    ("train.steps=1", "train.tokens=null"),
    ("train.steps=null", "train.tokens=100_000"),
    ("train.micro_batch_size=1",),
    ("train.precision=fp32", "train.compile=false"),
    ("model.num_layers=2", "data.seq_len=64"),
    ("evaluate.every_steps=0", "checkpoint.every_steps=0"),
    ("launch.num_workers=2",),
    ("optim.lr=1e-3", "seed=7"),
)
"""What is set on the command line to try a run out."""


@pytest.mark.parametrize("overrides", SMALL_OVERRIDES, ids=" ".join)
@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_run_takes_small_overrides(file: Path, overrides: tuple[str, ...]) -> None:
    load_config(file, overrides)

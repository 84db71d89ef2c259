"""Wrong files of data pipelines: every fault with its place, its value and what is allowed; and what is not wrong."""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.pipeline import is_pipeline, load_pipeline
from llmtrain.config.reading.rendering import plain_yaml
from llmtrain.config.reading.shipped import shipped_names
from llmtrain.config.reading.suggestions import all_keys
from llmtrain.errors import ConfigError

GOOD = """\
name: corpus
read:
  - {path: raw, name: forum}
steps:
  - normalize
  - language: {keep: [en]}
tokenizer: t.model
"""
STEPS = "normalize, html, language, quality, length, pii, words, urls, decontaminate, exact_dedup, near_dedup"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> PipelineConfig:
    Path("pipeline.yaml").write_text(text, "utf-8")
    return load_pipeline(Path("pipeline.yaml"), overrides).config


def faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    assert "canary" not in str(error.value)
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize(
    ("old", "new", "begin", "says"),
    [
        # Steps.
        ("- normalize", "- normalise", "steps.0.normalise = {} (pipeline.yaml:5)", "Did you mean steps.0.normalize?"),
        ("language:", "langage:", "steps.1.langage = {", "(pipeline.yaml:6): unknown key. Did you mean steps.1.lang"),
        ("keep:", "kep:", 'steps.1.language.kep = ["en"] (pipeline.yaml:6)', "Did you mean steps.1.language.keep?"),
        ("[en]", "en", "steps.1.language.keep = en (pipeline.yaml:6)", "must be a list. Languages, such as [en, de]"),
        ("[en]", "[english]", "steps.1.language.keep.0 = english (pipeline.yaml:6)", "must be ace, af,"),
        ("[en]", "[]", "steps.1.language.keep = [] (pipeline.yaml:6)", "must have at least 1 entry."),
        ("- normalize", "- length: {min_words: x}", "steps.0.length.min_words = x (pipeline.yaml:5)", "a whole"),
        ("- normalize", "- length: {min_words: -1}", "steps.0.length.min_words = -1", "must be at least 0. Try 0."),
        ("- normalize", "- 5", "steps.0 = 5 (pipeline.yaml:5)", STEPS),
        ("- normalize", "- [normalize]", 'steps.0 = ["normalize"] (pipeline.yaml:5)', STEPS),
        ("- normalize", "- {}", "steps.0 = {} (pipeline.yaml:5)", "must be one step: a name, or one name with"),
        ("- normalize", "- {normalize: {}, length: {}}", "steps.0 = {", "(pipeline.yaml:5): must be one step: a name"),
        ("- normalize", "- normalize: true", "steps.0.normalize = true (pipeline.yaml:5)", "form, control_characters"),
        ("- normalize", "- words", "steps.0.words.files (pipeline.yaml:5)", "is required. Text files with a word"),
        ("\n  - normalize\n  - language: {keep: [en]}", " normalize", "steps = normalize (pipeline.yaml:4)", "a list."),
        # Sources.
        ("read:\n  - {path: raw, name: forum}\n", "", "read (pipeline.yaml)", "is required. Sources, in the order"),
        ("\n  - {path: raw, name: forum}", " []", "read = [] (pipeline.yaml:2)", "must have at least 1 entry."),
        ("path: raw, ", "", "read.0.path (pipeline.yaml:3)", "is required. A file, a folder, a glob pattern, or a URL"),
        ("{path: raw, name: forum}", "raw", "read.0 = raw (pipeline.yaml:3)", "must be a section with keys of its own"),
        ("name: forum", "format: csv", "read.0.format = csv (pipeline.yaml:3)", "must be auto, text, jsonl, json"),
        ("name: forum", "txt: body", "read.0.txt = body (pipeline.yaml:3)", "Did you mean read.0.text?"),
        ("name: forum", "max_bytes: 1.5", "read.0.max_bytes = 1.5 (pipeline.yaml:3)", "Try 1 or 2."),
        # Tokenizer.
        ("t.model", "{path: t.model, train: {}}", "tokenizer.path = t.model (pipeline.yaml:7)", "Leave one of them"),
        ("t.model", "{}", "tokenizer (pipeline.yaml:7)", "must name a file (tokenizer: FILE), or have the section"),
        ("t.model", "5", "tokenizer = 5 (pipeline.yaml:7)", "must be a section with keys of its own: path, train."),
        ("t.model", "{trian: {}}", "tokenizer.trian = {} (pipeline.yaml:7)", "Did you mean tokenizer.train?"),
        ("t.model", "{train: {vocab_size: 9}}", "tokenizer.train.vocab_size = 9", "must be at least 300. Try 300."),
        # The rest.
        ("tokenizer:", "tokeniser:", "tokeniser = t.model (pipeline.yaml:7)", "Did you mean tokenizer?"),
        ("corpus", "a/b", "name = a/b (pipeline.yaml:1)", "Try a-b."),
        ("t.model", "t.model\nwrite: {shard_token: 5}", "write.shard_token = ", "Did you mean write.shard_tokens?"),
        ("t.model", "t.model\nwrite: {hf_token: canary}", "write.hf_token = (hidden) (pipeline.yaml:8)", "environment"),
        ("raw,", "'https://u:canary@h/x?s=canary',", "read.0.path = https://h/x (", "would stand in plan.json"),
        ("t.model", "t.model\nrun: {backend: rays}", "run.backend = rays (pipeline.yaml:8)", "Try ray."),
        ("t.model", "t.model\nmodel: {num_layers: 2}", "model = {", "(pipeline.yaml:8): unknown key."),
    ],
)  # fmt: skip
def test_one_fault_is_told_once_with_its_place(old: str, new: str, begin: str, says: str) -> None:
    assert GOOD.count(old) == 1
    [fault] = faults(GOOD.replace(old, new))
    assert fault.startswith(begin) and says in fault


def test_faults_of_all_kinds_are_told_together() -> None:
    text = (
        "nmae: x\nread: [{pth: a, format: csv}]\nsteps: [normalise, {length: {min_words: -1}}]\n"
        "tokenizer: {path: a, train: {}}\nrun: {address: 'h:1', slurm: {nodes: 2}}\n"
    )
    keys = {fault.partition(" ")[0] for fault in faults(text)}
    assert keys == {
        *("nmae", "read.0.pth", "read.0.format", "steps.0.normalise", "steps.1.length.min_words", "tokenizer.path"),
        *("run.address", "run.slurm.nodes"),
    }


@pytest.mark.parametrize(
    ("override", "begin", "says"),
    [
        ("steps.1.language.keep=[german]", "steps.1.language.keep.0 = german (command line)", "must be ace, af,"),
        ("steps.1.langage.keep=[de]", "steps.1.langage = {", "(command line): unknown key. Did you mean steps.1.lang"),
        ("steps.1.length.min_words=5", "steps.1 = {", "(pipeline.yaml:6): must be one step: a name, or one name"),
        ("steps.2.length.min_words=5", "steps.2.length.min_words = 5 (command line)", "numbered 0 to 1."),
        ("steps=[normalise]", "steps.0.normalise = {} (command line)", "Did you mean steps.0.normalize?"),
        ("tokenizer.train.vocab_size=500", "tokenizer.path = t.model (pipeline.yaml:7)", "Leave one of them out."),
        ("read.0.paht=x", "read.0.paht = x (command line)", "Did you mean read.0.path?"),
        ("write.hf_token=canary", "write.hf_token = (hidden) (command line)", "Use an environment variable."),
    ],
)
def test_wrong_overrides(override: str, begin: str, says: str) -> None:
    [fault] = faults(GOOD, override)
    assert fault.startswith(begin) and says in fault


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (("steps.1.language.keep=[de]",), [{"normalize": {}}, {"language": {"keep": ["de"]}}]),
        (("steps.0.normalize.form=NFKC",), [{"normalize": {"form": "NFKC"}}, {"language": {"keep": ["en"]}}]),
        (("steps=[normalize]",), [{"normalize": {}}]),
        (("steps=[{length: null}]", "steps.0.length.min_words=5"), [{"length": {"min_words": 5}}]),
        (("steps.0=length",), [{"length": {}}, {"language": {"keep": ["en"]}}]),
        (("steps=[]",), []),
    ],
)
def test_overrides_reach_steps_in_every_form(overrides: tuple[str, ...], steps: list[dict[str, Any]]) -> None:
    assert load(GOOD, *overrides).model_dump(mode="json", exclude_unset=True)["steps"] == steps


def test_the_tokenizer_in_all_forms() -> None:
    named, trained = load(GOOD, "tokenizer=other.model").tokenizer, load(GOOD, "tokenizer={path: null, train: {}}")
    assert named is not None and (named.path, named.train) == ("other.model", None)
    assert trained.tokenizer is not None and trained.tokenizer.train is not None
    assert load(GOOD, "tokenizer=null").tokenizer is None


def test_files_that_a_pipeline_rests_on(folder: Path) -> None:
    (folder / "common").mkdir()
    common = folder / "common" / "steps.yaml"
    common.write_text("steps: [normalize, {length: {min_words: 5}}]\ntokenizer: t.model\n")
    text = "base: common/steps.yaml\nname: x\nread: [{path: a}]\n"
    assert [step.name for step in load(text).steps] == ["normalize", "length"]
    assert is_pipeline(Path("pipeline.yaml"))
    common.write_text("steps: [normalize, {length: {min_word: 5}}]\n")
    [fault] = faults(text)
    assert fault.startswith("steps.1.length.min_word = 5 (common/steps.yaml:1): unknown key.")
    (folder / "de.yaml").write_text("keep: [de]\n")
    within = load(GOOD.replace("{keep: [en]}", "{base: de.yaml}"))
    assert within.steps[1].model_dump(exclude_unset=True)["language"] == {"keep": ("de",)}
    [fault] = faults(GOOD.replace("{keep: [en]}", "{base: d.yaml}"))
    assert fault == "steps.1.language.base = d.yaml (pipeline.yaml:6): d.yaml: no such file. Did you mean de.yaml?"


def test_names_of_shipped_files() -> None:
    shipped = load_pipeline(Path("llmtrain:data/mixture.yaml"), ["name=other"]).config
    assert shipped.name == "other" and is_pipeline(Path("llmtrain:data/mixture.yaml"))
    assert load("base: llmtrain:data/mixture.yaml\nname: x\n").steps == shipped.steps
    assert is_pipeline(Path("pipeline.yaml"))
    with pytest.raises(ConfigError, match=r"Did you mean llmtrain:data/mixture\.yaml\?"):
        load_pipeline(Path("llmtrain:data/mixtures.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "name: x\nmodel: {num_layers: 2}\n",
        "name: x\nread: [a]\nmodel: {num_layers: 2}\n",
        "base: gone.yaml\n",
        "base: pipeline.yaml\n",
        "read: [",
        "- read\n",
        "",
    ],
)
def test_what_is_no_pipeline_is_left_to_who_loads_runs(text: str) -> None:
    Path("pipeline.yaml").write_text(text)
    assert not is_pipeline(Path("pipeline.yaml"))


def test_no_file_is_no_pipeline() -> None:
    assert not is_pipeline(Path("gone.yaml")) and not is_pipeline(Path("llmtrain:data/gone.yaml"))


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("llmtrain:data/")])
def test_what_was_written_in_a_file_gives_the_same_pipeline_again(name: str) -> None:
    config = load_pipeline(Path(name), ["steps.0.normalize.form=NFC"] if name.endswith("mixture.yaml") else []).config
    again = load(plain_yaml(config.model_dump(mode="json", exclude_unset=True)))
    assert again == config and again.model_dump() == config.model_dump()


def test_no_wrong_value_of_any_key_is_a_defect() -> None:
    """Each key in turn, with values of other types: accepted, or refused with a word about that key."""
    refused = 0
    for key in all_keys(PipelineConfig):
        for value in ("[[1]]", "true", "{a: 1}", "-1"):
            try:
                load(GOOD.replace("- normalize", "- {}") if key.startswith("steps.0.") else GOOD, f"{key}={value}")
            except ConfigError as error:
                refused += 1
                assert any(problem.key.startswith(key.split(".")[0]) for problem in error.problems), (key, value)
    assert refused > 400

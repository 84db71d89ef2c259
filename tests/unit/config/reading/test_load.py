"""Files, bases and overrides become one configuration, and every key knows where it was written."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from docs.generate import PAGES, iter_sections
from llmtrain.config.reading.load import LoadedConfig, load_config
from llmtrain.config.reading.rendering import to_yaml
from llmtrain.config.reading.suggestions import sections_of
from llmtrain.config.reading.validation import STAND_INS
from llmtrain.errors import ConfigError
from tests.support.run_files import GOOD_RUN


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def loaded(folder: Path, extra: str = "", *overrides: str) -> LoadedConfig:
    """The good run with more text at its end."""
    return load_config(write(folder, "run.yaml", GOOD_RUN + extra), overrides)


def test_values_are_yaml_1_2(tmp_path: Path) -> None:
    config = loaded(tmp_path, "optim: {lr: 3e-4, min_lr: 0, weight_decay: 1_0e-2}\nobserve: {wandb: off}\n").config
    assert config.optim.lr == 3e-4
    assert config.optim.weight_decay == 0.1
    assert config.observe.wandb == "off"


def test_a_whole_float_is_a_count(tmp_path: Path) -> None:
    assert loaded(tmp_path, "", "train.steps=null", "train.tokens=1e6").config.train.tokens == 1_000_000


def test_a_date_is_text(tmp_path: Path) -> None:
    assert loaded(tmp_path, "", "name=2026-01-02").config.name == "2026-01-02"


def test_anchors(tmp_path: Path) -> None:
    run = loaded(tmp_path, "optim: {lr: &rate 0.5, min_lr: *rate}\n")
    assert run.config.optim.min_lr == 0.5


def test_an_anchor_within_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr\.0 .*run.yaml:14.*own anchor"):
        loaded(tmp_path, "optim: {lr: &rate [*rate]}\n")


def test_bases_lie_below_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "seed: 1\noptim: {lr: 0.1, eps: 0.5, betas: [0.1, 0.2]}\n")
    write(tmp_path, "deep/b.yaml", "base: ../a.yaml\noptim: {eps: 0.25}\n")
    write(tmp_path, "c.yaml", "seed: 3\n")
    run = loaded(tmp_path, "base: [deep/b.yaml, c.yaml]\noptim: {betas: [0.3, 0.4], min_lr: 0}\n")
    assert (run.config.seed, run.config.optim.lr, run.config.optim.eps) == (3, 0.1, 0.25)
    assert run.config.optim.betas == (0.3, 0.4)
    places = {key: str(Path(place).relative_to(tmp_path)) for key, place in run.locations.items()}
    assert places["seed"] == "c.yaml:1"
    assert places["optim.lr"] == "a.yaml:2"
    assert places["optim.eps"] == "deep/b.yaml:2"
    assert places["optim.min_lr"] == places["optim.betas.1"] == "run.yaml:15"


def test_a_base_within_a_section_fills_that_section(tmp_path: Path) -> None:
    write(tmp_path, "models/wide.yaml", "hidden_size: 512\nnum_layers: 9\n")
    text = GOOD_RUN.replace("model:\n", "model:\n  base: models/wide.yaml\n")
    run = load_config(write(tmp_path, "run.yaml", text))
    assert (run.config.model.hidden_size, run.config.model.num_layers) == (64, 2)
    text = text.replace("  hidden_size: 64\n", "")
    run = load_config(write(tmp_path, "run.yaml", text))
    assert run.config.model.hidden_size == 512
    assert run.locations["model.hidden_size"].endswith("models/wide.yaml:1")


def test_a_file_may_be_the_base_of_two_sections(tmp_path: Path) -> None:
    """Only a file that rests on itself is a circle."""
    write(tmp_path, "a.yaml", "seed: 1\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert loaded(tmp_path, "base: [a.yaml, b.yaml]\n").config.seed == 1


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    run = loaded(tmp_path, "", "optim.lr=0.1", "optim.lr=0.2", "data.train.0.weight=5", "optim.betas=[0.1, 0.2]")
    assert run.config.optim.lr == 0.2
    assert run.config.data.train[0].weight == 5
    assert run.config.optim.betas == (0.1, 0.2)
    assert run.locations["optim.lr"] == run.locations["data.train.0.weight"] == "command line"
    assert run.locations["data.train.0.path"] == f"{tmp_path}/run.yaml:8"


def test_an_override_sets_null(tmp_path: Path) -> None:
    assert loaded(tmp_path, "", "model.vocab_size=7", "model.vocab_size=null").config.model.vocab_size is None


def test_only_the_first_of_two_equal_keys_counts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "seed: 1\nseed: 2\nseed: 3\n")
    assert [problem.where.rsplit(":", 1)[1] for problem in caught.value.problems] == ["15", "16"]
    assert all("run.yaml:14" in problem.message for problem in caught.value.problems)


def test_a_file_that_is_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"name: a\nseed: \xff\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: byte 0xff is not UTF-8"):
        load_config(file)


def test_the_note_counts_the_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "", "optim.lr=x", "optim.eps=x")
    assert caught.value.__notes__ == [f"2 problems in {tmp_path}/run.yaml; nothing was started."]


def test_what_an_unreadable_base_might_hold_is_not_missed(tmp_path: Path) -> None:
    """`name` and `data` may well stand in the file that could not be read."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "run.yaml", "base: gone.yaml\nseed: -1\n"))
    assert [problem.key for problem in caught.value.problems] == ["base", "seed"]


yaml_like = st.text(alphabet="ab:[]{}-&*!#,'\"\n \t0.1e%|>?<\x07\x85\ufeff", max_size=60)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=yaml_like, override=yaml_like)
def test_no_text_is_answered_with_a_traceback(tmp_path: Path, text: str, override: str) -> None:
    """Whatever stands in a file or on the command line is a run or a ConfigError."""
    file = write(tmp_path, "run.yaml", text)
    with pytest.raises(ConfigError):
        load_config(file, [override, f"optim.lr={override}", f"model={override}"])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    output_dir=st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=40),
    lr=st.floats(1e-12, 1e3),
    weight=st.integers(1, 10**6),
    tokens=st.one_of(st.none(), st.integers(10**6, 10**15)),
)
def test_resolved_yaml_loads_to_an_equal_config(
    tmp_path: Path, output_dir: str, lr: float, weight: int, tokens: int | None
) -> None:
    base = loaded(tmp_path).config
    train = base.train.with_keys({"tokens": tokens, "steps": None if tokens else 10})
    optim = base.optim.with_keys({"lr": lr, "min_lr": lr / 3})
    source = base.data.train[0].with_keys({"path": output_dir, "weight": weight})
    data = base.data.with_keys({"train": (source,)})
    config = base.with_keys({"output_dir": output_dir, "train": train, "optim": optim, "data": data})
    assert load_config(write(tmp_path, "resolved.yaml", to_yaml(config))).config == config


def test_a_number_of_too_many_digits_is_called_that(tmp_path: Path) -> None:
    """Python itself reads no more than 4,300 of them."""
    for digits in ("9" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000):
        with pytest.raises(ConfigError, match="more digits than any number"):
            loaded(tmp_path, "", f"seed={digits}")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("distill.top_k=3", "distill.teacher"),
        ("distill.model.attention=255", "distill.teacher"),
        ("optim.lr_scale=[{scale: 2}]", r"optim\.lr_scale\.0\.names"),
        ("optim.lr_scale=[{names: [x]}]", r"optim\.lr_scale\.0\.scale"),
    ],
)
def test_a_missing_key_of_a_section_is_told(override: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*(?i:required|missing)"):
        loaded(tmp_path, "", override)


def test_every_required_key_has_a_stand_in() -> None:
    """Or the other faults of a file without it could not be told."""
    for _, root in PAGES.values():
        for key, section in iter_sections(root=root):
            for name, field in section.model_fields.items():
                found = sections_of(field.annotation)
                is_section = found is not None and not found[1]
                assert not field.is_required() or is_section or name in STAND_INS, (key, name)

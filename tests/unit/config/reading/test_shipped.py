"""Files that the package ships are bases and runs under names of their own."""

from pathlib import Path

import pytest

from llmtrain.config.reading import shipped
from llmtrain.config.reading.load import load_config
from llmtrain.config.reading.shipped import SHIPPED_FOLDER, shipped_names
from llmtrain.errors import ConfigError
from tests.support.run_files import GOOD_RUN


def run_on(folder: Path, base: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(GOOD_RUN.replace("model:\n", f"model:\n  base: {base}\n"), "utf-8")
    return file


def test_a_shipped_model_is_a_base_wherever_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_config(run_on(tmp_path, "llmtrain:models/llama-tiny.yaml"))
    assert loaded.config.model.activation == "swiglu"
    place, _, line = loaded.locations["model.activation"].rpartition(":")
    assert Path(place).samefile(SHIPPED_FOLDER / "models/llama-tiny.yaml")
    assert "activation" in Path(place).read_text("utf-8").splitlines()[int(line) - 1]


def test_bases_within_shipped_files_are_relative_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file of the user's rests on a shipped run as on any other file."""
    monkeypatch.chdir(tmp_path)
    run = load_config(Path("llmtrain:runs/quickstart.yaml"), ["seed=7"])
    assert (run.config.seed, run.config.model.position) == (7, "rope")
    assert Path(run.locations["model.position"].rpartition(":")[0]).samefile(SHIPPED_FOLDER / "models/llama-tiny.yaml")
    (tmp_path / "mine.yaml").write_text("base: llmtrain:runs/quickstart.yaml\nname: mine\n")
    assert load_config(Path("mine.yaml")).config == run.config.with_keys({"seed": 1234, "name": "mine"})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llmtrain:models/lama-8b.yaml", "Did you mean llmtrain:models/llama-8b.yaml"),
        ("llmtrain:llama-tiny", "Did you mean llmtrain:models/llama-tiny.yaml"),
        ("llmtrain:models/llama.yaml", "Did you mean llmtrain:models/llama-"),
        ("llmtrain:models/gpt2_small.yml", "Did you mean llmtrain:models/gpt2-small.yaml, "),
        ("llmtrain:runs/gpt2_small.yml", "Did you mean llmtrain:runs/gpt2-small.yaml, "),
        ("llmtrain:", "There are llmtrain:data/debian.yaml, "),
        ("llmtrain:../pyproject.toml", "llmtrain ships no such file"),
        ("llmtrain:models/../models/llama-8b.yaml", "Did you mean llmtrain:models/llama-8b.yaml"),
    ],
)
def test_a_wrong_name_is_told_with_those_that_are_near(tmp_path: Path, name: str, says: str) -> None:
    file = run_on(tmp_path, f"'{name}'")
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    line = file.read_text("utf-8").splitlines().index(f"  base: '{name}'") + 1
    assert str(raised.value).startswith(f"model.base = {name} ({file}:{line}): llmtrain ships no such file.")
    assert says in str(raised.value)
    with pytest.raises(ConfigError, match="llmtrain ships no such file") as raised:
        load_config(Path(name))
    assert says in str(raised.value)


def test_an_installation_without_them_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "SHIPPED_FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=f"not in {tmp_path}. Install llmtrain again"):
        load_config(run_on(tmp_path, "llmtrain:models/llama-8b.yaml"))


def test_every_file_of_the_folder_has_a_name() -> None:
    assert len(shipped_names()) == len(list(SHIPPED_FOLDER.rglob("*.yaml"))) > 40

"""The command's frame: help, completion, errors and exit codes, and that nothing heavy is imported early."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from llmtrain.cli import main
from llmtrain.cli.app import VERBS, Verb, app, load_verb
from llmtrain.config.reading.load import load_config
from llmtrain.errors import CheckpointError
from tests.support.run_files import write_good_run

HEAVY = {"torch", "ray", "pydantic", "ruamel", "numpy", "transformers", "megatron", "deepspeed", "sentencepiece"}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def call(*arguments: str) -> int:
    """Exit code of the command in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Top-level modules that the command imported in a process of its own, and what it wrote to stdout."""
    done = run_python(
        "import sys, atexit\n"
        "atexit.register(lambda: print(*sorted({n.split('.')[0] for n in sys.modules}), file=sys.stderr))\n"
        f"from llmtrain.cli import main\nmain({list(arguments)!r})"
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split()), done.stdout


def test_help_imports_nothing_heavy() -> None:
    modules, out = imported_by("--help")
    assert "Train a model" in out
    assert not modules & HEAVY


def test_checking_a_config_imports_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    modules, out = imported_by("train", "run.yaml", "--dry-run")
    assert "pydantic" in modules  # the look at the modules sees imports at all
    assert not modules & (HEAVY - {"pydantic", "ruamel", "numpy"})
    assert "runs/small" in out


def test_every_verb_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_loads_and_says_what_the_table_says_of_its_name(name: str) -> None:
    command = load_verb(name)
    assert command.name == name
    assert command.help


def test_a_broken_verb_harms_only_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(VERBS, "broken", Verb("llmtrain.cli.no_such_module", "broken", "Never works.", "Training"))
    assert call("--help") == 0
    assert "Never works." in capsys.readouterr().out
    assert call("--version") == 0
    with pytest.raises(ModuleNotFoundError):
        main(["broken"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("llmtrain 0.")


@pytest.mark.parametrize(
    "arguments", [["tran"], ["train"], ["train", "a.yaml", "--nope"], ["train", "a.yaml", "--json"]]
)
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "Traceback" not in written.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lr", "3"], "write optim.lr=3."),
        (["--learning-rate=1e-3"], "write optim.lr=1e-3."),
        (["--parallel.tensor", "2", "--dry-run"], "write parallel.tensor=2."),
        (["--compile", "--dry-run"], "write train.compile=VALUE."),
        (["--dry-rum"], "--dry-run"),
    ],
)
def test_keys_given_as_options_lead_to_the_key(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", "a.yaml", *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_wrong_choice_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", "a", "b", "--to", "tflite") == 2
    written = capsys.readouterr().err
    assert "'tflite' is not one of 'hf'" in written and "Value error" not in written


def test_repeated_arguments_are_marked_once() -> None:
    for verb in ("train", "report"):
        usage = load_verb(verb).get_usage(typer.Context(load_verb(verb)))
        assert usage.count("...") == 1, usage


def test_a_misspelt_verb_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    call("tran")
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_completion_lists_verbs_without_importing_them() -> None:
    done = run_python(
        "from llmtrain.cli import main; main([])",
        _LLMTRAIN_COMPLETE="complete_bash",
        COMP_WORDS="llmtrain ch",
        COMP_CWORD="1",
    )
    assert done.stdout.split() == ["checkpoint"], done.stderr


def raising(error: BaseException) -> Verb:
    """A verb that fails as told."""

    def verb() -> None:
        raise error

    module = type(sys)("failing_verb")
    setattr(module, "verb", verb)  # noqa: B010 - a module made here has no such attribute that a checker knows
    sys.modules["failing_verb"] = module
    return Verb("failing_verb", "verb", "Fails.", "Training")


def test_errors_of_a_verb_become_a_message_and_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(VERBS, "fail", raising(CheckpointError("a.safetensors is damaged")))
    assert call("fail") == 3
    assert capsys.readouterr().err == "error: a.safetensors is damaged\n"


def test_a_debugging_user_gets_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "fail", raising(CheckpointError("damaged")))
    monkeypatch.setenv("LLMTRAIN_TRACEBACK", "1")
    with pytest.raises(CheckpointError):
        main(["fail"])


def test_an_interrupt_exits_143(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(VERBS, "fail", raising(KeyboardInterrupt()))
    assert call("fail") == 143
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_errors_are_red_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_color: str, coloured: bool
) -> None:
    monkeypatch.setitem(VERBS, "fail", raising(CheckpointError("damaged")))
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    call("fail")
    assert ("\x1b[31m" in capsys.readouterr().err) == coloured


def test_print_config_is_bare_yaml_that_loads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_good_run(tmp_path)
    assert call("train", "run.yaml", "optim.lr=0.5", "--print-config") == 0
    written = capsys.readouterr()
    assert written.err == ""
    (tmp_path / "resolved.yaml").write_text(written.out)
    assert load_config(tmp_path / "resolved.yaml").config == load_config(file, ["optim.lr=0.5"]).config


def test_dry_run_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    assert call("train", "run.yaml", "--dry-run", "--json") == 0
    outline = json.loads(capsys.readouterr().out)
    assert outline["steps"] == 10
    assert outline["micro_batches_per_rank"] == 2
    assert outline["windows"] == "continuous" and outline["sources"][0]["use"]["unused_tokens"] == 0
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_which_data_no_sample_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    assert call("train", "run.yaml", "--dry-run") == 0
    said = "data         shards/train: 1,010 tokens = 16 samples; no token is left out; 5.07 epochs\n"
    assert said in capsys.readouterr().out
    assert call("train", "run.yaml", "data.windows=per_shard", "--dry-run") == 0
    said = (
        "data         shards/train: 1,010 tokens = 15 samples; 49 of 1,010 tokens (4.9%) are in no sample; 5.33 epochs"
    )
    assert said in capsys.readouterr().out


BIG = ("engine.name=megatron", "parallel={tensor: 4, pipeline: 2, sequence: true}", "train.global_batch_size=8192")


def test_dry_run_draws_a_world_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    assert call("train", "run.yaml", *BIG, "--dry-run", "--ranks", "16384") == 0
    text = capsys.readouterr().out
    assert "16,384 = pipeline 2 x data 2,048 x context 1 x tensor 4, sequence parallel" in text
    assert "1, head" in text and "8192-16383" in text
    ring = ("parallel.context=2", "parallel.context_exchange=ring")
    assert call("train", "run.yaml", *BIG, *ring, "--dry-run", "--ranks", "16384") == 0
    assert "x context 2 x tensor 4, context by ring, sequence parallel" in capsys.readouterr().out
    zero_bubble = "parallel.pipeline_schedule=zero_bubble"
    assert call("train", "run.yaml", *BIG, zero_bubble, "--dry-run", "--ranks", "8") == 0
    assert "pipeline 2 x data 1 x context 1 x tensor 4, zero-bubble schedule, sequence" in capsys.readouterr().out
    assert call("train", "run.yaml", *BIG, "--dry-run", "--ranks", "8", "--json") == 0
    layout = json.loads(capsys.readouterr().out)["layout"]
    assert layout["sizes"] == {"tensor": 4, "context": 1, "data": 1, "pipeline": 2}
    assert [(stage["chunks"], stage["first_rank"], stage["last_rank"]) for stage in layout["stages"]] == [
        ([[0]], 0, 3),
        ([[1]], 4, 7),
    ]


def test_so_many_ranks_need_the_axes_to_divide_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    assert call("train", "run.yaml", *BIG, "--dry-run", "--ranks", "12") == 2
    assert "= 8 ranks. Try 8 or 16" in capsys.readouterr().err
    assert call("train", "run.yaml", *BIG, "--ranks", "8") == 2
    assert "goes with --dry-run" in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schema") == 0
    assert "optim" in json.loads(capsys.readouterr().out)["properties"]


def test_the_app_is_what_other_programs_mount() -> None:
    assert isinstance(app, typer.Typer)

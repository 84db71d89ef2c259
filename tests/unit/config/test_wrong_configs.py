"""Wrong configurations through the real command: exit code 2, no traceback, and a message that helps."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from llmtrain.cli import main
from tests.support.run_files import GOOD_RUN, write_data_set, write_good_run


@dataclass(frozen=True)
class Case:
    """A fault put into the good run: text replaced in its file, other files, or overrides. All of `says` is said."""

    name: str
    says: tuple[str, ...]
    replace: tuple[str, str] = ("", "")
    append: str = ""
    overrides: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()


CASES = [
    Case(
        "phase without weights",
        ("data.schedule.0.weights", "is required", "A weight for each source of data.train"),
        overrides=("data.schedule=[{from_step: 5}]",),
    ),
    Case(
        "ramp without sizes",
        ("train.batch_ramp.0.global_batch_size (command line): is required", "Sequences per step"),
        overrides=("train.batch_ramp=[{from_step: 5}]",),
    ),
    Case(
        "ramp without a step",
        ("train.batch_ramp.0.from_step (command line): is required",),
        overrides=("train.batch_ramp=[{global_batch_size: 16}]",),
    ),
    Case(
        "word for a weight",
        ("data.schedule.0.weights.1 = x (command line)", "must be a whole number"),
        overrides=("data.schedule=[{from_step: 5, weights: [1, x]}]",),
    ),
    Case(
        "limit of what is evaluated",
        ("data.valid.0.max_epochs = 2 (command line): unknown key",),
        overrides=("data.valid=[{path: shards/train, max_epochs: 2}]",),
    ),
    Case(
        "misspelt key",
        ("train.global_batchsize = 8 (run.yaml:12)", "unknown key", "Did you mean train.global_batch_size?"),
        replace=("global_batch_size", "global_batchsize"),
    ),
    Case(
        "key of another section",
        ("train.lr = 0.001 (run.yaml:14)", "Did you mean optim.lr?"),
        append="  lr: 1e-3\n",
    ),
    Case(
        "name from another program",
        ("optim.learning_rate = 0.1 (run.yaml:15)", "Did you mean optim.lr?"),
        append="optim:\n  learning_rate: 0.1\n",
    ),
    Case(
        "unknown section",
        ("paralel = {", "(run.yaml:14)", "Did you mean parallel?"),
        append="paralel: {tensor: 1}\n",
    ),
    Case(
        "nothing like any key", ("xyzzy = 1 (run.yaml:14)", "Known here: name, output_dir, seed"), append="xyzzy: 1\n"
    ),
    Case(
        "text for a number",
        ("train.steps = ten (run.yaml:11)", "must be a whole number"),
        replace=("steps: 10", "steps: ten"),
    ),
    Case(
        "quoted number",
        ("train.steps = 10 (run.yaml:11)", "Try 10 without quotes."),
        replace=("steps: 10", "steps: '10'"),
    ),
    Case(
        "fraction for a count",
        ("train.steps = 10.5 (run.yaml:11)", "must be a whole number. Try 10 or 11."),
        replace=("steps: 10", "steps: 10.5"),
    ),
    Case(
        "truth value for a count",
        ("model.num_layers = true (run.yaml:3)", "must be a whole number", "The default is 4."),
        replace=("num_layers: 2", "num_layers: true"),
    ),
    Case(
        "word for a truth value",
        ("model.bias = yes (run.yaml:7)", "must be true or false. Try true."),
        replace=("max_seq_len: 128", "max_seq_len: 128\n  bias: yes"),
    ),
    Case(
        "negative size",
        ("model.hidden_size = -64 (run.yaml:4)", "must be at least 1. Try 1."),
        replace=("hidden_size: 64", "hidden_size: -64"),
    ),
    Case(
        "not a number",
        ("optim.lr = .nan (run.yaml:14)", "must be a finite number", "0.0003"),
        append="optim: {lr: .nan}",
    ),
    Case(
        "infinite",
        ("optim.grad_clip = .inf (run.yaml:14)", "must be a finite number"),
        append="optim: {grad_clip: .inf}",
    ),
    Case(
        "list for a scalar",
        ("train.steps = [10, 20] (run.yaml:11)", "must be a whole number"),
        replace=("steps: 10", "steps: [10, 20]"),
    ),
    Case(
        "scalar for a section",
        ("optim = adamw (run.yaml:14)", "must be a section with keys of its own: name, lr"),
        append="optim: adamw\n",
    ),
    Case(
        "text for a list",
        ("data.train = shards/train (run.yaml:8)", "must be a list"),
        replace=("[{path: shards/train}]", "shards/train"),
    ),
    Case(
        "wrong word",
        ("train.precision = bf61 (run.yaml:14)", "must be fp32, bf16, fp16 or fp8. Try bf16."),
        append="  precision: bf61\n",
    ),
    Case(
        "empty list of sources",
        ("data.train = [] (run.yaml:8)", "must have at least 1 entry"),
        replace=("[{path: shards/train}]", "[]"),
    ),
    Case(
        "required key missing",
        ("name (run.yaml): is required", "Name of the run folder"),
        replace=("name: small\n", ""),
    ),
    Case(
        "name with a slash",
        ("name = my/run (run.yaml:1)", "letters, digits", "Try my-run."),
        replace=("name: small", "name: my/run"),
    ),
    Case("name of dots", ("name = .. (run.yaml:1)", "Try my-run."), replace=("name: small", "name: ..")),
    Case(
        "duplicate key",
        ("train.steps = 20 (run.yaml:14)", "stands twice, first at run.yaml:11"),
        append="  steps: 20\n",
    ),
    Case(
        "bad YAML",
        ("run.yaml:14: is not valid YAML while parsing a flow sequence",),
        append="optim: {betas: [0.9, 0.95}\n",
    ),
    Case("tab", ("run.yaml:15: is not valid YAML", "'\\t'"), append="optim:\n\tlr: 1e-3\n"),
    Case(
        "Python tag",
        ("optim.lr (run.yaml:14)", "the tag !!python/object/apply:os.system is not allowed"),
        append="optim: {lr: !!python/object/apply:os.system [ls]}",
    ),
    Case("not a mapping", ("run.yaml:1: must hold keys and values",), replace=(GOOD_RUN, "- 1\n- 2\n")),
    Case(
        "dotted key in a file",
        ("optim.lr (run.yaml:14)", "write `optim:` and below it `lr:`"),
        append="optim.lr: 1e-3\n",
    ),
    Case(
        "missing preset",
        ("model.base = models/lama.yaml (run.yaml:3)", "no such file. Did you mean models/llama.yaml?"),
        replace=("model:\n", "model:\n  base: models/lama.yaml\n"),
        files=(("models/llama.yaml", "num_layers: 2\n"),),
    ),
    Case(
        "fault inside a preset",
        ("model.num_headz = 4 (models/llama.yaml:1)", "Did you mean model.num_heads?"),
        replace=("model:\n", "model:\n  base: models/llama.yaml\n"),
        files=(("models/llama.yaml", "num_headz: 4\n"),),
    ),
    Case(
        "bases in a circle",
        ("base = run.yaml (other.yaml:1)", "goes in a circle: run.yaml -> other.yaml -> run.yaml"),
        append="base: other.yaml\n",
        files=(("other.yaml", "base: run.yaml\n"),),
    ),
    Case("base is no file name", ("base = 3 (run.yaml:14)", "must be a file or a list of files"), append="base: 3\n"),
    Case(
        "both budgets",
        ("train.tokens = 1000000 (run.yaml:14)", "train.steps = 10 already says", "Remove one"),
        append="  tokens: 1e6\n",
    ),
    Case(
        "no budget",
        ("train (run.yaml:10): needs train.steps, train.tokens or train.epochs.", "Try"),
        replace=("  steps: 10\n", ""),
    ),
    Case(
        "heads do not divide the width",
        ("model.num_heads = 5 (run.yaml:5)", "must divide model.hidden_size = 64", "Try 1, 2, 4 or 8."),
        replace=("num_heads: 4", "num_heads: 5"),
    ),
    Case(
        "kv heads do not divide the heads",
        ("model.num_kv_heads = 3 (command line)", "must divide model.num_heads = 4. Try 1, 2 or 4."),
        overrides=("model.num_kv_heads=3",),
    ),
    Case(
        "batch does not divide",
        ("train.global_batch_size = 10 (run.yaml:12)", "4 x 1 = 4. Try 8 or 12"),
        replace=("global_batch_size: 8", "global_batch_size: 10"),
    ),
    Case(
        "samples longer than the model",
        ("data.seq_len = 256 (run.yaml:9)", "at most model.max_seq_len = 128. Try 128"),
        replace=("seq_len: 64", "seq_len: 256"),
    ),
    Case(
        "an axis that the engine lacks",
        ("parallel.tensor = 2 (run.yaml:14)", "splits the batch only. Try 1, or engine.name=megatron"),
        append="parallel: {tensor: 2}\n",
    ),
    Case(
        "evaluation without data",
        ("evaluate.every_steps = 5 (run.yaml:14)", "needs data.valid, which is empty"),
        append="evaluate: {every_steps: 5}\n",
    ),
    Case(
        "secret",
        ("optim.hf_token = (hidden) (run.yaml:14)", "environment variable"),
        append="optim: {hf_token: canary}\n",
    ),
    Case(
        "malformed override",
        ("override 'optim.lr' (command line)", "write key.path=value"),
        overrides=("optim.lr",),
    ),
    Case(
        "override outside a list",
        ("data.train.3.path = x (command line)", "numbered 0 to 0"),
        overrides=("data.train.3.path=x",),
    ),
    Case(
        "override in a list that nobody wrote",
        ("optim.betas.0 = 0.5 (command line)", "Set it as a whole: optim.betas=[...]."),
        overrides=("optim.betas.0=0.5",),
    ),
    Case(
        "too many entries",
        ("optim.betas = [0.1, 0.2, 0.3] (command line)", "must have 2 entries"),
        overrides=("optim.betas=[0.1, 0.2, 0.3]",),
    ),
    Case(
        "override below a value",
        ("name.first = x (command line)", "name = small (run.yaml:1) is a single value"),
        overrides=("name.first=x",),
    ),
    Case(
        "override that is no YAML",
        ("optim.betas = [0.9 (command line)", "is not valid YAML", "Quote the value"),
        overrides=("optim.betas=[0.9",),
    ),
    Case(
        "missing data",
        ("data.train.0.path = shards/tran (run.yaml:8)", "no such folder", "llmtrain data shards"),
        replace=("shards/train", "shards/tran"),
    ),
    Case(
        "missing checkpoint",
        ("checkpoint.resume = nowhere (command line)", "no such checkpoint", "auto, none"),
        overrides=("checkpoint.resume=nowhere",),
    ),
]


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the real command, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    written = capsys.readouterr()
    return int(ended.value.code or 0), written.out, written.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    return tmp_path


def test_the_run_without_a_fault_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_command(["train", "run.yaml", "--dry-run"], capsys)
    assert (code, err) == (0, "")
    assert "parameters" in out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_config(case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = GOOD_RUN.replace(*case.replace) if case.replace[0] else GOOD_RUN
    (folder / "run.yaml").write_text(text + case.append)
    for name, content in case.files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    code, out, err = run_command(["train", "run.yaml", *case.overrides, "--dry-run"], capsys)
    assert code == 2
    assert out == ""
    for fragment in case.says:
        assert fragment in err
    assert "Traceback" not in err
    assert "canary" not in err
    # One fault is one problem: nothing else is made up from it.
    assert err.endswith("1 problem in run.yaml; nothing was started.\n")
    assert not (folder / "runs").exists()


MANY_FAULTS = """\
nmae: small
model:
  num_layers: -2
  hidden_size: 64
  num_heads: 5
  max_seq_len: 128
  position: ropes
data:
  train: [{path: shards/train, weight: 1.5}, {path: shards/gone}]
  valid: [{path: shards/other}]
  seq_len: 512
train:
  steps: 10
  tokens: 1000
  grad_clip: 1.0
  global_batch_size: 8
  micro_batch_size: 3
optim:
  warmup_steps: 5
  warmup_steps: 6
  min_lr: 1
"""


def test_many_faults_of_all_stages_are_reported_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text(MANY_FAULTS)
    write_data_set(folder / "shards" / "other", vocab_size=301)
    code, _, err = run_command(["train", "run.yaml", "optim.betas=0.9", "seed"], capsys)
    assert code == 2
    starts = [line.split(": ", 2)[1] for line in err.splitlines()[:-1]]
    assert sorted(starts) == sorted(
        [
            "optim.warmup_steps = 6 (run.yaml:20)",
            "override 'seed' (command line)",
            "nmae = small (run.yaml:1)",
            "model.num_layers = -2 (run.yaml:3)",
            "model.position = ropes (run.yaml:7)",
            "data.train.0.weight = 1.5 (run.yaml:9)",
            "train.grad_clip = 1.0 (run.yaml:15)",
            "optim.betas = 0.9 (command line)",
            "model.num_heads = 5 (run.yaml:5)",
            "data.seq_len = 512 (run.yaml:11)",
            "train.tokens = 1000 (run.yaml:14)",
            "optim.min_lr = 1.0 (run.yaml:21)",
            "train.global_batch_size = 8 (run.yaml:16)",
            "data.train.1.path = shards/gone (run.yaml:9)",
            "data.valid.0.path = shards/other (run.yaml:10)",
        ]
    )
    assert err.endswith("15 problems in run.yaml; nothing was started.\n")


def test_a_rule_that_rests_on_a_faulty_key_stays_silent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its typo repaired the run may be fine: the default of num_heads, 4, does not divide 66, but 6 does."""
    (folder / "run.yaml").write_text(
        GOOD_RUN.replace("hidden_size: 64", "hidden_size: 66").replace("num_heads: 4", "num_head: 6")
    )
    _, _, err = run_command(["train", "run.yaml", "--dry-run"], capsys)
    assert "Did you mean model.num_heads?" in err
    assert "1 problem in" in err

"""lm-eval's adapter for Hugging Face on an export, our class for lm-eval on the run, and our tasks: same numbers."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main
from llmtrain.config.tasks.schema import TaskConfig
from llmtrain.infer.evaluation.run import EvaluationOptions, evaluate_tasks
from llmtrain.infer.model import load_model, named_device
from llmtrain.infer.text_model import TextModel
from tests.support.command import COMMAND
from tests.support.evaluated_run import LINES, QUESTIONS, TEXTS, trained_run, write_lines
from tests.support.readers import judged_by_lm_eval, lm_eval_environment

# Prompts of the long one are cut, and its texts are read in several windows: the model takes 48 tokens.
SAID = {
    "choose": {
        "output_type": "multiple_choice", "doc_to_text": "the {{animal}} sleeps in the",
        "doc_to_choice": "{{options}}", "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "match": {
        "output_type": "generate_until", "doc_to_text": "the {{animal}} sleeps in the",
        "doc_to_target": " {{options[0]}}", "target_delimiter": "",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "ask": {
        "output_type": "generate_until", "doc_to_text": "{{q}}\n", "doc_to_target": "{{answers[0]}}", "num_fewshot": 1,
        "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    },
    "gap": {
        "output_type": "loglikelihood", "doc_to_text": "{{before}}", "doc_to_target": " {{last}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "choose": {
        "prompt": "the {animal} sleeps in the", "kind": "choices", "choices": ["{options}"], "answer": "{a}",
    },
    "roll": {"prompt": "{text}", "kind": "perplexity"},
    "match": {
        "prompt": "the {animal} sleeps in the", "kind": "exact_match", "answer": "{options.0}", "stop": [".", "\n"],
        "max_tokens": 8,
    },
    "gap": {"prompt": "{before}", "kind": "cloze", "answer": "{last}"},
}  # fmt: skip
SAME_METRICS = {
    "choose": {"accuracy": "acc", "accuracy_per_byte": "acc_bytes"},
    "roll": {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    "match": {"exact_match": "exact_match"},
    "gap": {"accuracy": "acc", "perplexity": "perplexity"},
}


def write_tasks(folder: Path) -> dict[str, Path]:
    """The same tasks for lm-eval; returns the data of each."""
    gaps = [{"before": "".join(LINES[at : at + 4]) + "the fox sleeps in the", "last": "den"} for at in range(0, 16, 4)]
    rows = {"roll": TEXTS, "gap": gaps}
    data = {name: write_lines(folder / f"{name}.jsonl", rows.get(name, QUESTIONS)) for name in SAID}
    for name, said in SAID.items():
        base = {
            "task": f"our_{name}", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data[name])}},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps({**base, **said}), "utf-8")  # JSON is YAML
    return data


def numbers_of(said: Any) -> list[Any]:
    """What a model said of a sample, flat."""
    return [inner for part in said for inner in numbers_of(part)] if isinstance(said, list | tuple) else [said]


def test_lm_eval_on_the_export_and_on_the_run_and_our_own_tasks_agree(tmp_path: Path):
    environment, names = lm_eval_environment(), [f"our_{name}" for name in SAID]
    config, data = trained_run(tmp_path, train={"steps": 150}), write_tasks(tmp_path)
    export, out = tmp_path / "export", tmp_path / "samples.jsonl"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(config.run_dir), str(export)])
    assert not ended.value.code
    theirs = judged_by_lm_eval(export, tmp_path, names)
    command = [COMMAND, "eval", config.run_dir, "--json", "--include-path", tmp_path]
    done = subprocess.run(
        [*map(str, command), "--out", str(out), "--tasks", *names], env=environment, capture_output=True, text=True,
        timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads(done.stdout)["tasks"]  # and nothing else is there

    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    for name in names:
        for metric, value in ours[name]["metrics"].items():
            expected = theirs["metrics"][name][f"{metric},none"]
            exact = metric in ("acc", "acc_bytes", "exact_match")
            assert value == (expected if exact else pytest.approx(expected, rel=1e-4)), (name, metric)
        said = [row["responses"] for row in sorted(rows, key=lambda row: row["sample"]) if row["task"] == name]
        assert len(said) == len(theirs["said"][name]) > 0
        for mine, other in zip(numbers_of(said), numbers_of(theirs["said"][name]), strict=True):
            assert mine == (pytest.approx(other, abs=1e-4) if isinstance(other, float) else other), name
    assert len({row["responses"][0] for row in rows if row["task"] == "our_match"}) > 1, (
        "the model has learned something"
    )

    tasks = [TaskConfig.model_validate({"name": name, "data": str(data[name]), **said}) for name, said in OURS.items()]
    model = TextModel(load_model(config.run_dir, named_device("cpu")))
    own = evaluate_tasks(model, tasks, EvaluationOptions(lambda *_: None))
    for name, same in SAME_METRICS.items():
        for metric, other in same.items():
            expected = theirs["metrics"][f"our_{name}"][f"{other},none"]
            assert own[name].metrics[metric] == pytest.approx(expected, rel=1e-4), (name, metric)

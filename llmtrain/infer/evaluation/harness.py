"""EleutherAI's lm-evaluation-harness on our models. The only module that imports lm_eval, which takes long.

Its adapter for Hugging Face models is what this one agrees with: the same tokens, the same windows, the same cuts.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.errors import ConfigError
from llmtrain.infer.answers import iter_texts
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.evaluation.run import (
    EvaluationOptions,
    OnProgress,
    TaskResult,
    model_digest,
    prompt_of,
    text_encoder,
)
from llmtrain.infer.evaluation.samples_file import SamplesFile
from llmtrain.infer.prompt_file import Writing
from llmtrain.infer.text_model import TextModel

_MAX_TOKENS = 256
"""Of an answer whose task does not say, as in lm-eval's own models."""
_REQUESTS_AT_A_TIME = 1024
_FEWSHOT_SEED = 1234
"""Draws the examples of a prompt; lm-eval's own default."""


class HarnessModel(TemplateLM):
    """A decoder as lm-eval asks for models."""

    def __init__(self, model: TextModel, on_progress: OnProgress) -> None:
        super().__init__()
        self._model, self._on_progress = model, on_progress
        self._encoder = text_encoder(model)

    @property
    def eot_token_id(self) -> int:
        return self._model.named.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which nothing is given."""
        return self._encoder.begin_id

    @property
    def max_length(self) -> int:
        """Positions of a text."""
        return self._encoder.limit

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The ids of a text, behind those that every text of training had before it."""
        if add_special_tokens is False:
            return self._model.tokenizer.encode(string)
        return self._encoder.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        texts = [self._encoder.cut([*given, *asked], len(given)) for _, given, asked in requests]
        found = self._scored(texts, "log-likelihoods")
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, window by window."""
        texts, owners = list[ScoredText](), list[int]()
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                given, asked = make_disjoint_window(pair)
                texts.append(ScoredText((*given, *asked), len(given)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._scored(texts, "texts"), strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string; requests that are written alike go together."""
        answers = [""] * len(requests)
        alike: defaultdict[Writing, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[_writing(request.args[1])].append(number)
        done = 0
        for how, numbers in alike.items():
            if how.max_tokens >= self.max_length:
                raise ConfigError(
                    f"max_gen_toks = {how.max_tokens} leaves no room for a prompt in the {self.max_length} "
                    "positions of the model. Set it in the task's generation_kwargs."
                )
            prompts = [
                prompt_of(self._model, self._encoder, requests[number].args[0], how.max_tokens) for number in numbers
            ]
            for number, text in zip(numbers, iter_texts(self._model, prompts, how), strict=True):
                done += 1
                # The earliest stop ends a text there already. lm-eval cuts once more, at the text of the end itself.
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                self._on_progress("lm-eval answers", done, len(requests))
        return answers

    def _scored(self, texts: Sequence[ScoredText], what: str) -> list[tuple[float, bool]]:
        found = list[tuple[float, bool]]()
        for start in range(0, len(texts), _REQUESTS_AT_A_TIME):
            scores = self._model.log_likelihoods(texts[start : start + _REQUESTS_AT_A_TIME])
            found += [(score.total, bool(score.greedy)) for score in scores]
            self._on_progress(f"lm-eval {what}", len(found), len(texts))
        return found


def _writing(said: Mapping[str, Any]) -> Writing:
    """What a task's generation_kwargs ask for. Raises ConfigError for what we do not do."""
    asked = dict(normalize_gen_kwargs(dict(said), _MAX_TOKENS))
    until, max_tokens = asked.pop("until", []), asked.pop("max_gen_toks")
    draws, temperature = asked.pop("do_sample", False), asked.pop("temperature", 0.0)
    top_p, top_k = asked.pop("top_p", 1.0), asked.pop("top_k", 0)
    if asked:
        raise ConfigError(
            f"generation_kwargs {', '.join(sorted(asked))}: not known. Known are until, max_gen_toks, do_sample, "
            "temperature, top_p and top_k."
        )
    sampling = Sampling(float(temperature) if draws else 0.0, int(top_k), float(top_p))
    return Writing(sampling, int(max_tokens), tuple(stop for stop in until if stop))


def evaluate_harness(
    model: TextModel, names: Sequence[str], options: EvaluationOptions, include_path: Path | None = None
) -> dict[str, TaskResult]:
    """The results of lm-eval's tasks and groups by name. Samples are written when all is done.

    Raises ConfigError for names that lm-eval does not know, and for a model that is no decoder.
    """
    if model.config.family != "decoder":
        raise ConfigError(f"model.family = {model.config.family}: lm-eval's tasks are put to decoders only.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    # A name can be that of a task, a group or a tag, or a pattern.
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        where = f" or {include_path}" if include_path else ""
        raise ConfigError(
            f"--tasks {', '.join(unknown)}: no file, and no task of lm-eval{where}. A file of tasks ends with .yaml; "
            "--include-path names a folder with tasks of lm-eval's kind."
        )
    loaded = manager.load([task for name in names for task in manager.match_tasks([name])])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    found = evaluate(HarnessModel(model, options.on_progress), loaded, limit=options.limit, bootstrap_iters=0)
    assert found is not None, "one process evaluates"
    _write_samples(model, found["samples"], options)
    sizes = found.get("n-samples", {})
    return {
        name: TaskResult("lm-eval", sizes.get(name, {}).get("effective", 0), _metrics(said), {})
        for name, said in {**found["results"], **found.get("groups", {})}.items()
    }


def _write_samples(model: TextModel, samples: Mapping[str, Sequence[Any]], options: EvaluationOptions) -> None:
    if options.out is None:
        return
    of = f"{model_digest(model)[:16]} lm-eval {metadata.version('lm_eval')}"
    with SamplesFile(options.out, dict.fromkeys(samples, of)) as file:
        for task, rows in samples.items():
            for row in rows:
                if file.found(task, row["doc_id"]) is None:
                    scores = {name: row[name] for name in row["metrics"] if isinstance(row[name], int | float)}
                    responses = json.loads(json.dumps(row["filtered_resps"], default=str))
                    file.add(
                        task, [(row["doc_id"], {"responses": responses, "filter": row["filter"], "scores": scores})]
                    )


def _metrics(said: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task: `acc,none` as `acc`, and with the filter that it has, `exact_match (strict)`."""
    found = dict[str, float]()
    for key, value in said.items():
        name, comma, filtered = key.partition(",")
        if comma and isinstance(value, int | float) and not name.endswith("_stderr"):
            found[name if filtered == "none" else f"{name} ({filtered})"] = float(value)
    return found

"""The rules of quality of data pipelines beside datatrove's filters, on the same documents, on one core."""

import importlib
import time
from collections import Counter
from importlib.util import find_spec
from typing import Any

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.quality.marks import num_sentences
from data_pipelines.steps.quality.step import Quality
from llmtrain.config.pipelines.quality import QualityStep, RuleName
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_core
from tests.support.readers import DATATROVE, use_datatrove
from tests.support.real_text import real_documents

FILTERS: dict[RuleName, tuple[str, str]] = {
    "gopher": ("gopher_quality_filter", "GopherQualityFilter"),
    "gopher_repetition": ("gopher_repetition_filter", "GopherRepetitionFilter"),
    "c4": ("c4_filters", "C4QualityFilter"),
    "fineweb": ("fineweb_quality_filter", "FineWebQualityFilter"),
}
CHAIN: tuple[RuleName, ...] = ("gopher_repetition", "gopher", "c4", "fineweb")
"""FineWeb's order: a document that one drops is not shown to the next."""

OURS = "llmtrain"
SPLIT = "datatrove, its words by str.split"
SPACY = "datatrove, its words by spaCy"
ALONE = "str.split alone"


def benchmark(options: Options) -> list[Table]:
    """Megabytes of text per CPU second, rule by rule: documents in memory, until each is kept or dropped."""
    texts = real_documents(20 if options.quick else 1500)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tables = []
    with one_core():
        for rules in (*((rule,) for rule in FILTERS), CHAIN):
            contenders: dict[str, Measurement] = {OURS: lambda rules=rules: megabytes / _seconds(_our(rules), texts)}
            contenders[ALONE] = lambda: megabytes / _seconds(str.split, texts)
            contenders |= {
                name: lambda rules=rules, name=name: megabytes / _seconds(_their(rules, name), texts)
                for name in _peers()
            }
            rows = measure(contenders, options.rounds)
            title = f"quality: {', '.join(rules)} on one core ({len(texts)} documents, {megabytes:.1f} MB)"
            tables.append(Table(title, "MB/s of CPU time", "higher", OURS, rows, _notes()))
    return tables


def _peers() -> list[str]:
    if not (DATATROVE / ".installed").is_file():
        return []
    use_datatrove()
    return [SPLIT, *([SPACY] if find_spec("spacy") else [])]


def _notes() -> tuple[str, ...]:
    if not _peers():
        return (f"datatrove is not installed in {DATATROVE}: make readers",)
    return () if SPACY in _peers() else ("as datatrove is installed, it takes words from spaCy, which is slower",)


def _seconds(judge: Any, texts: list[str]) -> float:
    started = time.process_time()
    for text in texts:
        judge(text)
    return time.process_time() - started


def _our(rules: tuple[RuleName, ...]) -> Any:
    step = Quality(QualityStep(rules=rules))
    return lambda text: isinstance(step(Document("", text), Counter()), Dropped)


def _their(rules: tuple[RuleName, ...], peer: str) -> Any:
    """Whether all of some filters keep a text."""
    importlib.import_module("datatrove.utils.text").split_into_parts.cache_clear()  # the words of the last texts
    document = importlib.import_module("datatrove.data").Document
    filters = [_filter(rule, peer) for rule in rules]

    def judge(text: str) -> bool:
        one = document(text=text, id="")
        return all(chosen.filter(one) is True for chosen in filters)

    return judge


def _filter(rule: RuleName, peer: str) -> Any:
    """A filter as it comes, or with words and sentences by the means that ours have."""
    module = importlib.import_module(f"datatrove.pipeline.filters.{FILTERS[rule][0]}")
    text_module = importlib.import_module("datatrove.utils.text")
    split = (lambda text, language: text.split()) if peer == SPLIT else text_module.split_into_words
    sentences = (
        (lambda line, language: [line] * num_sentences(line)) if peer == SPLIT else text_module.split_into_sentences
    )
    for name, replacement in (("split_into_words", split), ("split_into_sentences", sentences)):
        if hasattr(module, name):
            setattr(module, name, replacement)
    return getattr(module, FILTERS[rule][1])()

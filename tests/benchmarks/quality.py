"""The rules of quality of data pipelines beside datatrove's filters, on the same documents, on one core."""

import importlib
import time
from collections import Counter
from importlib.util import find_spec
from typing import Any

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.quality.marks import num_sentences
from data_pipelines.steps.quality.step import Quality
from llmtrain.config.quality import QualityStep, RuleName
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_core
from tests.support.readers import DATATROVE, use_datatrove
from tests.support.real_text import real_documents

FILTERS: dict[RuleName, tuple[str, str]] = {
    "gopher": ("gopher_quality_filter", "GopherQualityFilter"),
    "gopher_repetition": ("gopher_repetition_filter", "GopherRepetitionFilter"),
    "c4": ("c4_filters", "C4QualityFilter"),
    "fineweb": ("fineweb_quality_filter", "FineWebQualityFilter"),
}
OURS = "llmtrain"
SPLIT = "datatrove, its words by str.split"
SPACY = "datatrove, its words by spaCy"
ALONE = "str.split alone"


def benchmark(options: Options) -> list[Table]:
    """Megabytes of text per CPU second, rule by rule: documents in memory, until each is kept or dropped."""
    texts = real_documents(60 if options.quick else 1500)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tables = []
    with one_core():
        for rule in FILTERS:
            contenders: dict[str, Measurement] = {OURS: lambda rule=rule: megabytes / _seconds(_our(rule), texts)}
            contenders[ALONE] = lambda: megabytes / _seconds(str.split, texts)
            contenders |= {
                name: lambda rule=rule, name=name: megabytes / _seconds(_their(rule, name), texts) for name in _peers()
            }
            rows = measure(contenders, options.rounds)
            title = f"quality: {rule} on one core ({len(texts)} documents, {megabytes:.1f} MB)"
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


def _our(rule: RuleName) -> Any:
    step = Quality(QualityStep(rules=(rule,)))
    return lambda text: isinstance(step(Document("", text), Counter()), Dropped)


def _their(rule: RuleName, peer: str) -> Any:
    """A filter as it comes, or with words and sentences by the means that ours have."""
    module = importlib.import_module(f"datatrove.pipeline.filters.{FILTERS[rule][0]}")
    text_module = importlib.import_module("datatrove.utils.text")
    document = importlib.import_module("datatrove.data").Document
    split = (lambda text, language: text.split()) if peer == SPLIT else text_module.split_into_words
    sentences = (
        (lambda line, language: [line] * num_sentences(line)) if peer == SPLIT else text_module.split_into_sentences
    )
    for name, replacement in (("split_into_words", split), ("split_into_sentences", sentences)):
        if hasattr(module, name):
            setattr(module, name, replacement)
    chosen = getattr(module, FILTERS[rule][1])()
    text_module.split_into_parts.cache_clear()  # it remembers the words of the last texts
    return lambda text: chosen.filter(document(text=text, id=""))

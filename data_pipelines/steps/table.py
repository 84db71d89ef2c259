"""Every step that looks at one document: how it is built, which packages it needs, which files it reads.

A row is all that the plan of a pipeline and its workers know of a step. Steps over groups of documents, such as the
removal of duplicates, have none here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from data_pipelines.documents import DocumentStep
from data_pipelines.steps.addresses import Addresses
from data_pipelines.steps.contamination import Contamination
from data_pipelines.steps.language import Language
from data_pipelines.steps.length import Length
from data_pipelines.steps.main_text import MainText
from data_pipelines.steps.normalization import Normalization
from data_pipelines.steps.personal_data import PersonalData
from data_pipelines.steps.quality.step import Quality
from data_pipelines.steps.word_list import WordList
from llmtrain.config.pipelines.steps import StepConfig
from llmtrain.errors import Problem


@dataclass(frozen=True)
class StepRow:
    """The facts about a step.

    `build` makes it from its section, once in each process that runs it: it may load models and lists, and need not
    survive pickling. `packages` are the modules that it imports beyond those that llmtrain is installed with, by the
    extra of llmtrain that has them; `files` the lists and evaluation sets that its result depends on.
    """

    build: Callable[[Any], DocumentStep]
    packages: Callable[[Any], dict[str, str]] = lambda section: {}
    files: Callable[[Any], tuple[str, ...]] = lambda section: ()


_EXTRACTORS = {"resiliparse": {"resiliparse": "data"}, "trafilatura": {"trafilatura": "trafilatura"}}

STEPS: dict[str, StepRow] = {
    "normalize": StepRow(Normalization, lambda section: {"ftfy": "data"} if section.ftfy else {}),
    "html": StepRow(MainText, lambda section: _EXTRACTORS[section.extractor]),
    "language": StepRow(Language, lambda section: {"py3langid": "data"}),
    "quality": StepRow(Quality),
    "length": StepRow(Length),
    "pii": StepRow(PersonalData, lambda section: {"phonenumbers": "data"} if section.phones else {}),
    "words": StepRow(WordList, files=lambda section: section.files),
    "urls": StepRow(Addresses, files=lambda section: (*section.domains, *section.urls, *section.words)),
    "decontaminate": StepRow(Contamination, files=lambda section: section.files),
}


def package_problems(steps: Sequence[StepConfig]) -> list[Problem]:
    """What is missing, where steps need packages that are not installed."""
    return [
        Problem(f"steps.{number}.{step.name}", f"needs the package {package}: pip install 'llmtrain[{extra}]'.")
        for number, step in enumerate(steps)
        if step.name in STEPS
        for package, extra in STEPS[step.name].packages(step.section).items()
        if find_spec(package) is None
    ]

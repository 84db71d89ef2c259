"""The language of a document, by its begin."""

from collections import Counter
from typing import get_args

import pytest

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.language import Language
from llmtrain.config.pipelines.steps import LanguageCode, LanguageStep

TEXTS = {
    "en": "The committee met on Thursday and decided that the old bridge should be closed during the winter months.",
    "de": "Der Ausschuss trat am Donnerstag zusammen und beschloss, die alte Brücke über den Winter zu sperren.",
    "fr": "Le comité s'est réuni jeudi et a décidé que le vieux pont devait être fermé pendant les mois d'hiver.",
    "es": "El comité se reunió el jueves y decidió que el viejo puente debía cerrarse durante los meses de invierno.",
    "ru": "Комитет собрался в четверг и решил, что старый мост должен быть закрыт на зимние месяцы.",
    "zh": "委员会于星期四开会，决定旧桥在冬季关闭，等到春天再重新开放。",
    "ja": "委員会は木曜日に会合を開き、古い橋を冬の間閉鎖することを決定しました。",
    "ar": "اجتمعت اللجنة يوم الخميس وقررت إغلاق الجسر القديم خلال أشهر الشتاء.",
}
KNOWN = Language(LanguageStep())


@pytest.mark.parametrize("language", TEXTS)
def test_languages_are_told_apart_and_noted(language: str) -> None:
    counts = Counter[str]()
    assert KNOWN(Document("1", TEXTS[language]), counts) == Document("1", TEXTS[language], language=language)
    assert counts == {f"language_{language}": 1}


def test_what_is_not_kept_is_dropped() -> None:
    step = Language(LanguageStep(keep=("en", "de")))
    kept = {language for language, text in TEXTS.items() if step(Document("1", text), Counter()) != Dropped("language")}
    assert kept == {"en", "de"}


@pytest.mark.parametrize("text", ["", " \n", "1234 5678", "x = f(y)"])
def test_what_no_language_is_likely_for_is_uncertain(text: str) -> None:
    assert KNOWN(Document("1", text), Counter()) == Dropped("uncertain")
    noted = Language(LanguageStep(min_probability=0.0))(Document("1", text), Counter())
    assert isinstance(noted, Document) and noted.language


def test_the_begin_decides_whatever_white_space_it_has() -> None:
    begin = TEXTS["de"].replace(" ", "\n" * 200)
    text = begin + TEXTS["ru"] * 20
    found = Language(LanguageStep(characters=len(TEXTS["de"])))(Document("1", text), Counter())
    assert isinstance(found, Document) and found.language == "de"
    found = Language(LanguageStep(characters=5000))(Document("1", text), Counter())
    assert isinstance(found, Document) and found.language == "ru"


def test_the_configuration_knows_the_languages_of_the_model() -> None:
    assert sorted(get_args(LanguageCode)) == sorted(KNOWN._identifier.labels)


def test_the_model_is_loaded_once() -> None:
    assert Language(LanguageStep(keep=("fr",)))._identifier is KNOWN._identifier

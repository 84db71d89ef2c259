"""Documents by the address that they came from."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.addresses import Addresses
from llmtrain.config.pipelines.steps import UrlsStep
from llmtrain.errors import DataError


def step(folder: Path, **keys: Any) -> Addresses:
    for name, lines in {
        "domains": ["example.com", "*.Spam.org", ".co.test", "www.with-www.net", "bücher.example"],
        "urls": ["https://www.news.test/a/b/", "http://news.test/c?id=1", "news.test:8080/d"],
        "words": ["casino", "Poker"],
    }.items():
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    lists = {name: (str(folder / name),) for name in ("domains", "urls", "words")}
    return Addresses(UrlsStep(**{**lists, **keys}))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com", "domain"),
        ("http://user:secret@WWW.Example.COM:8443/x?y#z", "domain"),
        ("example.com/page", "domain"),
        ("https://a.b.example.com./", "domain"),
        ("https://notexample.com/", ""),
        ("https://example.com.evil.test/", ""),
        ("https://x.test/?u=example.com", ""),
        ("https://spam.org", "domain"),
        ("https://a.co.test", "domain"),
        ("https://with-www.net", "domain"),
        ("https://bücher.example/a", "domain"),
        ("https://news.test/a/b", "url"),
        ("http://www.news.test:80/a/b/#part", "url"),
        ("https://news.test/a/b/c", ""),
        ("https://news.test/A/b", ""),  # paths have capitals
        ("https://news.test/c?id=1", "url"),
        ("https://news.test/c?id=2", ""),
        ("https://news.test:8080/d", "url"),
        ("https://x.test/best-CASINO/", "word"),
        ("https://online_poker.test/", "word"),
        ("https://casinos.test/", ""),
        ("http://[::1", ""),
        ("http://[2001:db8::1]:80/", ""),
        ("://", ""),
        ("\0\ud800", ""),
    ],
)
def test_what_a_list_names(tmp_path: Path, url: str, reason: str) -> None:
    document = Document("1", "text", url=url)
    assert step(tmp_path)(document, Counter()) == (Dropped(reason) if reason else document)
    allowed = step(tmp_path, mode="allow")(document, Counter())
    assert allowed == (document if reason else Dropped("not_allowed"))


def test_documents_without_an_address(tmp_path: Path) -> None:
    document = Document("1", "text")
    assert step(tmp_path)(document, Counter()) is document
    assert step(tmp_path, without_url="drop")(document, Counter()) == Dropped("no_url")


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("domains", "https://example.com/", "is not a domain, such as example.com."),
        ("domains", "*.", "is not a domain, such as example.com."),
        ("words", "two words", "is not one word of letters and digits."),
        ("urls", "/", "is not an address, such as example.com/page."),
    ],
)
def test_a_line_that_names_nothing_is_refused(tmp_path: Path, kind: str, line: str, says: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(DataError, match=r"list\.txt:2: ") as caught:
        Addresses(UrlsStep(**{kind: (str(path),)}))
    assert says in str(caught.value)

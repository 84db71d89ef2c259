"""The step `urls`: documents by the address that they came from, and lists of domains, addresses and words."""

import re
from collections import Counter
from urllib.parse import urlsplit

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.lists import read_entries
from llmtrain.config.pipelines.steps import UrlsStep

_DOMAIN = re.compile(r"[^\s/:@?#]+")
_PORTS = (":80", ":443")
_WORDS = re.compile(r"[^\W_]+")


class Addresses:
    """Drops documents whose address a list names, or those whose address none does."""

    def __init__(self, section: UrlsStep) -> None:
        self._section = section
        self._domains = frozenset(read_entries(section.domains, _domain, "a domain, such as example.com"))
        self._urls = frozenset(read_entries(section.urls, _plain, "an address, such as example.com/page"))
        self._words = frozenset(read_entries(section.words, _word, "one word of letters and digits"))

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document, or why it is dropped."""
        if not document.url:
            return document if self._section.without_url == "keep" else Dropped("no_url")
        reason = self._named_by(document.url)
        if self._section.mode == "allow":
            return document if reason else Dropped("not_allowed")
        return Dropped(reason) if reason else document

    def _named_by(self, url: str) -> str:
        """The kind of list that names an address; empty where none does."""
        plain = _plain(url)
        domain = re.split(r"[/?:]", plain, maxsplit=1)[0]
        while domain:
            if domain in self._domains:
                return "domain"
            _, _, domain = domain.partition(".")
        if plain in self._urls:
            return "url"
        if not self._words.isdisjoint(_WORDS.findall(url.lower())):
            return "word"
        return ""


def _domain(entry: str) -> str | None:
    """A domain of a list, which may be written as `.example.com` or `*.example.com`."""
    domain = entry.lower().removeprefix("*").strip(".").removeprefix("www.")
    return domain if _DOMAIN.fullmatch(domain) else None


def _plain(url: str) -> str:
    """An address without scheme, user, `www.`, usual port, last slash and fragment: what names the same page."""
    url = url.strip()
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
    except ValueError:  # half of an IPv6 address
        return url
    host = parts.netloc.rpartition("@")[2].lower().removeprefix("www.")
    for port in _PORTS:
        host = host.removesuffix(port)
    path = parts.path.rstrip("/")
    return f"{host.rstrip('.')}{path}{'?' * bool(parts.query)}{parts.query}"


def _word(entry: str) -> str | None:
    return entry.lower() if _WORDS.fullmatch(entry.lower()) else None

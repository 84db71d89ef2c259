"""The step `pii`: mail addresses, IP addresses and phone numbers are replaced.

A pattern finds what may be one, and a check decides: the parser of the kind, and what stands around it. Version
numbers, times, sections and code look much like addresses. Patterns are bounded, so that no text takes long.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.phones import PhoneNumbers
from llmtrain.config.pipelines.steps import PiiStep

Span = tuple[int, int]

_MAIL_DOMAIN = re.compile(r"@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,10}[^\W\d_]{2,24}(?![\w(-])")
_MAIL_NAME = re.compile(r"\w[\w.%+~-]{0,63}$")
_LONGEST_NAME = 64

_IPV4 = re.compile(r"(?<![\w.])(?<![A-Za-z_.]-)(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w|-(?!\d{1,3}\.)\w)")
_NUMBERED = re.compile(
    r"(?:\bv|\bver|versions?|releases?|\brev|revisions?|builds?|firmware|patch|sections?|§|chapters?|clauses?|figures?|"
    r"tables?|appendix|\bsec|\bfig|\boids?|[A-Za-z]/)[\s.:=#(]*$",
    re.IGNORECASE,
)
"""What stands before a number of four parts that is no address: what it is a version or a section of."""

_FIRST_PART, _PARTS = 20, 100
"""Numbers below these are those of nearly all versions and sections of four parts, and of one in 200 addresses."""
_CALLED_ADDRESS = re.compile(
    r"(?://|@|\[|\bip(?:v4)?|addr(?:ess(?:es)?)?|hosts?|servers?|\bdns|\bping|::ffff:)[^\w\n]*$", re.IGNORECASE
)
_PORT_OR_NETWORK = re.compile(r":\d{2,5}\b|/[123]?\d\b")

_IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|:(?=:)){1,7}(?::?[0-9A-Fa-f]{1,4})?(?::[0-9A-Fa-f]{1,4}){0,6}"
    r"(?:(?<=:)(?:\d{1,3}\.){3}\d{1,3})?(?![\w:]|\.\d)"
)
_AROUND = 24
_SLICE = re.compile(r"\d+::\d+")
"""Of a list in code, or two years: no address that is given out looks like it."""


class PersonalData:
    """Replaces what leads to a person, kind by kind."""

    def __init__(self, section: PiiStep) -> None:
        kinds: list[tuple[str, str, Callable[[str], Iterator[Span]]]] = []
        if section.mails:
            kinds.append(("mails", section.mail_text, _mails))
        if section.ip_addresses:
            public = section.public_only
            kinds.append(("ipv4_addresses", section.ipv4_text, lambda text: _ipv4_addresses(text, public)))
            kinds.append(("ipv6_addresses", section.ipv6_text, lambda text: _ipv6_addresses(text, public)))
        if section.phones:
            kinds.append(("phone_numbers", section.phone_text, PhoneNumbers(section.phone_regions)))
        self._kinds = kinds

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document; `counts` has how many of each kind were replaced."""
        text = document.text
        for name, replacement, find in self._kinds:
            parts: list[str] = []
            end = 0
            for begin, behind in find(text):
                if text[begin:behind] != replacement:
                    parts += (text[end:begin], replacement)
                    end = behind
            if parts:
                counts[name] += len(parts) // 2
                text = "".join((*parts, text[end:]))
        return document if text is document.text else replace(document, text=text)


def _mails(text: str) -> Iterator[Span]:
    """Addresses with a domain of a country or organization. What is called as a function is code: `a@b.mean()`."""
    if "@" not in text:
        return
    end = 0
    for found in _MAIL_DOMAIN.finditer(text):
        name = _MAIL_NAME.search(text[max(end, found.start() - _LONGEST_NAME) : found.start()])
        if name:
            yield found.start() - len(name[0]), found.end()
            end = found.end()


def _ipv4_addresses(text: str, public_only: bool) -> Iterator[Span]:
    if text.count(".") < 3:
        return
    for found in _IPV4.finditer(text):
        begin, end = found.span()
        if _is_somebodys(found[0], public_only) and not _is_numbering(text, begin, end):
            yield begin, end


def _is_numbering(text: str, begin: int, end: int) -> bool:
    """Whether four numbers are those of a version or section, by what stands around them and how large they are."""
    before = text[max(0, begin - _AROUND) : begin]
    if _NUMBERED.search(before):
        return True
    parts = [int(part) for part in text[begin:end].split(".")]
    if parts[0] >= _FIRST_PART or max(parts) >= _PARTS:
        return False
    return not (_CALLED_ADDRESS.search(before) or _PORT_OR_NETWORK.match(text, end))


def _ipv6_addresses(text: str, public_only: bool) -> Iterator[Span]:
    if text.count(":") < 2:
        return
    for found in _IPV6.finditer(text):
        if not _SLICE.fullmatch(found[0]) and _is_somebodys(found[0], public_only):
            yield found.span()


def _is_somebodys(written: str, public_only: bool) -> bool:
    """Whether an address is valid and can be that of a machine: in what is given out, or in private networks."""
    try:
        address = ip_address(written)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_reserved or address.is_loopback or address.is_unspecified or address.is_multicast:
        return False  # of IPv6, all but 2000::/3 and private networks: `std::dec` and `a::b` are in what is reserved
    if not public_only:
        return not (isinstance(address, IPv4Address) and written.startswith("0."))
    return address.is_global

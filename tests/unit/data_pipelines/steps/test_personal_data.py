"""What leads to a person is replaced, and what looks much like it is not."""

from collections import Counter
from typing import Any

import pytest

from data_pipelines.documents import Document
from data_pipelines.steps.personal_data import PersonalData
from llmtrain.config.pipelines.steps import PiiStep

DEFAULT = PersonalData(PiiStep())
LOCAL = PersonalData(PiiStep(public_only=False, phone_regions=("US", "DE")))


def replaced(step: PersonalData, text: str) -> tuple[str, dict[str, int]]:
    """The text, and what was counted. Once more, nothing changes."""
    counts, again = Counter[str](), Counter[str]()
    found = step(Document("1", text), counts)
    assert isinstance(found, Document)
    assert step(found, again) is found
    assert not again
    return found.text, dict(counts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to john.doe+x@mail.example.co.uk.", "Write to MAIL."),
        ("<a@b.de>, 'o.b@foo-bar.org';x_y%z@q.museum", "<MAIL>, 'MAIL';MAIL"),
        ("ümlaut@exämple.de", "MAIL"),
        ("mailto:me@example.org?subject=hi", "mailto:MAIL?subject=hi"),
        ("a@b.com,c@d.com", "MAIL,MAIL"),
        ("93.184.216.34", "V4"),
        ("9.184.216.34 or 19.20.21.100.", "V4 or V4."),
        (
            "ping 8.8.8.8. IP: 8.8.8.8, host=8.8.8.8; [8.8.8.8] address 8.8.8.8",
            "ping V4. IP: V4, host=V4; [V4] address V4",
        ),
        ("8.8.8.8:53 8.8.8.0/24 ssh://8.8.8.8", "V4:53 V4/24 ssh://V4"),
        ("http://93.184.216.34:80/x", "http://V4:80/x"),
        ("[66.249.64.12]", "[V4]"),
        ("66.249.64.12 - - [10/Oct/2000:13:55:36 -0700]", "V4 - - [10/Oct/2000:13:55:36 -0700]"),
        ("66.249.64.12 GET /", "V4 GET /"),
        ("from 88.8.8.8-88.8.8.20, 8.8.4.0/24", "from V4-V4, V4/24"),
        ("user@8.8.8.8", "user@V4"),
        ("2001:4860:4860::8888", "V6"),
        ("[2001:4860:4860::8888]:443", "[V6]:443"),
        ("2a00:1450:4001:81b:0:0:0:200e/64 is", "V6/64 is"),
        ("at 2a00:1450::1.", "at V6."),
        ("::ffff:8.8.8.8", "::ffff:V4"),
        ("Call +49 30 901820.", "Call PHONE."),
        ("+1 (650) 253-0000 or +44 20 8366 1177", "PHONE or PHONE"),
        ("tel:+442083661177", "tel:PHONE"),
    ],
)
def test_what_is_replaced(text: str, expected: str) -> None:
    found, counts = replaced(DEFAULT, text)
    texts = {"MAIL": "email@example.com", "V4": "192.0.2.1", "V6": "2001:db8::1", "PHONE": "555-0100"}
    kinds = {"MAIL": "mails", "V4": "ipv4_addresses", "V6": "ipv6_addresses", "PHONE": "phone_numbers"}
    assert counts == {kinds[name]: expected.count(name) for name in kinds if name in expected}
    for name, text in texts.items():
        expected = expected.replace(name, text)
    assert found == expected


@pytest.mark.parametrize(
    "text",
    [
        *("@decorator def f", "x = a@b.mean()", "A@B.T", "pkg@1.2.3", "@types/node@18.0.0", "user@localhost", "a@b.c1"),
        *(
            "version 31.2.3.4",
            "v31.2.3.4",
            "Version: 30.20.30.40",
            "Chrome/91.0.44.72 Gecko/5.36.1.2",
            "build 99.8.7.6",
        ),
        *("31.2.3.4.5", "300.1.1.1", "01.02.03.04", "libfoo-31.2.3.4.tar.gz", "31.2.3.4-5deb1", "31.2.3.4rc1"),
        *("1.2.3.4 Heading of one", "\n  4.1.2.3. Another", "## 4.1.2.3 Third", "see section 40.1.2.3", "§ 40.1.2.3"),
        *(
            "merged to 1.6.2.4.",
            "Changes in 1.2.7.3 (13 Apr 2013)",
            "XFree86 4.3.0.1",
            "Git 1.7.12.3 Release",
            "8.8.8.8",
        ),
        *("OID 92.5.29.17", "1.3.6.1.4.1.311.2", "10.12.2023", "10.12.2023 12:30:45", "2023-10-05T12:30:45.123"),
        *("10.0.0.1", "127.0.0.1", "192.168.1.1", "255.255.255.0", "0.0.0.0", "224.0.0.1", "192.0.2.7", "fe80::1"),
        *("std::vector<int>", "std::dec", "a::b", "A::B::C", "dead::beef", "Foo::Bar::baz()", "::", "::1", "x[1::2]"),
        *("x[2000::3]", "2023::15", "12:30:45", "1:2:3:4:5:6:7:8", "aa:bb:cc:dd:ee:ff", "2001:db8::17", "10:20::30"),
        *("2001:4860:4860::8888::1", "2001:4860:4860::88888", "fd00::1", "key::2a00::1"),
        *("650-253-0000", "+123", "1+2 3 4 5 6 7 8 9", "+5 000 000 000", "x+49 30 901820", "++49 30 901820"),
    ],
)
def test_what_only_looks_like_it(text: str) -> None:
    assert replaced(DEFAULT, text) == (text, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host 10.0.0.1 127.0.0.1 255.255.255.0 0.0.0.0", "host 192.0.2.1 127.0.0.1 255.255.255.0 0.0.0.0"),
        ("192.168.1.1 10.0.0.255", "192.0.2.1 192.0.2.1"),
        ("range=120.120.10.128/28", "range=192.0.2.1/28"),
        ("ACCESSDB 8 2023-01-08 2.11.2", "ACCESSDB 8 2023-01-08 2.11.2"),
        ("fe80::1 fd00::1 ::1 a::b", "2001:db8::1 2001:db8::1 ::1 a::b"),
        ("650-253-0000, (650) 253-0000", "555-0100, 555-0100"),
        ("650.253.0000", "555-0100"),
        ("030 901820 und 030/901820", "555-0100 und 555-0100"),
        ("+49 30 901820", "555-0100"),
        ("6502530000", "6502530000"),
        ("229.655 517.2 Q, Boston, MA 02110-1301, 09.11.2017", "229.655 517.2 Q, Boston, MA 02110-1301, 09.11.2017"),
        ("+49-30-90-18-20", "555-0100"),
        ("0.6502530000 $650 253 0000", "0.6502530000 $650 253 0000"),
        ("2023-10-05 12:30, 12/10/2023 08:30", "2023-10-05 12:30, 12/10/2023 08:30"),
        ("ISBN 978-3-16-148410-0", "ISBN 978-3-16-148410-0"),
        ("3.14159265358979 1234567890123456 10 20 30 40 50 60", "3.14159265358979 1234567890123456 10 20 30 40 50 60"),
    ],
)
def test_private_addresses_and_numbers_of_countries(text: str, expected: str) -> None:
    assert replaced(LOCAL, text)[0] == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"mails": False}, "a@b.com I6 I4 P"),
        ({"ip_addresses": False}, "M 2a00:1450::1 88.8.8.8 P"),
        ({"phones": False}, "M I6 I4 +49 30 901820"),
    ],
)
def test_kinds_and_what_stands_for_them(keys: dict[str, Any], expected: str) -> None:
    texts = {"mail_text": "M", "ipv4_text": "I4", "ipv6_text": "I6", "phone_text": "P"}
    step = PersonalData(PiiStep(**keys, **texts))
    assert replaced(step, "a@b.com 2a00:1450::1 88.8.8.8 +49 30 901820")[0] == expected


@pytest.mark.parametrize(
    "part", ["a", "a.", "a@", "a@a.", "1.", "1:", ":", "+1 ", "1 ", "(1", "a-", ".", "@", "a@b.c-"]
)
def test_no_text_takes_long(part: str) -> None:
    """Each pattern is bounded: with a million characters of one kind, a search that goes back would take hours."""
    text = part * (300_000 // len(part))
    for step in (DEFAULT,) if part[0] in "1(" else (DEFAULT, LOCAL):
        replaced(step, text)

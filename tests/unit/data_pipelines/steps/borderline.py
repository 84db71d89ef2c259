"""Texts at each threshold of the rules of quality, on both sides of it, and what becomes of them."""

from collections.abc import Iterator
from itertools import count

Case = tuple[str, str, str]
"""What it is, the text, and the name of the test that it fails, empty where it is kept."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(number: int, length: int = 5, salt: str = "k") -> list[str]:
    """So many words of letters, all different; those of another salt are different again."""
    return [_word(n, length, salt) for n in range(number)]


def _word(number: int, length: int, salt: str) -> str:
    letters = ""
    for _ in range(length - len(salt)):
        number, letter = divmod(number, 26)
        letters += _LETTERS[letter]
    return salt + letters


def _sized(text: str, length: int) -> str:
    """The text, with words behind it that stand nowhere else, of exactly so many characters."""
    number = count()
    while length - len(text) > 14:
        text += f" {_word(next(number), 6, 'z')}"
    return text + " " + "y" * (length - len(text) - 1)


def _lines(parts: list[str], per_line: int) -> str:
    return "\n".join(" ".join(parts[n : n + per_line]) for n in range(0, len(parts), per_line))


def _prose(number: int, length: int = 5) -> list[str]:
    return ["the", "of", *words(number - 2, length)]


def gopher() -> Iterator[Case]:
    yield "50 words", " ".join(_prose(50)), ""
    yield "49 words", " ".join(_prose(49)), "gopher_short_doc"
    yield "50 words and marks", " ".join([*_prose(50), *["--", "&"] * 4]), ""
    yield "49 words and marks", " ".join([*_prose(49), *["--", "&"] * 4]), "gopher_short_doc"
    yield "100,000 words", " ".join(_prose(100_000)), ""
    yield "100,001 words", " ".join(_prose(100_001)), "gopher_long_doc"
    three = ["the", "and", *words(97, 3)]
    yield "a mean length of 3", " ".join([*three, "xyz"]), ""
    yield "less than 3", " ".join([*three, "xy"]), "gopher_below_avg_threshold"
    ten = ["the", "and", *words(96, 10), *words(1, 17, "q")]
    yield "a mean length of 10", " ".join([*ten, "x" * 17]), ""
    yield "more than 10", " ".join([*ten, "x" * 18]), "gopher_above_avg_threshold"
    prose = _prose(100)
    for name, mark in (("hashes", "#"), ("ellipsis", "..."), ("ellipsis", "…")):
        yield f"10 of {mark}", _lines([*prose[:90], *[f"{mark}{word}" for word in prose[90:]]], 10), ""
        some = _lines([*prose[:89], *[f"{mark}{word}" for word in prose[89:]]], 10)
        yield f"11 of {mark}", some, f"gopher_too_many_{name}"
    lines = _lines(prose, 10).split("\n")
    for mark in ("- ", "•", "   -"):
        yield f"9 of 10 with {mark}", "\n".join([lines[0], *[mark + line for line in lines[1:]]]), ""
        yield f"10 of 10 with {mark}", "\n".join(mark + line for line in lines), "gopher_too_many_bullets"
    for mark in ("...", "…", "... "):
        yield f"3 of 10 with {mark}", "\n".join([*lines[:7], *[line + mark for line in lines[7:]]]), ""
        some = "\n".join([*lines[:6], *[line + mark for line in lines[6:]]])
        yield f"4 of 10 with {mark}", some, "gopher_too_many_end_ellipsis"
    yield "80 of 100 with a letter", _lines([*_prose(80), *["12345"] * 20], 10), ""
    yield (
        "79 of 100 with a letter",
        _lines([*_prose(79), *["12345", "²Ⅷ½", "٣٣"] * 7], 10),
        "gopher_below_alpha_threshold",
    )
    yield "two stop words", " ".join(["with", "have", *words(60)]), ""
    yield "one stop word", " ".join(["with", "with", "With", *words(60)]), "gopher_enough_stop_words"


def repetition() -> Iterator[Case]:
    yield "nothing", "", "empty"
    yield "a word", "word", ""
    yield "five words", " ".join(words(5, 200)), "top_2_gram"  # the first two count once, and are two fifths of it
    for mark, name in (("\n\n", "para"), ("\n", "line")):
        different = [" ".join(words(20, 6, salt)) for salt in "abcdef"]
        yield f"3 of 10 {name}", mark.join([*different, *["q"] * 4]), ""
        yield f"4 of 10 {name}", mark.join([*different[:5], *["q"] * 5]), f"dup_{name}_frac"
        different = [" ".join(words(4, 6, salt)) for salt in "abcdefghij"]
        start = mark.join([*different, "q" * 400, "q" * 400, ""])
        yield f"400 of 2000 {name}", _sized(start, 2000), ""
        yield f"400 of 1999 {name}", _sized(start, 1999), f"dup_{name}_char_frac"
    yield "ends of lines alone", "\n\n\n", "dup_line_frac"
    for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        ngram = " ".join(words(n, 9, "t"))
        fill = iter(words(100, 7, "u"))
        text = " ".join(f"{next(fill)} {next(fill)} {ngram}" for _ in range(9))
        for size, fails in _around(9 * len(ngram), limit):
            yield f"the top {n} words of {size}", _sized(text, size), f"top_{n}_gram" * fails
    for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        ngrams = [" ".join(words(n, 5, salt)) for salt in "abcde"]
        fill = iter(words(100, 7, "u"))
        text = " ".join(f"{next(fill)} {ngram}" for ngram in [*ngrams, *ngrams])
        for size, fails in _around(5 * 5 * n, limit):
            yield f"{n} words again, of {size}", _sized(text, size), f"duplicated_{n}_n_grams" * fails


def _around(part: int, limit: float) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """The shortest text of which a part is not above the limit, and a shorter one by a character."""
    size = next(size for size in count(part) if part / size <= limit)
    return (size, False), (size - 1, True)


def fineweb() -> Iterator[Case]:
    def some(number: int, salt: str, end: str = "", length: int = 12) -> list[str]:
        return [" ".join(words(8, length, salt + _LETTERS[n // 26] + _LETTERS[n % 26])) + end for n in range(number)]

    yield "nothing", "", "empty"
    yield "blanks", " \n\t\n", "empty"
    yield "12 of 100 lines end", "\n".join([*some(12, "a", "."), *some(88, "b")]), ""
    yield "11 of 100 lines end", "\n".join([*some(11, "a", "?"), *some(89, "b")]), "line_punct_ratio"
    yield "blank lines do not count", "\n\n".join([*some(12, "a", "。"), *some(88, "b")]), ""
    long = some(33, "a", ".")
    short = [line[:29] + "." for line in some(67, "c")]
    yield "67 of 100 lines are short", "\n".join([*long, *short]), ""
    yield "68 of 100 lines are short", "\n".join([*long[1:], short[0][::-1], *short]), "short_line_ratio"
    yield "and longer by a character", "\n".join([*long[1:], short[0][::-1] + "x", *short]), ""
    unique = some(40, "a", ".")
    once = "q" * 40
    for size, fails in _around(len(once), 0.01):
        start = "\n".join([once, once, *unique[:30]])
        text = _sized(start, size + start.count("\n"))
        yield f"40 of {size} again", text, "char_dup_ratio" * fails
    text = _lines([word + "." for word in words(40, 30)], 4)
    yield "12 line ends for 40 words", text + "\n" * 3, ""
    yield "13 line ends for 40 words", text + "\n" * 4, "list_ratio"


def c4() -> Iterator[tuple[str, str, str, str]]:
    """As above, with the text that is left."""
    line = "This is a line of some words."
    four = "\n".join([line] * 4)
    five = f"{four}\n{line}"
    yield "five sentences", five, "", five
    yield "four sentences", four, "too_few_sentences", ""
    yield "five in a line", " ".join([line] * 5), "", " ".join([line] * 5)
    yield "no end", f"{five}\nThis is a line of words", "", five
    for end in ('"', "'", "!", "?"):
        yield f"the end {end}", f"{four}\nIt has an end{end}", "", f"{four}\nIt has an end{end}"
    yield "an ellipsis", f"{five}\nThis is a line of words...", "", five
    yield "two words", f"{five}\nTwo words.", "", five
    yield "three words", f"{five}\nNow three words.", "", f"{five}\nNow three words."
    yield "two and a citation", f"{five}\nTwo words [1].", "", f"{five}\nTwo words ."
    yield (
        "citations",
        f"{five}\nWords that are cited[12][edit][citation needed][].",
        "",
        f"{five}\nWords that are cited.",
    )
    yield "a word of 1000", f"{five}\nNow a {'w' * 999}.", "", f"{five}\nNow a {'w' * 999}."
    yield "a word of 1001", f"{five}\nNow a {'w' * 1000}.", "", five
    yield "javascript", f"{five}\nYou need JavaScript for it.", "", five
    yield "lorem ipsum", f"{five}\nThen Lorem Ipsum comes.", "lorem_ipsum", ""
    yield "lorem ipsum without an end", f"{five}\nThen Lorem Ipsum comes", "", five
    yield "lorem ipsum in a cited line", f"{five}\nThen lorem[1] ipsum comes.", "lorem_ipsum", ""
    yield "a bracket", f"{five}\nNow a {{ bracket.", "curly_bracket", ""
    yield "a bracket and javascript", f"{five}\nNow a {{ javascript bracket.", "", five
    yield "a bracket without an end", f"{five}\nNow a {{ bracket", "", five
    for phrase in ("terms of use", "Privacy Policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"):
        yield phrase, f"{five}\nThese are our {phrase} now.", "", five
    yield "blank lines and blanks", f"\n\n  {five}  \r\n\u2028", "", five
    yield "nothing", "", "too_few_sentences", ""

"""The section `quality` of a data pipeline: rules that tell text of people from the rest, and their thresholds. Pure.

Every threshold is that of the paper; null turns its test off.
"""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import AsTuple, AsWhole, Section, Text

RuleName = Literal["gopher", "gopher_repetition", "c4", "fineweb"]

Share = Annotated[float, Field(ge=0, le=1)] | None
Ratio = Annotated[float, Field(ge=0, le=1000)] | None
Number = Annotated[int, Field(ge=0, le=10**9), AsWhole] | None

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


class GopherRules(Section):
    """Rae et al. 2021, appendix A.1.1: quality. Words are what white space separates."""

    min_words: Number = Field(default=50, description="Fewest words that are more than marks.")
    max_words: Number = Field(default=100_000, description="Most words that are more than marks.")
    min_mean_word_length: Ratio = Field(default=3.0, description="Least mean length of words, in characters.")
    max_mean_word_length: Ratio = Field(default=10.0, description="Greatest mean length of words.")
    max_symbols_per_word: Ratio = Field(default=0.1, description="Most number signs, and most ellipses, per word.")
    max_bullet_lines: Share = Field(default=0.9, description="Largest share of lines that begin with a bullet.")
    max_ellipsis_lines: Share = Field(default=0.3, description="Largest share of lines that end with an ellipsis.")
    min_alphabetic_words: Share = Field(default=0.8, description="Least share of words with a letter in them.")
    min_stop_words: Number = Field(default=2, description="Fewest of `stop_words` that occur.")
    stop_words: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1000), AsTuple] = Field(
        default=STOP_WORDS, description="Words without which a text of the language does not come."
    )


class RepetitionRules(Section):
    """Rae et al. 2021, appendix A.1.1, table A1: repetition. Shares of n-grams are of the text's characters."""

    max_duplicate_lines: Share = Field(default=0.30, description="Largest share of lines that came before.")
    max_duplicate_line_characters: Share = Field(default=0.20, description="Largest share of characters in such lines.")
    max_duplicate_paragraphs: Share = Field(default=0.30, description="Largest share of paragraphs that came before.")
    max_duplicate_paragraph_characters: Share = Field(
        default=0.20, description="Largest share of characters in such paragraphs."
    )
    max_top_2gram: Share = Field(default=0.20, description="Largest share of the most frequent two words in a row.")
    max_top_3gram: Share = Field(default=0.18, description="The same of three words.")
    max_top_4gram: Share = Field(default=0.16, description="The same of four words.")
    max_duplicate_5grams: Share = Field(
        default=0.15, description="Largest share of five words in a row that came before, none counted twice."
    )
    max_duplicate_6grams: Share = Field(default=0.14, description="The same of six words.")
    max_duplicate_7grams: Share = Field(default=0.13, description="The same of seven words.")
    max_duplicate_8grams: Share = Field(default=0.12, description="The same of eight words.")
    max_duplicate_9grams: Share = Field(default=0.11, description="The same of nine words.")
    max_duplicate_10grams: Share = Field(default=0.10, description="The same of ten words.")


class C4Rules(Section):
    """Raffel et al. 2020, section 2.2: lines are taken out, and documents of which too little is left."""

    terminal_punctuation: bool = Field(
        default=True, description="Lines that do not end with a mark of a sentence's end are taken out."
    )
    citations: bool = Field(default=True, description="Wikipedia's citations are taken out, such as [1].")
    min_line_words: Number = Field(default=3, description="Lines of fewer words are taken out.")
    max_word_length: Number = Field(default=1000, description="Lines with a longer word are taken out.")
    javascript: bool = Field(default=True, description="Lines with the word javascript are taken out.")
    policies: bool = Field(default=True, description="Lines about cookies, privacy and terms of use are taken out.")
    curly_brackets: bool = Field(default=True, description="Documents with { in a line that is left are dropped.")
    lorem_ipsum: bool = Field(default=True, description="Documents with lorem ipsum are dropped.")
    min_sentences: Number = Field(default=5, description="Documents of which fewer sentences are left are dropped.")


class FineWebRules(Section):
    """Penedo et al. 2024, section 3.6: three shares, and lines that came before. Lines have text in them."""

    min_terminal_lines: Share = Field(default=0.12, description="Least share of lines that end as a sentence does.")
    max_short_lines: Share = Field(default=0.67, description="Largest share of short lines.")
    short_line: Number = Field(default=30, description="Most characters of a short line.")
    max_duplicate_line_characters: Share = Field(
        default=0.01, description="Largest share of characters in lines that came before."
    )
    max_lines_per_word: Ratio = Field(default=0.3, description="Most line ends per word.")


class QualityStep(Section):
    """Documents that fail a rule are dropped under the name of the test; rules are asked in the order given."""

    rules: Annotated[tuple[RuleName, ...], Field(min_length=1, max_length=4), AsTuple] = Field(
        default=("gopher",), description="Which rules."
    )
    gopher: GopherRules = GopherRules()
    gopher_repetition: RepetitionRules = RepetitionRules()
    c4: C4Rules = C4Rules()
    fineweb: FineWebRules = FineWebRules()

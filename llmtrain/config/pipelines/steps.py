"""The steps of a data pipeline and their keys. Pure: imports nothing that reads data.

In a file, `steps` is a list of names, or of names with their keys: `[normalize, {length: {min_words: 50}}]`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from llmtrain.config.pipelines.quality import QualityStep
from llmtrain.config.section import AsTuple, AsWhole, CountOrZero, Section, Steps, StepsOrZero, Text

Chance = Annotated[float, Field(ge=0, le=1)]
Few = Annotated[int, Field(ge=1, le=100), AsWhole]
Characters = Annotated[int, Field(ge=1, le=10**6), AsWhole]
Files = Annotated[tuple[Text, ...], Field(max_length=1000), AsTuple]
Replacement = Annotated[Text, Field(max_length=100)]

LanguageCode = Literal[
    "ace", "af", "am", "an", "ar", "ary", "arz", "as", "az", "ba", "bcl", "be", "bg", "bn", "br", "bs", "ca", "crh",
    "cs", "cy", "da", "de", "dz", "el", "en", "eo", "es", "et", "eu", "ext", "fa", "fi", "fo", "fr", "fuv", "fy", "ga",
    "gcf", "gcr", "gd", "gl", "gom", "grc", "gu", "gug", "guw", "ha", "hbo", "he", "hi", "hr", "ht", "hu", "hy", "id",
    "ig", "is", "it", "ja", "jv", "ka", "kab", "kik", "kk", "km", "kn", "ko", "ku", "ky", "la", "lb", "lg", "lij", "ln",
    "lo", "lt", "ltg", "lv", "mg", "mk", "ml", "mn", "mr", "ms", "mt", "my", "ne", "nl", "nn", "no", "nso", "oc", "om",
    "or", "pa", "pcm", "pl", "ps", "pt", "qu", "ro", "ru", "rw", "sa", "sdh", "se", "si", "sk", "sl", "sn", "so", "sq",
    "sr", "st", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tr", "tt", "ug", "uk", "ur", "uz", "uzs", "vec", "vi",
    "vo", "wa", "wuu", "xh", "yo", "yue", "zh", "zu", "zxx",
]  # fmt: skip
"""What py3langid tells apart: ISO 639 codes, of two letters where there is one; zxx is no language."""

Region = Annotated[str, Field(pattern=r"^[A-Z]{2}$")]
"""ISO 3166: a country."""


class NormalizeStep(Section):
    """One spelling of what looks the same: Unicode form, line ends, white space. Drops nothing."""

    form: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = Field(
        default="NFC", description="Unicode normalization form (UAX #15); null: as it is."
    )
    control_characters: bool = Field(
        default=True,
        description="Control characters but tabs and line ends, byte order marks, lone surrogates and code points that "
        "are no characters are taken out.",
    )
    trailing_space: bool = Field(default=True, description="White space at the ends of lines is taken out.")
    max_blank_lines: Annotated[int, Field(ge=0, le=1000), AsWhole] | None = Field(
        default=1, description="Most blank lines in a row; more are taken out, at both ends of a text all; null: any."
    )
    ftfy: bool = Field(
        default=False, description="Text that was decoded wrongly is mended first, by ftfy; some MB a second on a core."
    )


class HtmlStep(Section):
    """The main text of documents that are HTML pages; others stay as they are."""

    extractor: Literal["resiliparse", "trafilatura"] = Field(
        default="resiliparse",
        description="trafilatura finds the main text better and is five times slower (Bevendorff et al. 2023).",
    )
    main_content: bool = Field(default=True, description="Leave out navigation, headers and footers; false: all text.")
    max_characters: Annotated[int, Field(ge=1, le=2**30), AsWhole] = Field(
        default=20_000_000, description="Longer pages are dropped: parsed, they take many times their size in memory."
    )


class LanguageStep(Section):
    """Documents in other languages are dropped, and the language of those that stay is noted (py3langid)."""

    keep: Annotated[tuple[LanguageCode, ...], Field(min_length=1, max_length=200), AsTuple] | None = Field(
        default=None, description="Languages, such as [en, de]; null: all, which are noted."
    )
    min_probability: Chance = Field(
        default=0.5, description="Documents whose most probable language is less probable are dropped as uncertain."
    )
    characters: Characters = Field(default=300, description="Characters at the begin of a document that are looked at.")


class LengthStep(Section):
    """Documents that are too short or too long are dropped."""

    min_characters: StepsOrZero = Field(default=1, description="Fewest characters, without white space at the ends.")
    max_characters: Steps | None = Field(default=None, description="Most characters; null: no limit.")
    min_words: CountOrZero = Field(default=0, description="Fewest words, which white space separates.")


class PiiStep(Section):
    """Mail addresses, IP addresses and phone numbers are replaced. Drops nothing."""

    mails: bool = Field(default=True, description="Replace mail addresses.")
    ip_addresses: bool = Field(default=True, description="Replace IPv4 and IPv6 addresses.")
    public_only: bool = Field(
        default=True, description="Only IP addresses that are somebody's; false: private ones too, such as 10.0.0.1."
    )
    phones: bool = Field(default=True, description="Replace valid phone numbers that begin with + and a country code.")
    phone_regions: Annotated[tuple[Region, ...], Field(max_length=250), AsTuple] = Field(
        default=(), description="Countries whose numbers are replaced without a country code as well, such as [US]."
    )
    mail_text: Replacement = Field(default="email@example.com", description="What stands for a mail address.")
    ipv4_text: Replacement = Field(default="192.0.2.1", description="What stands for an IPv4 address (RFC 5737).")
    ipv6_text: Replacement = Field(default="2001:db8::1", description="What stands for an IPv6 address (RFC 3849).")
    phone_text: Replacement = Field(default="555-0100", description="What stands for a phone number.")


class WordsStep(Section):
    """Documents with too many words of a list are dropped."""

    files: Annotated[Files, Field(min_length=1)] = Field(
        description="Text files with a word, or some words in a row, in each line; # begins a comment."
    )
    max_count: CountOrZero | None = Field(default=0, description="Most words of the list in a document; null: any.")
    max_share: Chance | None = Field(default=None, description="Largest share of a document's words; null: any.")


class UrlsStep(Section):
    """Documents are dropped, or alone kept, by the address that they came from."""

    mode: Literal["block", "allow"] = Field(
        default="block", description="block: what a list names is dropped. allow: what no list names."
    )
    domains: Files = Field(default=(), description="Text files with a domain in each line; its subdomains count.")
    urls: Files = Field(default=(), description="Text files with an address in each line.")
    words: Files = Field(default=(), description="Text files with a word in each line, as they stand in an address.")
    without_url: Literal["keep", "drop"] = Field(default="keep", description="Documents that have no address.")


class DecontaminateStep(Section):
    """Documents that have text of evaluation sets in them are dropped (Brown et al. 2020, appendix C)."""

    files: Annotated[Files, Field(min_length=1)] = Field(
        description="Evaluation sets: text, .jsonl or .json files, compressed or not."
    )
    fields: Annotated[tuple[Text, ...], Field(max_length=100), AsTuple] = Field(
        default=(), description="Keys of JSON objects whose texts count, at any depth; empty: all texts."
    )
    ngram: Few = Field(default=13, description="Words in a row that make a match, in lower case, without marks.")
    min_words: Few = Field(
        default=8, description="Texts of fewer words than `ngram`, but as many as these, match whole."
    )
    max_share: Chance = Field(default=0.0, description="Largest share of a document's words that are in matches.")


class ExactDedupStep(Section):
    """Of documents with the same text, the first stays: that of the first chunk, and in it of the first line."""


class NearDedupStep(Section):
    """Of documents that are nearly the same, the first stays (Broder 1997; Lee et al. 2022, appendix A)."""

    threshold: Annotated[float, Field(ge=0.5, le=0.99)] = Field(
        default=0.8, description="Least Jaccard similarity of the sets of word n-grams of two documents."
    )
    ngram: Annotated[int, Field(ge=1, le=50)] = Field(default=5, description="Words of an n-gram.")


class StepConfig(Section):
    """One step: exactly one of these keys is set."""

    normalize: NormalizeStep | None = None
    html: HtmlStep | None = None
    language: LanguageStep | None = None
    quality: QualityStep | None = None
    length: LengthStep | None = None
    pii: PiiStep | None = None
    words: WordsStep | None = None
    urls: UrlsStep | None = None
    decontaminate: DecontaminateStep | None = None
    exact_dedup: ExactDedupStep | None = None
    near_dedup: NearDedupStep | None = None

    @model_validator(mode="after")
    def _one(self) -> "StepConfig":
        if len(self.model_fields_set) != 1:
            raise ValueError("must be one step: a name, or one name with its keys")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        """As a file has it: all other names at null would be steps with their defaults."""
        return {self.name: self.section}

    @property
    def name(self) -> str:
        """The step's name."""
        return next(iter(self.model_fields_set))

    @property
    def section(self) -> Section:
        """The keys of the step."""
        return getattr(self, self.name)


def _with_keys(value: Any) -> Any:
    """`name` and `{name: null}` mean the step with every key at its default."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict):
        return {name: {} if keys is None else keys for name, keys in value.items()}
    return value


AnyStep = Annotated[StepConfig, BeforeValidator(_with_keys)]

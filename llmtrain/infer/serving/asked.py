"""What clients ask for, in OpenAI's form: fields that are known, their types and ranges, and what is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from llmtrain.infer.batching.sampling import LARGEST_TEMPERATURE, LEAST_TEMPERATURE, Sampling

MOST_CHOICES = 64
MOST_STOPS = 16
MOST_LIKELY = 20
"""Likeliest tokens that are told with each token."""
LONGEST_STOP = 1000
DEFAULT_NEW_TOKENS = 16
"""Of a completion that says no more, as OpenAI has it. A chat goes on to the limit."""


def told_as(allowed: str) -> WrapValidator:
    """Faults of a field that may be of several types are told by what it may be: pydantic has one of each type."""

    def checked(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(f"must be {allowed}") from None

    return WrapValidator(checked)


Texts = Annotated[
    str | list[str] | list[int] | list[list[int]],
    told_as("a text, a list of texts, a list of ids, or a list of lists of ids"),
]
"""One text, several, or ids in their place."""


@dataclass(frozen=True)
class ServingLimits:
    """What one call may ask for."""

    max_tokens: int
    """New tokens of a text."""
    max_body: int = 4 << 20
    """Bytes."""
    body_seconds: float = 30.0
    """Within which a body has to arrive."""


class AskedError(Exception):
    """A fault of a request: what to say in OpenAI's form."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class RequestFields(BaseModel):
    """Fields of all requests. A field that nobody knows is refused; one that only has effects elsewhere is not looked
    at; one that is known and cannot be done is refused unless it asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )
    NOT_DONE: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are refused, but for these values."""

    model: str | None = None

    @classmethod
    def of(cls, content: Any) -> Any:
        """Raises AskedError for the first fault."""
        if not isinstance(content, dict):
            raise AskedError("The body must be a JSON object.")
        for name, neutral in cls.NOT_DONE.items():
            value = content.get(name)
            if value is not None and value not in neutral:
                raise AskedError(
                    f"{name}: this server cannot do that. Leave it out.", name, code="unsupported_parameter"
                )
        left_out = cls.WITHOUT_EFFECT | cls.NOT_DONE.keys()
        try:
            return cls.model_validate({key: value for key, value in content.items() if key not in left_out})
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(map(str, fault["loc"]))
            told = (
                "is no field that this server knows"
                if fault["type"] == "extra_forbidden"
                else fault["msg"].removeprefix("Value error, ")
            )
            raise AskedError(f"{place}: {told}.", place) from None
        except RecursionError:
            raise AskedError("The body is nested too deep.") from None


class Written(RequestFields):
    """Fields of requests that a text is written for."""

    NOT_DONE: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "suffix": ("",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "functions": ([],),
        "function_call": ("none",),
    }

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=LARGEST_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Annotated[str | list[str] | None, told_as("a text or a list of texts")] = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS or not all(0 < len(each) <= LONGEST_STOP for each in stops):
            raise ValueError(f"must be at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """True where a stream ends with the counts of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, seed: int) -> Sampling:
        """`seed` is for a request without one."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            0.0 if temperature < LEAST_TEMPERATURE else temperature,
            self.top_k or 0,
            1.0 if self.top_p is None else self.top_p,
            seed if self.seed is None else self.seed,
            self.min_p or 0.0,
        )


class AskedCompletion(Written):
    """/v1/completions"""

    prompt: Texts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    best_of: int | None = None


class AskedSchema(BaseModel):
    """What a text must be. `strict` or not, it is."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    name: str
    content: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class AskedFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: AskedSchema | None = None

    @model_validator(mode="after")
    def _fits(self) -> "AskedFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with the type json_schema, which needs it")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema of an answer; None for a text of any kind."""
        if self.json_schema is not None:
            return self.json_schema.content
        return {"type": "object"} if self.type == "json_object" else None


class AskedChat(Written):
    """/v1/chat/completions"""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    response_format: AskedFormat | None = None


class AskedEmbedding(RequestFields):
    """/v1/embeddings"""

    NOT_DONE: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dimensions": ()}

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None


class AskedFilling(RequestFields):
    """/v1/fill-mask, which is not OpenAI's."""

    input: Annotated[str | list[str], told_as("a text or a list of texts")]
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None

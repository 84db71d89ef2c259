"""Texts that must be JSON, of a schema perhaps: llguidance says after each token which ones may follow.

Shape suffix: V vocabulary.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.infer.token_bytes import token_bytes
from llmtrain.values.tokenizer import Tokenizer

LARGEST_SCHEMA = 100_000
"""Characters. What llguidance makes of a schema is bounded by limits of its own."""
WHITESPACE = r"[ ]|\n[ \t]{0,20}"
"""Between the parts of a text: a model that is not sure likes to write spaces without end."""


class JsonGuides:
    """Guides for the texts of one model. `ends` are the tokens that may end one."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: frozenset[int]) -> None:
        """Raises ConfigError where llguidance is not installed, or has no use for the tokenizer."""
        try:
            import llguidance
        except ImportError:
            raise ConfigError("llguidance is not installed: pip install 'llmtrain[serve]'.") from None
        self._library = llguidance
        self._vocabulary = vocabulary
        known = llguidance.TokenizerWrapper(_Known(tokenizer))
        self._tokens = llguidance.LLTokenizer(known, eos_token=sorted(ends))

    def of_schema(self, schema: Mapping[str, Any]) -> "JsonGuide":
        """The guide of JSON texts that a JSON schema allows. Raises ConfigError for a schema that cannot be kept."""
        written = json.dumps(schema)
        if len(written) > LARGEST_SCHEMA:
            raise ConfigError(f"the schema has {len(written):,} characters: {LARGEST_SCHEMA:,} are allowed.")
        library = self._library
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(written, overrides={"whitespace_pattern": WHITESPACE})
        except ValueError as error:
            raise ConfigError(f"the schema cannot be read: {error}.") from None
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ConfigError(f"the schema cannot be kept: {matcher.get_error()[:300]}.")
        return JsonGuide(matcher, self._vocabulary)


class JsonGuide:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def copy(self) -> "JsonGuide":
        """The same for another text."""
        return JsonGuide(self._matcher.deep_copy(), self._vocabulary)

    def allowed(self) -> Tensor:
        """[V], true for tokens with which the text may go on."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        known = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        return torch.from_numpy(np.pad(known, (0, self._vocabulary - len(known))))

    def take(self, token: int) -> bool:
        """Go on by a token. False where the grammar has become more than llguidance's limits allow."""
        return self._matcher.consume_token(token)


class _Known:
    """What llguidance asks of a tokenizer. Text that can only go on in one way is cut as the tokenizer cuts it, in
    whatever thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = np.flatnonzero(tokenizer.special).tolist()
        spelled, pieces = token_bytes(tokenizer), tokenizer.pieces
        special = set(self.special_token_ids)
        self.tokens = [pieces[token].encode() if token in special else each for token, each in enumerate(spelled)]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

"""The control tokens of a template in a tokenizer that does not have them: reserved pieces are given their names.

The tokenizer's file stays as it is, and so its ids and hash: a model that was trained with it before goes on with the
same tokens. The names stand in the settings file beside it, which goes with data sets, runs and exports.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmtrain.data.token_roles import CHAT_TEMPLATE
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.values.tokenizer import Tokenizer

CONTROLS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What the built-in templates write."""

NEW = "new"
"""In place of a piece that was reserved: a token that the tokenizer did not have."""

RESERVED = re.compile(r"<\|reserved_\d+\|>|<\|reserved_special_token_\d+\|>|<unused\d+>|\[unused\d+\]")
"""Names of pieces that mean nothing yet: ours, Llama's, Gemma's and BERT's."""


def reserved_pieces_of(tokenizer: Tokenizer) -> list[int]:
    """The ids of special pieces that mean nothing yet, in their order."""
    pieces = tokenizer.pieces
    return [token for token in np.flatnonzero(tokenizer.special).tolist() if RESERVED.fullmatch(pieces[token])]


def with_controls(tokenizer: Tokenizer, names: Sequence[str], grow: bool = False) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer in which all these names are special tokens, and which pieces have been given some.

    With `grow`, names that no reserved piece is left for have new ids, above the tokenizer's. Raises ConfigError where
    it has too few that are reserved.
    """
    for name in names:
        if not name.strip() or len(name) > 100:
            raise ConfigError(f"--control {name!r}: must be the text of a token, such as <|im_end|>.")
    missing = [name for name in dict.fromkeys(names) if tokenizer.special_id(name) is None]
    ordinary = next((name for name in missing if name in tokenizer.pieces), None)
    if ordinary is not None:
        raise ConfigError(
            f"--control {ordinary}: is an ordinary piece of {tokenizer.path}, which texts contain. Choose another name."
        )
    reserved = reserved_pieces_of(tokenizer)
    if len(missing) > len(reserved) and not grow:
        raise ConfigError(
            f"{tokenizer.path}: has no token {', '.join(missing)}, and {len(reserved)} reserved pieces to give "
            f"{'them' if len(missing) > 1 else 'it'} to. Train one with `llmtrain data tokenizer --control-pieces 16`, "
            "use a template of tokens that it has, or have new ones with --grow."
        )
    size = tokenizer.vocab_size
    given = dict(zip(missing, [*reserved, *range(size, size + len(missing))][: len(missing)], strict=True))
    pieces = [*tokenizer.pieces, *[NEW] * len(missing)]
    if not given:
        return tokenizer, {}
    roles = replace(tokenizer.roles, names={**tokenizer.roles.names, **given})
    return load_tokenizer(str(tokenizer.path), roles), {name: pieces[token] for name, token in given.items()}


def with_template(tokenizer: Tokenizer, template: str, end_ids: Sequence[int]) -> Tokenizer:
    """The tokenizer whose settings have a chat template, and at whose ends of turns generation stops."""
    files = {**tokenizer.roles.files, CHAT_TEMPLATE: template}
    ends = tuple(dict.fromkeys((*tokenizer.end_ids, *end_ids)))
    return load_tokenizer(str(tokenizer.path), replace(tokenizer.roles, files=files, end_ids=ends))

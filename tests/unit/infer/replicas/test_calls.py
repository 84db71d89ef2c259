"""How many tokens a call asks for, and which replica it goes to."""

import json
from typing import Any

import pytest

from llmtrain.infer.replicas.calls import Balance, PassedCall, promised_tokens

LIMIT = 50


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"prompt": [1, 2, 3], "max_tokens": 10}, 3 + 10),
        ({"prompt": [1, 2, 3]}, 3 + 16),
        ({"prompt": [[1], [2, 3]], "max_tokens": 10, "n": 3}, 3 + 2 * 3 * 10),
        ({"prompt": [1], "max_tokens": 10**9}, 1 + LIMIT),
        ({"input": [[1, 2], [3]]}, 3),
        ({"prompt": [1], "max_tokens": -5}, 1),
        ({"prompt": [1], "n": "many", "max_tokens": 10}, 1 + 10),
        ({"prompt": None, "n": None, "max_tokens": 4}, len('{"prompt": null, "n": null, "max_tokens": 4}') // 4 + 4),
        ([], 0),
        ("text", 0),
    ],
    ids=range(10),
)
def test_tokens_that_are_asked_for(asked: Any, tokens: int) -> None:
    assert promised_tokens(json.dumps(asked).encode(), LIMIT) == tokens


def test_texts_count_by_their_length_and_chats_up_to_the_limit() -> None:
    short, long = (
        promised_tokens(json.dumps({"messages": [{"role": "user", "content": text}]}).encode(), LIMIT)
        for text in ("a", "a" * 400)
    )
    assert long - short == pytest.approx(100, abs=1) and short > LIMIT
    assert promised_tokens(b"{", LIMIT) == promised_tokens(b"\xff", LIMIT) == promised_tokens(b"", LIMIT) == 0


def call_of(tokens: int) -> PassedCall:
    return PassedCall("POST", "/v1/completions", b"", tokens)


def test_tokens_count_and_not_calls() -> None:
    balance, names = Balance(), ["a", "b"]
    large, first, second = call_of(100), call_of(30), call_of(30)
    assert balance.order(large, names)[0] == "a"
    assert [balance.order(call, names)[0] for call in (first, second)] == ["b", "b"]
    large.outstanding = 10  # most of it is written
    assert balance.order(call_of(5), names)[0] == "a"
    first.outstanding = second.outstanding = 0  # they have ended
    assert balance.order(call_of(5), names)[0] == "b"


def test_a_replica_that_has_refused_a_call_or_is_gone_is_not_asked_again() -> None:
    balance, call = Balance(), call_of(10)
    assert balance.order(call, ["a", "b", "c"])[0] == "a"
    call.refused_by.add("a")
    assert balance.order(call, ["a", "b", "c"]) == ["b", "c", "a"]
    assert balance.order(call_of(1), ["a", "c"])[0] == "a", "the call is no longer with a"
    assert balance.order(call_of(1), []) == []

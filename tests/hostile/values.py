"""Values that are wrong, useless, or larger than anybody needs."""

import json
from random import Random
from typing import Any

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 255, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**12),
    *(10**18, 10**30, -(10**30), 10**400, 0.5, -0.5, 1.5, 1e-300, 5e-324, 1e9, 1e18, 1e300, -1e300, 0.1 + 0.2),
)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *("", " ", "-", "--", ".", "..", "/", "~", "x" * 300, "x" * 5000, "a/" * 3000, "\n", "\t", "\x1b[31mred", "\u202e"),
    *("\ud800", "é" * 200, "😀", "null", "true", "1", "1e5", "[", "{", "%s%n", "$(id)", "`id`", "; rm -rf x", "auto"),
    *("none", "http://", "https://[::1", "http://localhost:1/x", "s3://", "file:///etc/passwd", "://", "C:\\x", "a\0b"),
)
STRUCTURES = ("null", "true", "false", "[]", "{}", "[[]]", "[{}]", '{"a": 1}', "[null, null]", '{"a": {"b": []}}')
"""As JSON, so that each use has its own: a change of one would change the others."""
PATHS = (
    *(
        "",
        ".",
        "/",
        "//",
        "missing",
        "missing/deep",
        "x" * 300,
        "a/" * 3000,
        "closed",
        "closed/x",
        "closed.yaml",
        "pipe",
    ),
    *("/dev/zero", "/dev/full", "/dev/null", "loop", "dangling", "empty", "empty.json", "noise", "run.yaml", "texts"),
    *("data", "data/train", "runs", "runs/tiny", "runs/tiny/checkpoints", "runs/tiny/checkpoints/step-00000002", "hf"),
    *(
        "tokenizer.model",
        "data/train/manifest.json",
        "data/train/shard-000000.tar",
        "/proc/self/mem",
        "/proc/1/environ",
    ),
    *("https://localhost:1/x", "\udcff", "é" * 200, "-", "run.yaml/x", "texts/0.txt", "hf/config.json", "/etc/shadow"),
)


def number(random: Random) -> Any:
    choice = random.random()
    if choice < 0.6:
        return random.choice(NUMBERS)
    if choice < 0.7:
        return random.choice(NOT_FINITE)
    if choice < 0.85:
        return random.choice((1, -1)) * random.getrandbits(random.choice((8, 31, 33, 64, 200)))
    return random.choice((1, -1)) * 10.0 ** random.uniform(-310, 308)


def anything(random: Random) -> Any:
    """Of any type."""
    choice = random.random()
    if choice < 0.45:
        return number(random)
    if choice < 0.75:
        return random.choice(TEXTS)
    return json.loads(random.choice(STRUCTURES)) if choice < 0.95 else deep(random.choice((30, 50, 500)))


def deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def as_json(value: Any) -> str:
    """Numbers that are not finite are written as Python does, which is no JSON and read by some."""
    return json.dumps(value)


def as_yaml(value: Any) -> str:
    """JSON is YAML, but for numbers that are not finite."""
    text = as_json(value)
    for ours, theirs in (("NaN", ".nan"), ("-Infinity", "-.inf"), ("Infinity", ".inf")):
        text = text.replace(ours, theirs)
    return text


def noise(random: Random, most: int = 200) -> bytes:
    return random.randbytes(random.randrange(most))


def mutated(content: bytes, random: Random) -> bytes:
    """A few bytes changed, taken out, doubled or put in."""
    if not content:
        return noise(random)
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, length = random.randrange(len(data) + 1), random.choice((1, 2, 16, 200))
        kind = random.randrange(6)
        if kind == 0:
            data[at : at + length] = b""
        elif kind == 1:
            data[at:at] = noise(random, length + 1)
        elif kind == 2:
            data[at:at] = data[at : at + length] * random.choice((1, 3, 100))
        elif kind == 3 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 4:
            del data[at:]
        else:
            piece = (
                b"\0",
                b"[",
                b"{",
                b"]",
                b"}",
                b'"',
                b":",
                b"&a ",
                b"*a",
                b"!!x ",
                b"\t",
                b"\xff",
                b"99999999999999",
            )
            data[at:at] = random.choice(piece) * random.choice((1, 1, 5, 3000))
    return bytes(data)


def mutated_json(value: Any, random: Random) -> Any:
    """One place of a JSON value changed: its value, its key, or whether it is there."""
    places = list(_places(value))
    if not places:
        return anything(random)
    holder, key = random.choice(places)
    kind = random.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = anything(random)
    elif kind == 3 and isinstance(holder, list):
        holder[:] = holder * random.choice((2, 100))
    elif kind == 4 and isinstance(holder[key], str):
        holder[key] = random.choice((*PATHS, "../../run.yaml", "/etc/passwd"))
    elif kind == 5 and isinstance(holder[key], int):
        holder[key] += random.choice((1, -1, 10**6, 2**40, -(2**40)))
    else:
        holder[key] = anything(random)
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])

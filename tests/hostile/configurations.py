"""Run files and overrides: values for every key of the schema, and bytes that are no configuration."""

from pathlib import Path
from random import Random
from typing import Any

from llmtrain.config.reading.suggestions import all_keys, field_at
from tests.hostile import values
from tests.hostile.command import Case
from tests.hostile.good_things import RUN

VERBS = (
    ("train", "run.yaml", "--dry-run"),
    ("train", "run.yaml", "--dry-run", "--json"),
    ("train", "run.yaml", "--print-config"),
    ("train", "run.yaml", "--dry-run", "--ranks", "8"),
    ("submit", "run.yaml", "--to", "slurm", "--dry-run"),
    ("submit", "run.yaml", "--to", "ray", "--dry-run"),
    ("parity", "run.yaml", "--layouts", "torch:dp0"),
    ("data", "show", "data", "--run", "run.yaml"),
)
CHECKING = (0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7)
TRAIN = ("train", "run.yaml", "checkpoint.resume=none", "name=other", "train.steps=2")
TOO_LARGE_TO_TRAIN = (
    *("model.hidden_size", "model.num_layers", "model.num_heads", "model.head_dim", "model.ffn_hidden_size"),
    *("model.vocab_size", "model.max_seq_len", "model.token_types", "model.num_kv_heads", "model.relative_buckets"),
    *("model.attention.stride", "data.seq_len", "train.steps", "train.tokens", "train.epochs", "launch.num_workers"),
    *("train.global_batch_size", "train.micro_batch_size", "observe.wandb", "launch.backend", "data.cache_dir"),
    *("model.num_encoder_layers", "launch.max_stalled_attempts", "output_dir", "model.moe.num_experts"),
    *("train.compile", "model.moe.num_shared_experts", "model.moe.ffn_hidden_size", "evaluate.steps"),
)
"""Keys whose legal values need more memory, time or places than a test has."""

SPECIAL_YAML = (
    *("{a: &a [*a]}", "!!python/object/apply:os.system [id]", "!!binary aGk=", "!!int x", "!!float x", "!!set {a}"),
    *("2001-01-01", "0o17", "0x" + "f" * 5000, "1" * 5000, "1e999", "'", '"', "&a 1", "*a", "? a", "- - -", "<<: {}"),
    *("[" * 2000, "{" * 2000, "[" * 2000 + "]" * 2000, "a: " * 2000, "- " * 2000, "|", ">", "%", "@", "`", "\t", "---"),
)


def override_cases(random: Random) -> Case:
    """One or two keys of the schema with values of any kind."""
    keys = [key for key in all_keys() if random.random() < 0.5] or ["seed"]
    chosen = random.sample(keys, min(len(keys), random.choice((1, 1, 1, 2))))
    words = []
    for key in chosen:
        text = random.choice(SPECIAL_YAML) if random.random() < 0.2 else values.as_yaml(_value_for(key, random))
        words.append(f"{key}={text}".replace("\0", "\\0").encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    verb = VERBS[random.choice(CHECKING)]
    return Case("override", (*verb, *words))


def trained_cases(random: Random) -> Case:
    """One key at a value of its own type, and the run is started where that is legal."""
    keys = [key for key in all_keys() if key not in TOO_LARGE_TO_TRAIN and not _is_section(key)]
    key = random.choice(keys)
    value = random.choice(list(_bounds(key)) or [values.number(random)]) if random.random() < 0.6 else None
    text = values.as_yaml(_value_for(key, random) if value is None else value)
    return Case("training", (*TRAIN, f"{key}={text}".replace("\0", "\\0")))


def file_cases(random: Random) -> Case:
    """Bytes in place of the run's file."""
    content = RUN.encode()
    kind = random.randrange(6)
    if kind < 3:
        content = values.mutated(content, random)
    elif kind == 3:
        content = random.choice(SPECIAL_YAML).encode() + values.noise(random, 20)
    elif kind == 4:
        content = random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"", b"#" * 10**6)) + content
    else:
        content = random.choice(_BASES).encode() + content
    verb = VERBS[random.choice(CHECKING)]
    return Case("run file", verb, lambda folder: _write(folder / "run.yaml", content))


_BASES = tuple(f"base: {values.as_yaml(name)}\n" for name in (*values.PATHS, ["run.yaml"], [], {}, [1], "run.yaml"))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _is_section(key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in all_keys())


def _bounds(key: str) -> Any:
    """The ends of what a key's own type allows."""
    field = field_at([int(part) if part.isdecimal() else part for part in key.split(".")])
    assert field is not None
    for item in _metadata(field):
        for name, inward in (("ge", 0), ("le", 0), ("gt", 1), ("lt", -1)):
            bound = getattr(item, name, None)
            if isinstance(bound, int):
                yield bound + inward
            elif bound is not None:
                yield bound if not inward else bound + inward * max(abs(bound), 1.0) * 1e-15 or 5e-324


def _metadata(field: Any) -> Any:
    for item in (*getattr(field, "metadata", ()), *getattr(getattr(field, "annotation", None), "__args__", ())):
        yield item
        yield from _metadata(item)
        for inner in getattr(item, "__metadata__", ()):
            yield inner
            yield from _metadata(inner)


def _value_for(key: str, random: Random) -> Any:
    if random.random() < 0.3:
        bounds = list(_bounds(key))
        if bounds:
            return random.choice(bounds)
    if random.random() < 0.2 and ("path" in key or "dir" in key or key.endswith(("resume", "tokenizer", "setup"))):
        return random.choice(values.PATHS)
    return values.anything(random)

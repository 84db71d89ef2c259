"""Files of data sets, runs, checkpoints, tokenizers and Hugging Face folders: other bytes, other kinds of file."""

import hashlib
import json
import os
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from tests.hostile import values
from tests.hostile.command import ALLOWED, Case

STEP = "runs/tiny/checkpoints/step-00000004"
EVAL = ("eval", "runs/tiny", "--tasks", "tasks.yaml", "--limit", "2")
IN_TRAINING = ("evaluate.tasks=[tasks.yaml]", "evaluate.tasks_every_steps=2")
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "data/train/manifest.json": (
        *(("data", "inspect", "data"), ("data", "verify", "data"), ("data", "show", "data/train", "--seq-len", "16")),
        *(("train", "run.yaml", "--dry-run"), ("train", "run.yaml", "name=other"), ("data", "index", "data/train")),
    ),
    "data/train/shard-000000.idx": (
        *(("data", "verify", "data"), ("data", "inspect", "data"), ("data", "index", "data/train")),
        *(("train", "run.yaml", "name=other"), ("data", "show", "data/train", "--seq-len", "16")),
        ("train", "run.yaml", "name=other", "data.verify=off"),
    ),
    "data/train/shard-000000.tar": (
        *(("data", "verify", "data"), ("data", "index", "data/train"), ("train", "run.yaml", "name=other")),
        *(("data", "inspect", "data"), ("train", "run.yaml", "name=other", "data.verify=off")),
    ),
    "data/tokenizer.model": (
        *(("train", "run.yaml", "name=other"), ("data", "show", "data/train", "--seq-len", "16")),
        ("data", "verify", "data"),
    ),
    "tokenizer.model": (
        ("data", "shards", "texts", "out", "--tokenizer", "tokenizer.model"),
        ("generate", "runs/tiny", "--prompt", "a", "--tokenizer", "tokenizer.model", "--max-tokens", "2"),
    ),
    "tokenizer.json": (
        ("data", "shards", "texts", "out", "--tokenizer", "tokenizer.json"),
        ("data", "index", "data/train", "--tokenizer", "tokenizer.json"),
    ),
    "texts/more.jsonl": (
        ("data", "shards", "texts", "out", "--tokenizer", "tokenizer.model"),
        ("data", "tokenizer", "texts", "out.model", "--vocab-size", "300"),
    ),
    "chats.jsonl": (
        ("data", "chat", "chats.jsonl", "out", "--tokenizer", "tokenizer.model", "--template", "chatml", "--grow"),
    ),
    "tasks.yaml": (EVAL, ("train", "run.yaml", "name=other", "--dry-run", *IN_TRAINING)),
    "asked.jsonl": (EVAL, ("train", "run.yaml", "name=other", "--dry-run", *IN_TRAINING)),
    "texts/1.txt": (("data", "shards", "texts", "out", "--tokenizer", "tokenizer.model"),),
    "runs/tiny/status.json": (
        ("status", "runs"),
        ("status", "runs/tiny"),
        ("report", "runs/tiny"),
        ("logs", "runs/tiny"),
    ),
    "runs/tiny/run.lock": (("status", "runs/tiny"), ("train", "run.yaml", "--dry-run"), ("train", "run.yaml")),
    "runs/tiny/metrics.jsonl": (
        ("status", "runs/tiny"),
        ("report", "runs/tiny"),
        ("train", "run.yaml", "train.steps=5"),
    ),
    "runs/tiny/audit.jsonl": (("status", "runs/tiny"), ("report", "runs/tiny"), ("train", "run.yaml", "train.steps=5")),
    "runs/tiny/config.yaml": (("report", "runs/tiny"), ("status", "runs/tiny"), ("export", "runs/tiny", "out")),
    "runs/tiny/environment.json": (("report", "runs/tiny"),),
    "runs/tiny/tokenizer.model": (
        ("generate", "runs/tiny", "--prompt", "a", "--max-tokens", "2"),
        ("export", "runs/tiny", "out"),
        ("train", "run.yaml", "train.steps=5"),
    ),
    "hf/config.json": (("import", "hf", "out"), ("generate", "hf", "--prompt", "a", "--tokenizer", "tokenizer.model")),
    "hf/model.safetensors": (("import", "hf", "out"),),
    "hf/model.safetensors.index.json": (("import", "hf", "out"),),
    "hf/tokenizer.json": (("import", "hf", "out"),),
    "hf/tokenizer_config.json": (("import", "hf", "out"),),
    "hf/generation_config.json": (("import", "hf", "out"),),
    "hf/special_tokens_map.json": (("import", "hf", "out"),),
    **{
        f"{STEP}/{name}": (
            *(("checkpoint", verb, "runs/tiny") for verb in ("list", "inspect", "verify")),
            *(("checkpoint", "diff", STEP, "runs/tiny/checkpoints/step-00000002"), ("status", "runs/tiny")),
            *(("train", "run.yaml", "train.steps=5"), ("train", "run.yaml", "--dry-run"), ("report", "runs/tiny")),
            *(("generate", "runs/tiny", "--prompt", "a", "--max-tokens", "2"), ("export", STEP, "out")),
            ("train", "run.yaml", "name=other", f"checkpoint.resume={STEP}"),
        )
        for name in ("manifest.json", "manifest.json.sha256", "state.json", "config.yaml", "rank-00000.safetensors")
    },
}
"""Files, and the commands that read them."""

NEW_FILES = {
    "run.lock": json.dumps(
        {"host": "elsewhere", "machine": "m", "pid": 1, "process_started": "", "since": "2026-01-01", "token": "t"}
    ).encode(),
    "model.safetensors.index.json": json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}
    ).encode(),
    "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "</s>", "chat_template": "x", "model_max_length": 32}',
    "generation_config.json": b'{"eos_token_id": [1, 2], "temperature": 0.5, "top_p": 0.9}',
    "special_tokens_map.json": b'{"eos_token": {"content": "</s>"}}',
    "tokenizer.json": json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": 0, "content": "<s>", "special": True, "single_word": False, "lstrip": False}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {"a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
        }
    ).encode(),
}
"""Files that are not among the good things."""

KINDS: dict[str, Callable[[Path], None]] = {
    "removed": lambda path: None,
    "empty": lambda path: _write(path, b""),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "closed": lambda path: _closed(path),
    "sparse": lambda path: _sparse(path),
}


def damaged_cases(random: Random) -> Case:
    """A file that is another kind of file, cut, changed, or changed within its format."""
    name = random.choice(list(READERS))
    arguments = random.choice(READERS[name])
    seed = random.getrandbits(64)
    codes = ALLOWED | {1, 4} if name.endswith("run.lock") else ALLOWED  # 4: in use; 1: where nothing can be locked
    return Case(f"damaged {name}", arguments, partial(_damage, name=name, seed=seed), codes)


def _damage(folder: Path, name: str, seed: int) -> None:
    random, path = Random(seed), folder / name
    before = path.read_bytes() if path.is_file() else NEW_FILES.get(path.name, b"{}")
    path.unlink(missing_ok=True)
    kind = random.randrange(10)
    if kind == 0:
        # Weights are mapped into memory, whatever their size.
        names = [name for name in KINDS if name != "sparse" or path.suffix != ".safetensors"]
        KINDS[random.choice(names)](path)
    elif kind < 4:
        _write(path, values.mutated(before, random))
    elif kind == 4:
        _write(path, values.noise(random, 3000))
    else:
        _write(path, _other_content(path, before, random))
    if random.random() < 0.7:
        told_anew(path)


def _other_content(path: Path, before: bytes, random: Random) -> bytes:
    """Content that has the file's own format."""
    if path.suffix == ".json" or path.name == "run.lock":
        value = json.loads(before)
        for _ in range(random.choice((1, 1, 2, 4))):
            value = values.mutated_json(value, random)
        return values.as_json(value).encode()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in before.splitlines()]
        for _ in range(random.choice((1, 3))):
            at = random.randrange(len(rows))
            rows[at] = values.mutated_json(rows[at], random)
        return "".join(f"{values.as_json(row)}\n" for row in rows).encode()
    if path.suffix == ".safetensors":
        return _other_tensors(before, random)
    if path.suffix == ".tar":
        return _other_tar(before, random)
    if path.suffix == ".idx":
        words = random.randrange(1, 5)
        numbers = [random.choice((0, 1, 512, 2**40, 2**63 - 1, 2**64 - 1)) for _ in range(words)]
        at = 8 * random.randrange(len(before) // 8)
        return before[:at] + struct.pack(f"<{words}Q", *numbers) + before[at + 8 * words :]
    return values.mutated(before, random)


def _other_tensors(before: bytes, random: Random) -> bytes:
    (length,) = struct.unpack("<Q", before[:8])
    if random.random() < 0.3:
        claimed = random.choice((0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(before), length - 1, length + 1))
        return struct.pack("<Q", claimed) + before[8:]
    header = values.as_json(values.mutated_json(json.loads(before[8 : 8 + length]), random)).encode()
    return struct.pack("<Q", len(header)) + header + before[8 + length :]


def _other_tar(before: bytes, random: Random) -> bytes:
    """A member whose header, with a right checksum, claims something else."""
    member = tarfile.TarInfo(
        random.choice(("0.bin", "../x.bin", "/x.bin", "x" * 300 + ".bin", "\udcff.bin", "a.txt", ".bin"))
    )
    member.size = random.choice((0, 1, 3, 512, 10**6, 3_000_000_000, 2**40, 2**62))
    member.type = random.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, b"L", b"x", b"g", b"S", b"Z"))
    header = member.tobuf(random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)), errors="surrogateescape")
    if random.random() < 0.5:
        return header + before
    return header + b"\0" * random.choice((0, 512, 1024, 10240))


def told_anew(path: Path) -> None:
    """The hash of a changed file, told to those who keep it: so that the content is what is looked at."""
    folder = path.parent
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 10**7:
        return
    content = path.read_bytes()
    try:
        if folder.parent.name == "checkpoints" and path.name in ("state.json", "config.yaml", "rank-00000.safetensors"):
            manifest = json.loads((folder / "manifest.json").read_bytes())
            manifest["files"][path.name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        if folder.parent.name == "checkpoints" and path.name != "manifest.json.sha256":
            told = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
            _write(folder / "manifest.json.sha256", f"{told}  manifest.json\n".encode())
        if path.suffix in (".idx", ".tar"):
            manifest = json.loads((folder / "manifest.json").read_bytes())
            shard = manifest["shards"][0]
            hashed = hashlib.sha256(content).hexdigest()
            shard |= {"index_sha256": hashed} if path.suffix == ".idx" else {"sha256": hashed, "bytes": len(content)}
            _write(folder / "manifest.json", json.dumps(manifest).encode())
    except PermissionError:
        return


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _closed(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0o000)


def _sparse(path: Path) -> None:
    """A file of 3 GB that takes no room."""
    with path.open("wb") as file:
        file.truncate(3_000_000_000)

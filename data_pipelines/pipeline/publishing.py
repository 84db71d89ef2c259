"""What a finished pipeline leaves: data sets with manifests, documents, the tokenizer, a summary and a page."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from data_pipelines.dataset_writer import bos_ids_of, settings_of, sha256_of
from data_pipelines.pipeline.page import write_page
from data_pipelines.pipeline.stages.document_files import DOCUMENTS
from data_pipelines.pipeline.stages.documents import FAILED
from data_pipelines.pipeline.stages.tokens import INDEX, TAR, tokenizer_path
from data_pipelines.pipeline.summary import summarized
from data_pipelines.pipeline.work import DataTask, Workspace
from data_pipelines.sharding import splits_of
from data_pipelines.tokenizer import lost_in_texts
from llmtrain.data.storage.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardEntry,
    dtype_name,
    write_manifest,
)
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.files import read_json, replace_file, replace_folder, sync_folder
from llmtrain.words import counted

SUMMARY_NAME, PAGE_NAME = "summary.json", "report.html"
EXPORTED = "documents"
"""The folder of cleaned documents."""
DAMAGED = "damaged"
_SUMMARY_BYTES = 256 << 20


def is_published(work: Workspace) -> bool:
    """True where the folder holds the result of this plan."""
    splits = () if work.config.tokenizer is None else splits_of(work.config.write.valid_fraction)
    wanted = [work.folder / split / MANIFEST_NAME for split in splits]
    if any(stage.kind == "export" for stage in work.program.stages):
        wanted.append(work.folder / EXPORTED)
    try:
        known = read_json(work.folder / SUMMARY_NAME, _SUMMARY_BYTES)["plan"] == work.plan.id
        return known and all(path.exists() for path in wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def publish(work: Workspace) -> None:
    """Put the result in its place; the summary, by which it is known to be whole, comes last."""
    if work.config.tokenizer is not None:
        _publish_shards(work)
    if any(stage.kind == "export" for stage in work.program.stages):
        exported = [(DataTask("export", number), DOCUMENTS) for number in range(len(work.plan.chunks))]

        def fill(folder: Path) -> None:
            for number, (task, ending) in enumerate(exported):
                _place(work.checked(task, ending), folder / f"documents-{number:06d}{ending}")

        _publish_folder(work.folder / EXPORTED, fill)
    summary = summarized(work)
    write_page(summary, work.folder / PAGE_NAME)
    replace_file(work.folder / SUMMARY_NAME, json.dumps({"plan": work.plan.id, **summary}, indent=1).encode())
    sync_folder(work.folder)


def notes_of(work: Workspace) -> list[str]:
    """What somebody should look at before the result is used."""
    summary = read_json(work.folder / SUMMARY_NAME, _SUMMARY_BYTES)
    notes = [
        f"{name}: {counted(count, 'file')} damaged, left out from there on, such as {source['examples'][DAMAGED][0]}"
        for source in summary["sources"]
        if (count := source["left_out"].get(DAMAGED)) and (name := source["name"])
    ]
    for step in summary["steps"]:
        for reason, count in step["dropped"].items():
            if reason.startswith(FAILED):
                example = step["examples"][reason][0][0]
                notes.append(f"{step['name']} failed on {counted(count, 'document')} ({reason}), such as {example}")
    return notes


def _publish_shards(work: Workspace) -> None:
    path = tokenizer_path(work)
    tokenizer = load_tokenizer(path)
    bos_ids = bos_ids_of(tokenizer, work.config.write.bos)
    settings = settings_of(tokenizer, bos_ids)
    order = work.require_done(DataTask("order", 0)).counters["ranges"]
    for split in splits_of(work.config.write.valid_fraction):
        tasks = [DataTask("shards", number) for number, found in enumerate(order) if found[0] == split]

        def fill(folder: Path, tasks: list[DataTask] = tasks) -> None:
            entries = []
            for number, task in enumerate(tasks):
                done = work.require_done(task)
                tar, index = (folder / f"shard-{number:06d}{ending}" for ending in (TAR, INDEX))
                _place(work.checked(task, TAR), tar)
                _place(work.checked(task, INDEX), index)
                size, digest = done.files[TAR]
                samples, tokens = done.counters["samples"], done.counters["tokens"]
                entry = ShardEntry(tar.name, size, digest, index.name, done.files[INDEX][1], samples, tokens)
                entries.append(entry)
            meaning = (tokenizer.sha256, tokenizer.vocab_size, dtype_name(tokenizer.vocab_size), tokenizer.eos_id)
            lossy = bool(lost_in_texts(tokenizer))
            write_manifest(
                folder, Manifest(SCHEMA_VERSION, *meaning, tuple(entries), bos_ids, sha256_of(settings), lossy)
            )

        _publish_folder(work.folder / split, fill)
    replace_file(work.folder / f"tokenizer{path.suffix}", path.read_bytes())
    if settings is not None:
        replace_file(work.folder / SETTINGS_NAME, settings.encode())


def _publish_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Put a folder in its place once it is whole."""
    partial, old = (target.with_name(f".{target.name}.{end}") for end in ("writing", "old"))
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir()
    fill(partial)
    sync_folder(partial)
    replace_folder(partial, target, old)
    shutil.rmtree(old, ignore_errors=True)


def _place(source: Path, target: Path) -> None:
    """The same file under another name, without a copy where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

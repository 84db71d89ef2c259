"""Tables, archives and crawls: what is in them comes out, and what is broken or hostile is counted and named."""

import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from backports import zstd
from pyarrow import parquet

from data_pipelines.reading.formats import iter_records
from data_pipelines.reading.inputs import InputFile, ReadReport, find_files
from data_pipelines.reading.records import ReadOptions
from llmtrain.config.pipelines.schema import FormatName
from llmtrain.errors import ConfigError, DataError


def peak_memory(work: Callable[[], None]) -> int:
    """Bytes that Python's objects take at most while something is done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


Found = list[tuple[str, str]]


def read(
    path: Path, options: ReadOptions | None = None, name: FormatName | None = None, longest: int = 1_000_000
) -> tuple[Found, ReadReport]:
    """Places and texts of a file, and what was left out, nothing of which is an error."""
    report = ReadReport(forgiving=True)
    records = iter_records(InputFile(str(path), True), report, options or ReadOptions(), name, None, longest)
    return [(record.place, record.text) for record in records], report


def tar_of(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_is_read_as_data_sets_on_disk_have_it(tmp_path: Path, kind: str) -> None:
    table = pyarrow.table({"text": ["one", None, "three"], "title": ["a", "b", "c"]})
    path = tmp_path / "data-00000-of-00001.arrow"
    make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with path.open("wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)
    assert read(path)[0] == [("1", "one"), ("3", "three")]
    assert read(path, ReadOptions("title"))[0] == [("1", "a"), ("2", "b"), ("3", "c")]
    path.write_bytes(path.read_bytes()[: -40 if kind == "file" else -100])
    with pytest.raises(DataError, match=r"data-00000.*not a whole table"):
        read(path)


def test_a_table_without_the_column_says_which_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": ["one"], "id": [7]}), path)
    with pytest.raises(DataError, match=r"has no column 'text'\. Its columns: content, id\."):
        read(path)
    report = ReadReport(forgiving=True)
    records = list(iter_records(InputFile(str(path), True), report, ReadOptions("content", None, "id")))
    assert [(record.text, record.keys["id"]) for record in records] == [("one", 7)]


def test_every_flipped_byte_of_a_table_is_noticed_or_harmless(tmp_path: Path) -> None:
    texts = [f"text {number} " * 10 for number in range(50)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, write_page_checksum=True)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = [text for _, text in read(path)[0]]
        except DataError:
            continue
        assert found == texts, place


def test_a_tar_gives_its_samples_as_webdataset_groups_them(tmp_path: Path) -> None:
    members: dict[str, Any] = {
        "a/1.txt": b"first",
        "a/1.json": b'{"title": "one"}',
        "a/2.json": b'{"text": "second", "n": 2}',
        "a/3.html": "<p>drü</p>".encode("latin-1"),
        "a/4.jpg": b"\xff\xd8",
        "a/5.txt": b"\xff\xfe",
        "a/6.json": b"{",
    }
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    found, report = read(path)
    assert found == [("a/1", "first"), ("a/2", "second"), ("a/3", "<p>drü</p>")]
    assert report.left_out == {"not_page": 1, "not_text": 1, "not_json": 1}
    assert report.examples["not_page"] == [f"{path}:a/4.jpg"]
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed)[0] == found


def test_what_leads_out_of_an_archive_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    hostile: dict[str, Any] = {
        "x.txt": link("x.txt", tarfile.SYMTYPE, str(tmp_path / "secret.txt")),
        "y.txt": link("y.txt", tarfile.LNKTYPE, "../secret.txt"),
        "z.txt": link("z.txt", tarfile.CHRTYPE, ""),
        "../up.txt": b"up",
        "/root.txt": b"root",
        "good.txt": b"good",
    }
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(hostile))
    found, report = read(path)
    assert found == [("good", "good")] and report.left_out == {"unsafe_name": 5}
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "secret.txt"]


def test_a_cut_or_damaged_archive_is_never_taken_for_whole(tmp_path: Path) -> None:
    whole = tar_of({f"{number}.txt": b"text " * 200 for number in range(5)})
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    assert len(read(path)[0]) == 5
    end = 5 * (512 + 1024)
    for cut in (100, 512, 900, 1536, 3 * 1536, 4 * 1536 + 600, end, end + 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.tar: not a whole tar archive"):
            read(path)
    for place in (0, 1536, 2 * 1536 + 100, 2 * 1536 + 150):  # in headers
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with pytest.raises(DataError, match=r"a\.tar: not a whole tar archive"):
            read(path)


def warc_record(kind: str, url: str, content: bytes, number: int) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\nWARC-Target-URI: {url}\r\n"
    head += "WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content + b"\r\n\r\n"


def http(kind: str, body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def crawl() -> list[bytes]:
    pages = [
        ("text/html; charset=utf-8", "<p>grüße</p>".encode()),
        ("image/png", b"\x89PNG"),
        ("text/html; charset=iso-8859-1", b"<html><body><p>" + "straße ".encode("latin-1") * 30 + b"</p>"),
        ("text/plain", b"plain"),
    ]
    return [
        warc_record("response", f"https://example.org/{number}", http(kind, body), number)
        for number, (kind, body) in enumerate(pages)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_crawl_gives_its_pages_with_their_addresses(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    path.write_bytes(b"".join(gzip.compress(record) if packed else record for record in crawl()))
    report = ReadReport(forgiving=True)
    records = list(iter_records(InputFile(str(path), True), report, ReadOptions()))
    assert [record.keys["url"] for record in records] == [f"https://example.org/{number}" for number in (0, 2, 3)]
    assert records[0].text == "<p>grüße</p>" and "straße" in records[1].text and records[2].text == "plain"
    assert records[0].place == "<urn:uuid:0>" and report.left_out == {"not_page": 1}


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_crawl_is_never_taken_for_whole(tmp_path: Path, packed: bool) -> None:
    parts = [gzip.compress(record) if packed else record for record in crawl()]
    whole = b"".join(parts)
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    for cut in (len(parts[0]) // 2, len(whole) - 20, len(parts[0]) + len(parts[1]) + 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.warc"):
            read(path)


def test_bombs_are_bounded_and_named(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(600):
            file.write(b"0" * (1 << 20))

    def unpack() -> None:
        with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: cannot be unpacked: it gives more than"):
            read(path)

    assert peak_memory(unpack) < 100 << 20
    packed = tmp_path / "bomb.txt.zst"
    packed.write_bytes(zstd.compress(b"0" * (300 << 20)))
    found, report = read(packed)
    assert found == [] and report.left_out == {"too_long": 1}


def test_long_lines_are_passed_over_and_the_others_come(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"})
    with path.open("w") as file:
        file.write(f"{good}\n")
        for _ in range(64):
            file.write("1" * (1 << 20))
        file.write(f'\n{good}\n[1]\n{{"text": "nul \\u0000 byte"}}\n')
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n')

    def unpack() -> None:
        found, report = read(path)
        assert found == [("1", "good"), ("3", "good"), ("5", "nul \0 byte")]
        assert report.left_out == {"too_long": 1, "no_field": 1, "not_text": 1}
        assert report.examples["too_long"] == [f"{path}:2"]

    assert peak_memory(unpack) < 30 << 20


def test_urls_that_run_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipe://.*: pipe: is not read; https, http, s3, gs, hf are"):
        find_files(["pipe://cat /etc/passwd"], ReadReport())

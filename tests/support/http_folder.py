"""A folder behind a real HTTP server that answers as badly as a test wants."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Fault = Literal["404", "403", "500", "503", "hang", "cut", "stall", "spoil", "slow"]


@dataclass
class HttpFolder:
    """`faults` says how the requests for a file name are answered, in turn; when they are used up, as they should be.

    A `forever` fault is one that is never used up.
    """

    url: str
    requests: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    forever: dict[str, Fault] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, name: str) -> Fault | None:
        with self.lock:
            self.requests[name] += 1
            if name in self.forever:
                return self.forever[name]
            waiting = self.faults.get(name)
            return waiting.pop(0) if waiting else None


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, server_folder: HttpFolder, *args: object, directory: str) -> None:
        self.folder = server_folder
        super().__init__(*args, directory=directory)  # type: ignore[arg-type]  # what the server passes on

    def do_GET(self) -> None:
        fault = self.folder.next_fault(self.path.partition("?")[0].rpartition("/")[2])
        if fault in ("404", "403", "500", "503"):
            self.send_error(int(fault))
        elif fault == "hang":
            self.folder.stopped.wait(60)
        elif fault in ("cut", "stall", "spoil", "slow"):
            self._send_badly(fault)
        else:
            super().do_GET()

    def _send_badly(self, fault: Fault) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault in ("cut", "stall"):
            self.wfile.write(content[: len(content) // 2])
            if fault == "stall":
                self.folder.stopped.wait(60)
        elif fault == "spoil":
            self.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            step = -(-len(content) // 8)
            for begin in range(0, len(content), step):
                self.wfile.write(content[begin : begin + step])
                self.folder.stopped.wait(0.15)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its own."""


@contextmanager
def serve(directory: Path) -> Iterator[HttpFolder]:
    """Serve a folder on a free port of this machine until the block ends."""
    folder = HttpFolder("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder, directory=str(directory)))
    server.daemon_threads = True
    folder.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        folder.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()

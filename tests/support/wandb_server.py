"""As much of a Weights & Biases server as its client needs to send a run: what it is sent can be read."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "a" * 40
"""Of the form that the client asks for."""


class WandbServer:
    """The requests that have come, and answers that make the client go on."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []
        self.address = ""

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find it."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": API_KEY}

    @property
    def everything(self) -> bytes:
        """All that was sent."""
        return b"\n".join(path.encode() + body for path, body in self.requests)

    def runs(self) -> list[dict[str, Any]]:
        """The variables by which the client has made runs."""
        queries = [json.loads(body) for path, body in self.requests if path == "/graphql"]
        return [query["variables"] for query in queries if "upsertBucket(" in query["query"]]

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run, without the client's own columns."""
        lines: dict[int, str] = {}
        for path, body in self.requests:
            if path.endswith(f"/{run_id}/file_stream"):
                chunk = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
                lines.update(enumerate(chunk["content"], start=chunk["offset"]))
        rows = [json.loads(lines[number]) for number in sorted(lines)]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What the client is told."""
        self.requests.append((path, body))
        if path != "/graphql":
            return {}
        query = json.loads(body)
        given, data = query.get("variables") or {}, {}
        if "serverInfo" in query["query"]:
            data["serverInfo"] = {"features": []}
        if "upsertBucket(" in query["query"]:
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "somebody"}}
            bucket = {"id": "b", "name": given["name"], "displayName": given["displayName"], "project": project}
            data["upsertBucket"] = {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}
        if "createArtifact(" in query["query"]:
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            data["createArtifact"] = {"artifact": artifact}
        if "createRunFiles(" in query["query"]:
            files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in given["files"]]
            data["createRunFiles"] = {"runID": "b", "uploadHeaders": [], "files": files}
        return {"data": data}


@contextmanager
def serve_wandb() -> Iterator[WandbServer]:
    """A server on this machine."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            content = json.dumps(state.answer(self.path, body)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_request

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield state
        finally:
            server.shutdown()

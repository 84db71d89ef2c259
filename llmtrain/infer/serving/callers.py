"""Who may call a server: whoever has its key; without one, programs of this machine, and no page of another site."""

from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llmtrain.errors import ConfigError
from llmtrain.infer.serving.asked import AskedError
from llmtrain.infer.serving.gate import fault

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHORTEST_KEY = 16


def serving_key(file: Path | None, variable: str | None, host: str) -> str | None:
    """The API key: what a file holds, else the environment's variable.

    Raises ConfigError for one that is too short, and where there is none and others than this machine could call.
    """
    key = variable
    if file is not None:
        try:
            key = file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--key-file {file}: cannot be read: {error}.") from None
    if key is not None and len(key) < SHORTEST_KEY:
        place = "LLMTRAIN_API_KEY" if file is None else f"--key-file {file}"
        raise ConfigError(f"{place}: the key has {len(key)} characters, and must have at least {SHORTEST_KEY}.")
    if key is None and host not in LOOPBACK:
        raise ConfigError(
            f"--host {host}: others than this machine can call there, so a key is needed. Put one into a file and give "
            "--key-file FILE, or set LLMTRAIN_API_KEY."
        )
    return key


class LocalCallers:
    """An app without a key. A browser on this machine reaches it for whoever wrote a page, who may even have given his
    own site's name this machine's address: so it answers only to names of this machine, and no page of another site."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        for name, prefix in (("host", "//"), ("origin", "")):
            if name in headers and not is_of_this_machine(prefix + headers[name]):
                told = (
                    f"The header {name} says {headers[name][:200]!r}: without a key this server answers only to "
                    f"{', '.join(LOOPBACK)}. Start it with --key-file, and send the key."
                )
                await fault(AskedError(told, status=403, code="not_local"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_of_this_machine(url: str) -> bool:
    """True where a URL's host is one that only this machine has."""
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False

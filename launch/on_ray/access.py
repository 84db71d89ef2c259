"""Access to a Ray cluster: asked directly, before Ray is imported and its clients wait and retry."""

import ipaddress
import socket
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import grpc
import psutil

from llmtrain.config.rules.launch import HEAD, NO_HEAD
from llmtrain.errors import ConfigError, LaunchError

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The question that Ray's own clients ask a head. Private, but answered without any of Ray's classes: the empty request
is valid, and needs the token like all others."""

NO_PROXY = (("grpc.enable_http_proxy", 0),)
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

ASK_SECONDS = 10.0
TOKEN_HINT = "Copy the head's ~/.ray/auth_token to this machine (mode 600), or name its file in RAY_AUTH_TOKEN_PATH."

Answer = Literal["answers", "refuses", "silent"]


def ask_head(address: str, token: str | None = None, timeout_seconds: float = ASK_SECONDS) -> Answer:
    """The head's answer to a request at `host:port`: it answers, wants another token, or there is no Ray."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address, options=NO_PROXY) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=timeout_seconds, metadata=metadata)
        except grpc.RpcError as error:
            return "refuses" if error.code() in REFUSALS else "silent"
    return "answers"


def token_for(address: str, environ: Mapping[str, str], allow_open: bool) -> str | None:
    """The token with which the head at `host:port` answers; None where it answers everybody.

    Raises LaunchError where nobody answers, where the token is missing or wrong, and where an open cluster can be
    reached from other machines and is not allowed.
    """
    match ask_head(address):
        case "silent":
            raise LaunchError(
                f"launch.ray_address = {address}: no Ray head answers there. Start one (`ray start --head`), correct "
                "the address, or leave it out for a Ray of the run's own."
            )
        case "answers":
            if not allow_open and not is_on_loopback(*split_address(address)):
                raise LaunchError(open_cluster_text(f"launch.ray_address = {address}"))
            return None
        case "refuses":
            return _accepted_token(address, environ)


def open_cluster_text(where: str) -> str:
    """The error of a cluster that asks nobody for a token."""
    return (
        f"{where}: this Ray cluster asks nobody for a token, so whoever reaches it can run programs on it. Start it "
        "with RAY_AUTH_MODE=token (see `ray get-auth-token --generate`), or allow it with "
        "launch.allow_open_cluster=true."
    )


def find_token(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The token that Ray's own clients would use, and where it stands; None where there is none.

    Raises LaunchError where RAY_AUTH_TOKEN_PATH names a file that cannot be read or is empty.
    """
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip(), "RAY_AUTH_TOKEN"
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise LaunchError(f"RAY_AUTH_TOKEN_PATH = {named}: cannot be read ({error}).") from None
        return None
    if named and not token:
        raise LaunchError(f"RAY_AUTH_TOKEN_PATH = {named}: the file is empty. Write the cluster's token into it.")
    return (token, str(path)) if token else None


def is_on_loopback(host: str, port: int) -> bool:
    """True where a server can be reached from this machine only. Raises OSError where the host is not known."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found):
        return False
    # It may listen on every interface, whatever it is called here.
    return not any(_is_listening(own, port) for own in _outward_addresses())


def job_server_token(address: str, environ: Mapping[str, str], allow_open: bool) -> str | None:
    """The token with which the server of jobs at `http://host:port` answers; None where it answers everybody.

    Raises ConfigError where that is no such address, and LaunchError as `token_for` does.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--address {address}: must be that of Ray's dashboard, such as http://127.0.0.1:8265.")
    code, reason = _ask_server(address)
    if code == HTTPStatus.UNAUTHORIZED:
        token, where = _known_token(f"--address {address}", environ)
        if _ask_server(address, token)[0] != HTTPStatus.OK:
            raise LaunchError(_wrong_token_text(f"--address {address}", where))
        return token
    if code != HTTPStatus.OK:
        raise LaunchError(
            f"--address {address}: Ray's dashboard does not answer there ({reason}). On the head, `ray start --head "
            "--dashboard-host=127.0.0.1` starts it; from elsewhere reach it through `ssh -L 8265:127.0.0.1:8265 HEAD`."
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not allow_open and not is_on_loopback(parts.hostname, port):
        raise LaunchError(open_cluster_text(f"--address {address}"))
    return None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[host]:port`. Raises ConfigError where it is neither."""
    host, _, port = address.rpartition(":")
    if not HEAD.fullmatch(address):  # RAY_ADDRESS: the configuration's key has been checked
        raise ConfigError(f"RAY_ADDRESS = {address}: {NO_HEAD}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _accepted_token(address: str, environ: Mapping[str, str]) -> str:
    token, where = _known_token(f"launch.ray_address = {address}", environ)
    if ask_head(address, token) != "answers":
        raise LaunchError(_wrong_token_text(f"launch.ray_address = {address}", where))
    return token


def _known_token(cluster: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The token that is here, and where it stands."""
    found = find_token(environ)
    if found is None:
        raise LaunchError(f"{cluster}: this Ray cluster wants a token, and there is none here. {TOKEN_HINT}")
    return found


def _wrong_token_text(cluster: str, where: str) -> str:
    return f"{cluster}: this Ray cluster does not accept the token of {where}. {TOKEN_HINT}"


def _ask_server(address: str, token: str | None = None) -> tuple[int, str]:
    """Status and reason with which a server answers who asks for its jobs; status 0 where there is none."""
    request = Request(f"{address.rstrip('/')}/api/jobs/", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urlopen(request, timeout=ASK_SECONDS) as response:
            return response.status, ""
    except HTTPError as error:
        return error.code, f"{error.code} {error.reason}"
    except (URLError, OSError, HTTPException) as error:
        return 0, str(getattr(error, "reason", error))


def _is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _outward_addresses() -> list[str]:
    """This machine's IPv4 addresses that others may know."""
    found = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    return [
        entry.address
        for entry in found
        if entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    ]

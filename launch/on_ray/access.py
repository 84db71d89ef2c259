"""Whether a Ray head answers, and to whom: asked directly, before Ray is imported and its clients wait and retry."""

import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import grpc
import psutil

from llmtrain.errors import LaunchError

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What Ray's clients ask a head as well. The empty request is a valid one; it needs the token like all others."""

NO_PROXY = (("grpc.enable_http_proxy", 0),)
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

Answer = Literal["answers", "refuses", "silent"]


def ask_head(address: str, token: str | None = None, timeout_seconds: float = 10.0) -> Answer:
    """What the head at `host:port` does with a request: it answers, wants another token, or there is no Ray."""
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
            if not allow_open and not is_on_loopback(address):
                raise LaunchError(open_cluster_text(f"launch.ray_address = {address}"))
            return None
        case "refuses":
            return _accepted_token(address, environ)


def open_cluster_text(where: str) -> str:
    """What is said of a cluster that asks nobody for a token."""
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


def is_on_loopback(address: str) -> bool:
    """Whether the head at `host:port` can be reached from this machine only."""
    host, port = split_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found):
        return False
    # A head may listen on every interface, whatever it is called here.
    return all(ask_head(f"{own}:{port}", timeout_seconds=2.0) == "silent" for own in _outward_addresses())


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[host]:port`. Raises LaunchError where it is neither."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or "/" in host:
        raise LaunchError(
            f"launch.ray_address = {address}: must be host:port of the head, such as 10.0.0.1:6379, or auto. Addresses "
            "of Ray's client (ray://) and of its jobs (http://) do not fit; for jobs, see `llmtrain submit`."
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _accepted_token(address: str, environ: Mapping[str, str]) -> str:
    found = find_token(environ)
    if found is None:
        raise LaunchError(
            f"launch.ray_address = {address}: this Ray cluster wants a token, and there is none here. Copy the head's "
            "~/.ray/auth_token to this machine (mode 600), or name its file in RAY_AUTH_TOKEN_PATH."
        )
    token, where = found
    if ask_head(address, token) != "answers":
        raise LaunchError(
            f"launch.ray_address = {address}: this Ray cluster does not accept the token of {where}. Copy the head's "
            "~/.ray/auth_token to this machine (mode 600), or name its file in RAY_AUTH_TOKEN_PATH."
        )
    return token


def _outward_addresses() -> list[str]:
    """This machine's IPv4 addresses that others may know."""
    found = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    return [
        entry.address
        for entry in found
        if entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    ]

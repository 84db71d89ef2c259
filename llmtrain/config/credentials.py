"""Credentials that stand in URLs, and configurations without them. Pure."""

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from llmtrain.config.names import is_secret

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

HIDDEN = "(hidden)"


def without_credentials(url: str) -> str:
    """A URL to show: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redacted(value: Any) -> Any:
    """JSON-like settings without credentials: URLs lose them, values of keys that name a secret are replaced."""
    if isinstance(value, dict):
        return {key: HIDDEN if is_secret(str(key)) else redacted(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(child) for child in value]
    if not isinstance(value, str) or not _URL.match(value):
        return value
    try:
        return without_credentials(value)
    except ValueError:  # no URL at all, such as one with half an IPv6 address
        return HIDDEN

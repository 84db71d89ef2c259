"""Credentials that stand in URLs, and texts without them. Pure."""

import re
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:/|(?:https?|s3|gs|hf):)/")
"""What was taken for a path has lost a slash."""
_URL_IN_TEXT = re.compile(_URL.pattern + r"[^\s'\"<>]+")

HIDDEN = "(hidden)"


def without_credentials(url: str) -> str:
    """A URL to show: without user, password, query and fragment."""
    parts = urlsplit(re.sub(":/(?=[^/])", "://", url, count=1))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def text_without_credentials(text: str) -> str:
    """A text to show: every URL that has credentials or a query loses them. One that is a URL is so as a whole."""
    if _URL.match(text):
        return _shown_url(text)
    return _URL_IN_TEXT.sub(lambda match: _shown_url(match[0]), text)


def _shown_url(url: str) -> str:
    try:
        shown = without_credentials(url)
        return shown if any(mark in url for mark in "@?#") else url
    except ValueError:  # no URL at all, such as one with half an IPv6 address
        return HIDDEN

"""What is secret: users and passwords in URLs, and values whose key or environment variable has a telling name. Pure.

Imports next to nothing: every message goes through here, also before a command has read anything.
"""

import re
from fnmatch import fnmatchcase
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:/|(?:https?|s3|gs|hf):)/")
"""A URL that was taken for a path has lost a slash."""
_URL_IN_TEXT = re.compile(_URL.pattern + r"[^\s'\"<>]+")

HIDDEN = "(hidden)"

SECRET_WORD = re.compile(r"(?i)(?:^|[_\-.])(?:token|secrets?|passwords?|passphrase|api[_\-]?keys?)(?:$|[_\-.])")

VARIABLE_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
"""A variable's name, or the beginning of some with an asterisk."""

MORE_SECRETS = re.compile(
    r"(?i)(?:^|_)(?:access_key(?:_id)?|key|auth|authorization|credentials?|passwd|pwd|pass|pat|cookie|bearer|jwt|dsn)"
    r"(?:$|_)|(?:token|secret|password|passwd|apikey)$"
)
"""Words that in a variable's name mean a secret, beside those that do so in a configuration's keys."""

FIXED_VARIABLES = (
    # A rank's place and its share of a machine.
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "TORCHELASTIC_*", "RAY_*", "SLURM_*", "SBATCH_*", "LD_*"),
    # Who the user is there, and folders of that machine.
    *("HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "TMPDIR", "HOSTNAME", "SSH_AUTH_SOCK"),
)


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


def is_secret_variable(name: str) -> bool:
    """True where the name of a variable says that its value should not be written down."""
    return SECRET_WORD.search(name) is not None or MORE_SECRETS.search(name) is not None


def is_fixed_variable(name: str) -> bool:
    """True where a variable belongs to one process or one machine."""
    return any(fnmatchcase(name, pattern) for pattern in FIXED_VARIABLES)

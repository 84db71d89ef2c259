"""Names of environment variables: which hold secrets, and which belong to one process or one machine. Pure."""

import re
from fnmatch import fnmatchcase

from llmtrain.config.reading.key_names import SECRET_WORD

VARIABLE_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
"""A variable's name, or the beginning of some with an asterisk."""

MORE_SECRETS = re.compile(
    r"(?i)(?:^|_)(?:access_key(?:_id)?|key|auth|authorization|credentials?|passwd|pwd|pass|pat|cookie|bearer|jwt|dsn)"
    r"(?:$|_)|(?:token|secret|password|passwd|apikey)$"
)
"""Words that in a variable's name mean a secret, beside those that do so in a configuration's keys."""

FIXED = (
    # A rank's place and its share of a machine.
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "TORCHELASTIC_*", "RAY_*", "SLURM_*", "SBATCH_*", "LD_*"),
    # Who the user is there, and folders of that machine.
    *("HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "TMPDIR", "HOSTNAME", "SSH_AUTH_SOCK"),
)


def is_secret_variable(name: str) -> bool:
    """Whether the name of a variable says that its value should not be written down."""
    return SECRET_WORD.search(name) is not None or MORE_SECRETS.search(name) is not None


def is_fixed_variable(name: str) -> bool:
    """Whether a variable belongs to one process or one machine."""
    return any(fnmatchcase(name, pattern) for pattern in FIXED)

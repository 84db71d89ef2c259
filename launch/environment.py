"""Which environment variables ranks on other machines get from the command that starts them. Pure."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from llmtrain.config.names import SECRET_WORD

ALWAYS_PASSED = ("NCCL_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "TORCHINDUCTOR_*", "TRITON_*", "CUDA_LAUNCH_BLOCKING")
"""Settings of communication and computation, which all ranks of a run must have alike."""

NEVER_PASSED = (
    # A rank's place and its share of a machine are given by the launcher, or lie in the machine.
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT "
    "CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES OMP_NUM_THREADS "
    # Folders and sockets of this machine's own, and who the user is there.
    "HOME USER LOGNAME SHELL PWD OLDPWD TMPDIR HOSTNAME SSH_AUTH_SOCK"
).split()
NEVER_PASSED_PATTERNS = ("RAY_*", "SLURM_*", "SBATCH_*", "TORCHELASTIC_*", "TORCHELASTIC_RUN_ID", "LD_*")

MORE_SECRETS = re.compile(
    r"(?i)(?:^|_)(?:access_key(?:_id)?|private_key|key|auth|authorization|credentials?|passwd|pwd|pass|pat|cookie|"
    r"bearer|jwt|dsn|netrc)(?:$|_)|(?:token|secret|password|passwd|apikey)$"
)
"""Words that in the name of a variable mean a secret, beside those that do so in a configuration's keys."""


def passed_environment(environ: Mapping[str, str], patterns: Iterable[str] = ()) -> dict[str, str]:
    """The variables of `environ` that all ranks get: those of ALWAYS_PASSED and of the user's patterns.

    A pattern is a name, or NAME* for all that begin so. Secrets are never among them, nor what says which rank a
    process is, nor what belongs to Ray, Slurm or this machine.
    """
    wanted = (*ALWAYS_PASSED, *patterns)
    return {
        name: value
        for name, value in environ.items()
        if any(fnmatchcase(name, pattern) for pattern in wanted) and not is_secret_variable(name) and not is_fixed(name)
    }


def is_secret_variable(name: str) -> bool:
    """Whether the name of a variable, or a pattern, says that its value should not be written down."""
    return SECRET_WORD.search(name) is not None or MORE_SECRETS.search(name.rstrip("*")) is not None


def is_fixed(name: str) -> bool:
    """Whether a variable is never passed on, because it belongs to one process or one machine."""
    return name in NEVER_PASSED or any(fnmatchcase(name, pattern) for pattern in NEVER_PASSED_PATTERNS)

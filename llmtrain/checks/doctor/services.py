"""What ranks are started by and recorded with: Ray, Slurm, Weights & Biases. Tells of secrets only whether they are."""

import netrc
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from llmtrain.checks.doctor.finding import Finding
from llmtrain.checks.doctor.machine import output_of

WANDB_SERVER = "https://api.wandb.ai"


def service_findings(environment: Mapping[str, str], broken: Mapping[str, str]) -> Iterator[Finding]:
    """`broken` are the packages that cannot be imported, with the error: what depends on them is not told of again."""
    yield Finding("launchers", "local", "ok", "launch.backend=local: ranks are processes of this machine")
    if "ray" not in broken:
        yield ray_finding(environment)
    yield slurm_finding(environment)
    if "wandb" not in broken:
        yield wandb_finding(environment)


def ray_finding(environment: Mapping[str, str]) -> Finding:
    """Which Ray a run would use, and where its token would come from."""
    address = environment.get("RAY_ADDRESS")
    where = f"the cluster at RAY_ADDRESS = {address}" if address else "a Ray of the run's own, or launch.ray_address"
    if environment.get("RAY_AUTH_TOKEN"):
        token = "the token of RAY_AUTH_TOKEN"
    else:
        file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token = f"the token in {file}" if file.is_file() else "no token of a cluster is here"
        if file.is_file() and file.stat().st_mode & 0o077:
            text = f"launch.backend=ray: {where}, with {token}, which others can read"
            return Finding("launchers", "ray", "limited", text, f"chmod 600 {file}")
    return Finding("launchers", "ray", "ok", f"launch.backend=ray: {where}; {token}")


def slurm_finding(environment: Mapping[str, str]) -> Finding:
    """Whether jobs can be submitted from here, and whether this is one."""
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        text = f"{' and '.join(missing)} not on the PATH: no jobs from here"
        mend = "apt-get install slurm-client   (on a cluster: go to its login node, or load its module)"
        return Finding("launchers", "slurm", "missing", text, mend)
    version = output_of("sbatch", "--version")
    if version is None:
        text = "sbatch is here, but finds neither its configuration nor a controller"
        mend = "sbatch --version   (says what it misses: /etc/slurm/slurm.conf, or SLURM_CONF)"
        return Finding("launchers", "slurm", "limited", text, mend)
    job = environment.get("SLURM_JOB_ID")
    if job:
        nodes = environment.get("SLURM_JOB_NUM_NODES", "?")
        return Finding("launchers", "slurm", "ok", f"{version}; inside of job {job}, of {nodes} nodes")
    partitions = output_of("sinfo", "--noheader", "--format=%P")
    if partitions is None:
        text = f"{version}, but its controller does not answer"
        return Finding("launchers", "slurm", "limited", text, "scontrol ping   (says which controller is down)")
    return Finding("launchers", "slurm", "ok", f"{version}; partitions: {', '.join(partitions.split()) or 'none'}")


def wandb_finding(environment: Mapping[str, str]) -> Finding:
    """Whether runs can be sent, without asking the server."""
    server = environment.get("WANDB_BASE_URL") or WANDB_SERVER
    key = (
        "WANDB_API_KEY"
        if environment.get("WANDB_API_KEY")
        else _netrc_with(urlsplit(server).hostname or "", environment)
    )
    mode = environment.get("WANDB_MODE")
    asked = f"; WANDB_MODE = {mode}" if mode else ""
    if key:
        return Finding("records", "wandb", "ok", f"logged in to {server} by {key}{asked}")
    text = f"not logged in: observe.wandb offline and off work, online does not{asked}"
    return Finding("records", "wandb", "limited", text, "wandb login")


def _netrc_with(host: str, environment: Mapping[str, str]) -> str | None:
    """The file that holds a password for a host; None where there is none."""
    named = environment.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(os.fspath(file)).authenticators(host):
                return str(file)
        except (OSError, netrc.NetrcParseError):
            continue
    return None

"""The section `launch`: how ranks are started, and how long they may take. Pure."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import AsTuple, Count, CountOrZero, Ranks, Seconds, Section, Text, Threads

SLURM_WORD = r"^[A-Za-z0-9_.,:@+/*\[\]-]{1,200}$"
"""The characters of names of partitions, accounts and such: none that a shell or Slurm interprets."""

SlurmWord = Annotated[str, Field(pattern=SLURM_WORD)]


class WatchdogConfig(Section):
    """How long a rank may be in one part of a run without progress before all ranks are ended and started again."""

    setup_seconds: Seconds = Field(default=1800.0, description="From the start of a rank to the end of its first step.")
    data_seconds: Seconds = Field(default=600.0, description="Waiting for the batches of a step.")
    step_seconds: Seconds = Field(default=600.0, description="One step.")
    evaluate_seconds: Seconds = Field(default=1800.0, description="One evaluation.")
    checkpoint_seconds: Seconds = Field(default=1800.0, description="One checkpoint.")


class SlurmConfig(Section):
    """What a job of `llmtrain submit --to slurm` asks Slurm for. Absent keys are left to the site's default."""

    nodes: Ranks = Field(default=1, description="Machines. Ranks are spread over them evenly.")
    partition: SlurmWord | None = Field(default=None, description="Letters, digits and _ . , : @ + / * [ ] - only.")
    account: SlurmWord | None = Field(default=None, description="Letters, digits and _ . , : @ + / * [ ] - only.")
    qos: SlurmWord | None = Field(default=None, description="Letters, digits and _ . , : @ + / * [ ] - only.")
    reservation: SlurmWord | None = Field(default=None, description="Letters, digits and _ . , : @ + / * [ ] - only.")
    constraint: SlurmWord | None = Field(default=None, description="Letters, digits and _ . , : @ + / * [ ] - only.")
    time: Annotated[str, Field(pattern=r"^([0-9]{1,6}-)?[0-9]{1,9}(:[0-9]{1,9}){0,2}$", max_length=40)] | None = Field(
        default=None, description="Time limit of one job, as minutes, HH:MM:SS or D-HH:MM:SS."
    )
    memory: Annotated[str, Field(pattern=r"^[0-9]{1,12}[KMGT]?$", max_length=16)] | None = Field(
        default=None, description="Memory per machine, such as 480G; 0: all of it."
    )
    exclusive: bool = Field(default=False, description="Nobody else's jobs on the machines.")
    warn_seconds: Count = Field(
        default=120, description="Slurm tells the job to save and stop so long before the time limit."
    )
    setup: Text | None = Field(
        default=None,
        description="File that the shell of the job reads first: modules, a venv to activate.",
    )


class LaunchConfig(Section):
    """How workers are started."""

    backend: Literal["local", "ray", "slurm"] = Field(
        default="local",
        description="local: processes on this machine. ray: actors on a Ray cluster. slurm: tasks that srun starts, "
        "inside an allocation.",
    )
    num_workers: Ranks = Field(default=1, description="Number of ranks. Under torchrun and srun theirs counts.")
    min_workers: Ranks | None = Field(
        default=None,
        description="With ray: a run goes on with as few ranks while there is no room for num_workers, and grows back; "
        "absent: it waits for all.",
    )
    threads_per_worker: Threads = Field(
        default=0,
        description="CPU threads of a rank; 0: OMP_NUM_THREADS where you have set it, else the cores that a machine "
        "has for the run (affinity, cgroup quota) divided by its ranks there. With slurm, else the CPUs of a rank.",
    )
    cpus_per_worker: Threads = Field(
        default=0, description="CPUs that Ray or Slurm set aside for a rank; 0: threads_per_worker, at least 1."
    )
    timeout_seconds: Seconds = Field(default=600.0, description="Longest wait for other ranks before a run fails.")
    max_stalled_attempts: CountOrZero = Field(
        default=3,
        description="Attempts in a row that end without a newer checkpoint before the run is given up with exit code "
        "93. 0: a failed run is not started again.",
    )
    grace_seconds: Annotated[float, Field(ge=0, le=1e9)] = Field(
        default=0.0,
        description="From being told to stop to the end; a save that is not done by then is abandoned. 0: no limit.",
    )
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one.")
    ray_address: Text | None = Field(
        default=None,
        description="Ray cluster: host:port of its head, or auto for the one of this machine. Absent: RAY_ADDRESS from "
        "the environment, as in a Ray job; else a Ray of the run's own, which ends with it.",
    )
    allow_open_cluster: bool = Field(
        default=False, description="Use a Ray cluster on other machines although it asks nobody for a token."
    )
    pass_environment: Annotated[tuple[Text, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Environment variables that ranks on a Ray cluster get from the command, as names or NAME*; those "
        "of NCCL, gloo and PyTorch always. Secrets are refused.",
    )
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)

"""What a run, or a data pipeline, asks Slurm for: machines, tasks and CPUs, and the body that its job has.

Bodies are those of the files in slurm/, which can be used by hand. That of a pipeline on Ray is the one of a run on Ray
with another command.
"""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from launch.on_slurm.launcher import cpus_per_rank
from llmtrain.config.launch import SlurmConfig
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.rules.launch import uneven_nodes
from llmtrain.config.rules.pipeline import slurm_job_problems
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

BODY_MARK = "# ---- what the job does ----\n"
"""The line at which the body of a file in slurm/ begins. Above it are lines to edit by hand."""

BODIES = {
    "local": "train.sbatch",
    "slurm": "train.sbatch",
    "ray": "train_on_ray.sbatch",
    "processes": "data_run.sbatch",
}
"""The file for each backend, of runs and of pipelines."""

COMMAND = re.compile(r"(?<=    exec )llmtrain (?:.*\\\n)*.*")
"""What a body starts, with the lines that continue it."""

PIPELINE_ON_RAY = 'llmtrain data run -- "$@" run.backend=ray "run.address=$HEAD:$PORT"'


@dataclass(frozen=True)
class AskedJob:
    """A job: the options that say how large it is, and the rest of what it asks for. Its log goes into its folder.

    `section` is the dotted key of `slurm`; `problems` are those of the configuration that matter to Slurm alone.
    """

    name: str
    output_dir: str
    section: str
    slurm: SlurmConfig
    size: tuple[str, ...]
    body: str
    problems: tuple[Problem, ...]

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name


def asked_job(config: RunConfig | PipelineConfig) -> AskedJob:
    """The job of a run or of a pipeline."""
    return _job_of_pipeline(config) if isinstance(config, PipelineConfig) else _job_of_run(config)


def _job_of_run(config: RunConfig) -> AskedJob:
    launch, slurm = config.launch, config.launch.slurm
    per_node = launch.num_workers // slurm.nodes
    size = [
        f"--nodes={slurm.nodes}",
        f"--ntasks={launch.num_workers}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={cpus_per_rank(config)}",
    ]
    if launch.device == "cuda":
        size.append(f"--gpus-per-node={per_node}")
    problems = tuple(uneven_nodes(config))
    body = _body(launch.backend)
    return AskedJob(config.name, config.output_dir, "launch.slurm", slurm, tuple(size), body, problems)


def _job_of_pipeline(config: PipelineConfig) -> AskedJob:
    """The job of a pipeline has one task a machine, and whole machines where no number of workers is given."""
    run, slurm = config.run, config.run.slurm
    size = [f"--nodes={slurm.nodes}", f"--ntasks={slurm.nodes}", "--ntasks-per-node=1"]
    if run.workers:
        size.append(f"--cpus-per-task={run.workers // slurm.nodes}")
    elif not slurm.exclusive:
        size.append("--exclusive")
    body = _body(run.backend)
    if run.backend == "ray":
        body, replaced = COMMAND.subn(lambda _: PIPELINE_ON_RAY, body)
        assert replaced == 1
    problems = tuple(slurm_job_problems(run))
    return AskedJob(config.name, config.output_dir, "run.slurm", slurm, tuple(size), body, problems)


def _body(backend: str) -> str:
    return files("slurm").joinpath(BODIES[backend]).read_text("utf-8").partition(BODY_MARK)[2]

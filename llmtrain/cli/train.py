"""`llmtrain train`: check a configuration wherever no device is needed, then run it. `llmtrain schema`: its keys."""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.preflight.dry_run import DryRun
    from llmtrain.preflight.source_use import SourceUse


ConfigArgument = Annotated[
    Path, typer.Argument(help="The run's YAML file, or llmtrain:runs/NAME.yaml.", metavar="CONFIG", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Keys set over the file's, such as optim.lr=1e-4.", metavar="KEY=VALUE"),
]


LAUNCHERS = {"local": "launch.local", "ray": "launch.on_ray.launcher", "slurm": "launch.on_slurm.launcher"}
"""The module with the function `launch` of each launch.backend."""


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration as YAML, and stop.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="With --dry-run: as if on so many ranks.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Train a model. The same command goes on where the run stopped.

    All problems of the configuration are reported together, before anything is started.
    """
    if as_json and not dry_run:
        raise typer.BadParameter("goes with --dry-run", param_hint="--json")
    if ranks is not None and not dry_run:
        message = f"goes with --dry-run. To train on so many, write launch.num_workers={ranks}"
        raise typer.BadParameter(message, param_hint="--ranks")
    if print_config:
        from llmtrain.config.reading.load import load_config
        from llmtrain.config.reading.rendering import record_of

        typer.echo(record_of(load_config(config, overrides or []).config), nl=False)
        return

    from launch.rank.place import rank_from_environment
    from llmtrain.config.rules.arithmetic import schedule_warnings
    from llmtrain.preflight.storage import load_run, storage_warnings

    place = rank_from_environment(os.environ)
    world_size = place.world_size if place and ranks is None else None
    hypothetical = [] if ranks is None else [f"launch.num_workers={ranks}"]
    resolved = load_run(config, [*(overrides or []), *hypothetical], world_size, asks_room=ranks is None)
    run = resolved.config
    for warning in schedule_warnings(run) + (storage_warnings(run) if ranks is None else []):
        typer.echo(f"warning: {warning}", err=True)
    if dry_run:
        from llmtrain.preflight.dry_run import damaged_checkpoints, find_continuation, plan_dry_run

        for fault in damaged_checkpoints(run):
            typer.echo(f"warning: {fault}. It is passed over for an older one, if there is one.", err=True)
        plan = plan_dry_run(resolved, find_continuation(run))
        _print_dry_run(plan, as_json)
        return

    if place:
        from launch.local import run_as_rank

        raise typer.Exit(run_as_rank(resolved, place))
    raise typer.Exit(import_module(LAUNCHERS[run.launch.backend]).launch(resolved))


def _print_dry_run(plan: "DryRun", as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from llmtrain.cli.tables import aligned
    from llmtrain.plan.layout_text import layout_tables
    from llmtrain.words import counted, short_bytes

    if as_json:
        typer.echo(json.dumps(asdict(plan), indent=2))
        return
    evaluate, checkpoint = plan.evaluate_every_steps, plan.checkpoint_every_steps
    active = plan.active_parameters
    met = f" (a token meets {active:,})" if active < plan.parameters else ""
    lines = {
        "run folder": plan.run_folder,
        "starts": _start(plan),
        "model": f"{plan.parameters:,} parameters{met}, {plan.vocab_size:,} tokens in the vocabulary",
        "precision": plan.precision,
        "engine": f"{plan.engine}, ZeRO stage {plan.zero_stage}" if plan.zero_stage else plan.engine,
        "ranks": f"{plan.world_size:,} = {_axes(plan)}",
        "batch": f"{plan.global_batch_size:,} sequences = {counted(plan.data_parallel_size, 'data rank')} x "
        f"{counted(plan.micro_batches_per_rank, 'micro-batch', 'es')} x {plan.micro_batch_size}, "
        f"of {plan.seq_len:,} tokens each"
        + "".join(f"; from step {step:,} on {size:,}" for step, size in plan.batch_ramp),
        "steps": f"{plan.steps:,} "
        + (f"of {plan.tokens_per_step:,} tokens" if not plan.batch_ramp else "of changing size")
        + f", {plan.tokens:,} tokens in all",
        "evaluation": f"every {counted(evaluate, 'step')}{_early_stop(plan)}" if evaluate else "never",
        "tasks": f"every {counted(plan.tasks_every_steps, 'step')}: {', '.join(plan.tasks)}" if plan.tasks else "none",
        "checkpoints": (f"every {counted(checkpoint, 'step')} and " if checkpoint else "")
        + f"at the end, {short_bytes(plan.checkpoint_bytes)} each",
        "memory": f"about {_memory(plan)}",
    }
    for name, text in [*lines.items(), *map(_source, plan.sources)]:
        typer.echo(f"{name:<12} {text}")
    if plan.world_size > 1:
        for table in layout_tables(plan.layout):
            typer.echo(f"\n{aligned(*table)}")


def _source(source: "SourceUse") -> tuple[str, str]:
    """The size of an epoch of a source, and how much of the source no epoch shows."""
    name = {"train": "data", "valid": "validation"}[source.split]
    often = f"{source.epochs:,.3g} epochs" if name == "data" else f"{source.epochs:.1%} of it each time"
    if source.leaves_at_step is not None:
        often += f", then none: from step {source.leaves_at_step:,} on the others go on without it"
    use = source.use
    return name, f"{source.path}: {use.tokens:,} tokens = {use.samples:,.0f} samples; {use.unused_text}; {often}"


def _start(plan: "DryRun") -> str:
    """At the first step, or where it goes on: what a second start of the same command does."""
    continues = plan.continues
    if continues is None:
        return "at step 1, from new weights"
    if continues.step == 0:
        return f"at step 1, with the weights of {continues.checkpoint}"
    if continues.step >= plan.steps:
        step = f"{continues.step:,}"
        return f"nothing is left to do: {continues.checkpoint} is at step {step}. More than {step} steps go on"
    if plan.stopped_early:
        more = "A larger evaluate.stop_after, or null, goes on"
        return f"nothing is left to do: {continues.checkpoint} has stopped early at step {continues.step:,}. {more}"
    whose = "" if continues.is_own else " of another run"
    return f"at step {continues.step + 1:,}: continues {continues.checkpoint}{whose}"


def _early_stop(plan: "DryRun") -> str:
    from llmtrain.config.metrics import titled
    from llmtrain.words import counted

    after, metric = plan.stop_after, titled(plan.metric).lower()
    return f"; the run ends after {counted(after, 'evaluation')} in a row without a better {metric}" if after else ""


def _memory(plan: "DryRun") -> str:
    from llmtrain.words import short_bytes

    memory = plan.memory
    parts = {
        "weights, gradients and moments": memory.held,
        "activations": memory.activations,
        "logits": memory.logits,
        **({"teacher": memory.teacher} if memory.teacher else {}),
    }
    text = " + ".join(f"{short_bytes(size)} {name}" for name, size in parts.items())
    whole = short_bytes(sum(parts.values()))
    return f"{whole}{' per rank' if plan.world_size > 1 else ''} = {text}; beside it Python and PyTorch"


def _axes(plan: "DryRun") -> str:
    """The mesh, the slowest axis first."""
    layout = plan.layout
    text = " x ".join(f"{axis} {size:,}" for axis, size in reversed(layout.sizes.items()))
    text += f", {layout.virtual_pipeline} chunks per stage" if layout.virtual_pipeline > 1 else ""
    text += ", zero-bubble schedule" if layout.pipeline_schedule == "zero_bubble" else ""
    text += f", context by {plan.context_exchange}" if plan.context_exchange else ""
    text += f", experts over {layout.expert} ranks" if layout.expert > 1 else ""
    return text + (", sequence parallel" if layout.sequence else "")


def schema() -> None:
    """Print the JSON schema of run files. An editor that knows it completes keys and marks mistakes.

    In VS Code with the YAML extension: `# yaml-language-server: $schema=run.schema.json` as the first line.
    """
    import json

    from llmtrain.config.reading.rendering import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))

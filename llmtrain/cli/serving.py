"""`llmtrain serve`: a trained model behind OpenAI's interface."""

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtrain.cli.models.options import BaseFolderOption, BestOption, KernelKind, KernelsOption, RanksArgument
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from llmtrain.infer.serving.opening import ServedSource

    RunServer = Callable[[Starlette, Callable[[], bool]], None]

KEY_VARIABLE = "LLMTRAIN_API_KEY"
PACKAGES = ("starlette", "uvicorn", "prometheus_client")


QueueOption = Annotated[int, typer.Option(min=0, max=100_000, help="Texts that may wait; more are told to come back.")]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Scores are the same to the last bit, alone or in a crowd. Slower.")
]
KeyFileOption = Annotated[Path | None, typer.Option(help=f"File with the API key; else the variable {KEY_VARIABLE}.")]
DrainOption = Annotated[int, typer.Option(min=0, max=86_400, help="Seconds that begun texts have when told to stop.")]
ReplicasOption = Annotated[
    str | None,
    typer.Option(help="Servers of the model on Ray: 2, or 1-4 for as many as are needed.", metavar="N|N-M"),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(help="With --replicas: host:port of a Ray head, or auto; else RAY_ADDRESS, or a Ray of its own."),
]
OpenClusterOption = Annotated[
    bool, typer.Option("--allow-open-cluster", help="With --replicas: also where others could use it without a token.")
]
ThreadsOption = Annotated[
    int, typer.Option(min=0, max=4096, help="With --replicas: CPU threads of each; 0: its share of the cores.")
]


def serve(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, a Hugging Face or PEFT folder, FILE.gguf.")],
    overrides: RanksArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Beyond this machine a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free; it is printed.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Texts that are written together.")] = 8,
    max_queue: QueueOption = 64,
    max_tokens: Annotated[int, typer.Option(min=1, max=10**9, help="Longest text that a call may ask for.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1024, max=1 << 30, help="Largest body of a call, in bytes.")] = 4 << 20,
    exact: ExactOption = False,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; else that of its folder.")] = None,
    key_file: KeyFileOption = None,
    drain: DrainOption = 60,
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    best: BestOption = False,
    base: BaseFolderOption = None,
    kernels: KernelsOption = KernelKind.AUTO,
    replicas: ReplicasOption = None,
    ray_address: RayAddressOption = None,
    allow_open_cluster: OpenClusterOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Serve a model over HTTP as OpenAI's clients expect it, many texts at a time; prints the address.

    /v1/models, completions, chat/completions, embeddings, fill-mask, /health and /metrics. SIGTERM ends it when the
    texts that were begun are written.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(f"A server needs {', '.join(missing)}: pip install 'llmtrain[serve]'.")
    given = {"--ray-address": ray_address, "--allow-open-cluster": allow_open_cluster, "--threads": threads}
    _require_that_they_go_together(replicas, [option for option, value in given.items() if value], overrides or [])
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.infer.serving.asked import ServingLimits
    from llmtrain.infer.serving.callers import LocalCallers, serving_key
    from llmtrain.infer.serving.opening import ServedSource, ServingOptions
    from llmtrain.infer.serving.server import open_port, run_server

    key = serving_key(key_file, os.environ.pop(KEY_VARIABLE, None), host)
    limits = ServingLimits(max_tokens, max_body)
    options = ServingOptions(name or model.absolute().name, limits, slots, max_queue, exact, tokenizer)
    served = ServedSource(best_checkpoint(model) if best else model, device, options, base, kernels.value)
    with open_port(host, port) as bound:  # before the model is read: to be known at once

        def run(app: "Starlette", has_failed: Callable[[], bool]) -> None:
            run_server(app if key else LocalCallers(app), bound, drain, typer.echo, has_failed)

        if replicas is None:
            _serve_here(served, overrides or [], key, run)
            return
        from launch.on_ray.serving import ReplicaOptions, serve_replicas

        asked = replace(
            ReplicaOptions.of(replicas), address=ray_address, allow_open_cluster=allow_open_cluster, threads=threads,
            drain_seconds=drain,
        )  # fmt: skip
        serve_replicas(served, asked, key, run)


def _require_that_they_go_together(replicas: str | None, of_replicas: list[str], keys: list[str]) -> None:
    """Raises ConfigError for options of replicas without any, and for keys of ranks with them."""
    if of_replicas and replicas is None:
        raise ConfigError(f"{of_replicas[0]}: goes with --replicas.")
    if keys and replicas is not None:
        raise ConfigError(
            f"{keys[0]}: does not go with --replicas: each of them is one process with the whole model. Leave one of "
            "the two out."
        )


def _serve_here(served: "ServedSource", keys: list[str], key: str | None, run: "RunServer") -> None:
    """In this process, and the ranks that keys may ask for."""
    from launch.decoding import open_trained
    from llmtrain.infer.packed.choice import KernelChoice
    from llmtrain.infer.serving.app import build_app

    options, kernels = served.options, KernelChoice(served.kernels)
    with open_trained(served.path, keys, served.device, options.exact, served.base, kernels) as trained:
        service, told = options.open(trained)
        if told:
            typer.echo(told, err=True)
        run(build_app(service, key), lambda: service.batch.failure is not None)
        service.batch.stop()
        if service.batch.failure is not None:
            raise service.batch.failure

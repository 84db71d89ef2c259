"""`llmtrain serve`: a trained model behind OpenAI's interface."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from llmtrain.cli.models.options import BaseFolderOption, BestOption, RanksArgument
from llmtrain.errors import ConfigError

KEY_VARIABLE = "LLMTRAIN_API_KEY"
PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, a Hugging Face or a PEFT folder.")],
    overrides: RanksArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Beyond this machine a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free; it is printed.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Texts that are written together.")] = 8,
    max_queue: Annotated[
        int, typer.Option(min=0, max=100_000, help="Texts that may wait; more are told to come back.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, max=10**9, help="Longest text that a call may ask for.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1024, max=1 << 30, help="Largest body of a call, in bytes.")] = 4 << 20,
    exact: Annotated[
        bool, typer.Option("--exact", help="Scores are the same to the last bit, alone or in a crowd. Slower.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; else that of its folder.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help=f"File with the API key; else the variable {KEY_VARIABLE}.")
    ] = None,
    drain: Annotated[
        int, typer.Option(min=0, max=86_400, help="Seconds that begun texts have when told to stop.")
    ] = 60,
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    best: BestOption = False,
    base: BaseFolderOption = None,
) -> None:
    """Serve a model over HTTP as OpenAI's clients expect it, many texts at a time; prints the address.

    /v1/models, completions, chat/completions, embeddings, fill-mask, /health and /metrics. SIGTERM ends it when the
    texts that were begun are written.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(f"A server needs {', '.join(missing)}: pip install 'llmtrain[serve]'.")
    from launch.decoding import open_trained
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.infer.batching.scheduler import Limits
    from llmtrain.infer.serving.app import build_app
    from llmtrain.infer.serving.batch_thread import start_batch
    from llmtrain.infer.serving.server import run_server, serving_key
    from llmtrain.infer.serving.service import Service, ServingLimits
    from llmtrain.infer.text_model import TextModel
    from llmtrain.words import short_bytes

    key = serving_key(key_file, os.environ.pop(KEY_VARIABLE, None), host)
    with open_trained(best_checkpoint(model) if best else model, overrides or [], device, exact, base) as trained:
        text_model = TextModel(trained, tokenizer)
        limits = Limits.of(text_model.config, slots, exact=exact)
        if text_model.continues:
            memory = limits.cache_bytes(text_model.config)
            typer.echo(f"{slots} slots; the memory of what was read takes {short_bytes(memory)} at most", err=True)
        thread = start_batch(trained, limits, slots + max_queue)
        longest = min(max_tokens, text_model.config.max_seq_len)
        service = Service(text_model, name or model.absolute().name, thread, ServingLimits(longest, max_body))
        run_server(build_app(service, key), (host, port), drain, typer.echo, lambda: thread.failure is not None)
        thread.stop()
        if thread.failure is not None:
            raise thread.failure

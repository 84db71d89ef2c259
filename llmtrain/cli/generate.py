"""`llmtrain generate`: continue a text."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a text with a trained model. The continuation goes to stdout as it is made."""
    from itertools import takewhile

    import torch

    from llmtrain.data.tokenizer import load_tokenizer
    from llmtrain.errors import ConfigError
    from llmtrain.infer.generate import Sampling, iter_tokens
    from llmtrain.infer.model import load_model

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: must be auto, cpu or cuda.")
    sampling = Sampling(temperature, top_k, top_p, seed)
    chosen = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    trained = load_model(model, torch.device(chosen))
    text = load_tokenizer(tokenizer) if tokenizer else trained.tokenizer()
    ids: list[int] = []
    shown = ""
    tokens = iter_tokens(trained.model, text.encode(prompt), sampling, max_tokens)
    for token in takewhile(lambda token: token != text.eos_id, tokens):
        ids.append(token)
        whole = text.decode(ids)
        # A character may span several tokens: until it is complete its bytes decode to replacement marks.
        if not whole.endswith("\ufffd"):
            typer.echo(whole[len(shown) :], nl=False)
            shown = whole
    typer.echo(text.decode(ids)[len(shown) :])

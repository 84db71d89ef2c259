"""`llmtrain generate`: continue a text, answer it, or fill its masks."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; with an encoder's masks in it, to fill.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: from all. Fillings shown.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="The same seed draws the same text.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a text with a decoder, answer it with an encoder-decoder, or fill its masks with an encoder.

    Sentinels are spelled as the tokenizer calls them, else <extra_id_0>, <extra_id_1>, ... (of fill-in-the-middle
    <fim_prefix>, <fim_suffix>, <fim_middle>); masks likewise, such as <mask> or [MASK].
    """
    from llmtrain.infer.generate import Sampling, answer_of
    from llmtrain.infer.model import load_model, named_device

    place, sampling = named_device(device), Sampling(temperature, top_k, top_p, seed)
    trained = load_model(model, place)
    for piece in answer_of(trained, prompt, sampling, max_tokens, tokenizer):
        typer.echo(piece, nl=False)

"""`llmtrain generate`: continue a text, answer it, or fill its masks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.data.tokenizer import Tokenizer
    from llmtrain.infer.generate import Sampling
    from llmtrain.interop.text.special_tokens import NamedTokens
    from llmtrain.models.transformer import Transformer

NUM_FILLINGS = 5


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
    import torch

    from llmtrain.errors import ConfigError
    from llmtrain.infer.generate import Sampling
    from llmtrain.infer.model import load_model
    from llmtrain.infer.tokenizer import model_tokenizer
    from llmtrain.interop.text.special_tokens import named_tokens

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: must be auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch {torch.__version__} finds no GPU that it can use. Give --device cpu or auto; "
            "`llmtrain doctor` says what is missing."
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
    chosen = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    trained = load_model(model, torch.device(chosen))
    text = model_tokenizer(tokenizer, trained.tokenizer_path, trained.model.config, trained.tokens)
    named = named_tokens(text, trained.data)
    if trained.model.config.family == "encoder":
        _fill(trained.model, text, named, prompt, top_k or NUM_FILLINGS)
    else:
        _continue(trained.model, text, named, prompt, (sampling, max_tokens))


def _continue(
    model: "Transformer", text: "Tokenizer", named: "NamedTokens", prompt: str, how: "tuple[Sampling, int]"
) -> None:
    """Print the continuation as it is made."""
    from itertools import takewhile

    from llmtrain.infer.generate import iter_tokens
    from llmtrain.infer.prompts import decode_with_names, encode_with_names

    names = named.sentinels
    before, behind = named.frame(model.config.family)
    prompt_ids = [*before, *encode_with_names(prompt, text, names), *behind]
    ids: list[int] = []
    shown = ""
    tokens = iter_tokens(model, prompt_ids, *how, named.start_id)
    for token in takewhile(lambda token: token not in named.ends, tokens):
        ids.append(token)
        whole = decode_with_names(ids, text, names)
        # A character may span several tokens: until it is complete its bytes decode to replacement marks.
        if not whole.endswith("\ufffd"):
            typer.echo(whole[len(shown) :], nl=False)
            shown = whole
    typer.echo(decode_with_names(ids, text, names)[len(shown) :])


def _fill(model: "Transformer", text: "Tokenizer", named: "NamedTokens", prompt: str, count: int) -> None:
    """Print the best fillings of each mask: probability, then the filling as JSON, so that spaces are seen."""
    import json

    from llmtrain.errors import ConfigError
    from llmtrain.infer.generate import fill_masks
    from llmtrain.infer.prompts import encode_with_names

    if named.mask is None:
        raise ConfigError(f"{text.path}: has no mask token, so there is nothing that an encoder could fill.")
    name, mask_id = named.mask
    if name not in prompt:
        raise ConfigError(f"--prompt: an encoder fills masks. Put {name} where a token is to be found.")
    before, behind = named.around
    before = named.bos_ids or before
    ids = [*before, *encode_with_names(prompt, text, {name: mask_id}), *behind]
    for number, filling in enumerate(fill_masks(model, ids, mask_id, count)):
        typer.echo(f"{name} {number + 1}")
        for token, probability in filling.tokens:
            typer.echo(f"  {probability:.4f}  {json.dumps(text.decode([token]), ensure_ascii=False)}")

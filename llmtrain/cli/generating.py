"""`llmtrain generate`: texts of a trained model, one as it is written, or those of a file of prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.cli.models.options import (
    BaseFolderOption,
    BestOption,
    KernelKind,
    KernelsOption,
    RanksArgument,
    given_parameters,
)
from llmtrain.errors import ConfigError
from llmtrain.words import counted

if TYPE_CHECKING:
    from llmtrain.infer.prompt_file import Writing
    from llmtrain.infer.text_model import TextModel


LeastShareOption = Annotated[
    float, typer.Option(help="Leave out tokens below this share of the likeliest one's probability.")
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="The prompt is what a user says; answered with the model's chat template.")
]
MessagesOption = Annotated[
    Path | None,
    typer.Option(help='With --chat: JSON file of what was said before, {"messages": [...]}, and perhaps tools.'),
]


def generate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, a Hugging Face or PEFT folder, FILE.gguf.")],
    overrides: RanksArgument = None,
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; with an encoder's masks in it, to fill.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with an object in each line: prompt, or messages; answers go to --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --prompts: file of answers, in the order of prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: from all. Fillings shown.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this much probability.")] = 1.0,
    min_p: LeastShareOption = 0.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="The same seed draws the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="The text ends before this one; may be given again.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the model.")] = None,
    chat: ChatOption = False,
    messages: MessagesOption = None,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="With --prompts: texts that are written together.")] = 8,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --prompts: to the last bit what each would be alone. Slower.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out, or begin it again.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    best: BestOption = False,
    base: BaseFolderOption = None,
    kernels: KernelsOption = KernelKind.AUTO,
) -> None:
    """Continue a text with a decoder, answer it with an encoder-decoder, or fill its masks with an encoder.

    Sentinels are spelled as the tokenizer calls them, else <extra_id_0>, <extra_id_1>, ... (of fill-in-the-middle
    <fim_prefix>, <fim_suffix>, <fim_middle>); masks likewise, such as <mask> or [MASK].
    """
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either a text, or a file with --prompts", param_hint="--prompt")
    _require_partner("--chat", {"--messages": messages is not None and not chat})
    of_files = {"--out": out is not None, "--exact": exact, "--overwrite": overwrite}
    _require_partner("--prompts", {} if prompt is None else of_files)
    _require_partner("--prompt: lines of --prompts have messages", {"--chat": chat and prompt is None})
    _require_partner("--out, the file of answers", {"--prompts": prompts is not None and out is None})
    from launch.decoding import open_trained
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.infer.batching.sampling import Sampling
    from llmtrain.infer.generate import Asked, answer_of
    from llmtrain.infer.packed.choice import KernelChoice
    from llmtrain.infer.prompt_file import Writing
    from llmtrain.infer.text_model import TextModel

    how = Writing(Sampling(temperature, top_k, top_p, seed, min_p), max_tokens, tuple(stop or ()))
    found = best_checkpoint(model) if best else model
    with open_trained(found, overrides or [], device, exact, base, KernelChoice(kernels.value)) as trained:
        _require_use(context, text_model := TextModel(trained, tokenizer))
        if prompts is not None and out is not None:
            about = {"weights": trained.identity, "exact": exact}
            _answer_file(text_model, (prompts, out), how, about, slots, overwrite)
        for piece in () if prompt is None else answer_of(text_model, Asked(prompt, chat, messages), how):
            typer.echo(piece, nl=False)


def _require_partner(partner: str, given: dict[str, bool]) -> None:
    """Raise BadParameter for an option that was given without another one."""
    for name, is_alone in given.items():
        if is_alone:
            raise typer.BadParameter(f"goes with {partner}", param_hint=name)


def _require_use(context: typer.Context, model: "TextModel") -> None:
    """Raise ConfigError for an option that was given, and of which the model makes no use."""
    from llmtrain.infer.prompt_file import NO_TEXT, OF_TEXTS

    given = set() if model.continues else set(given_parameters(context))
    for name in OF_TEXTS:
        if name in given:
            raise ConfigError(f"--{name.replace('_', '-')}: {NO_TEXT}")


def _answer_file(
    model: "TextModel",
    files: tuple[Path, Path],
    how: "Writing",
    about: dict[str, Any],
    slots: int,
    overwrite: bool,
) -> None:
    """Answer a file of prompts, on from where an earlier call has stopped, with a bar on a terminal."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from llmtrain.infer.answers import AnswerFile, iter_answers
    from llmtrain.infer.batching.scheduler import Limits
    from llmtrain.infer.prompt_file import PromptFile

    source = PromptFile(files[0], model, how)
    total, digest = source.require_good()
    if files[1].exists() and files[1].samefile(files[0]):
        raise ConfigError(f"--out {files[1]}: is the file of prompts. Choose another name.")
    settings = {**asdict(how.sampling), "max_tokens": how.max_tokens, "stop": list(how.stops)}
    about = {"prompts": digest, **about, "tokenizer": model.tokenizer.sha256, **settings}
    console = Console(stderr=True)
    with AnswerFile(files[1], about, overwrite) as target:
        done = target.num_written
        if done:
            typer.echo(f"{counted(done, 'answer')} of {total:,} are there already", err=True)
        limits = Limits.of(model.config, max(1, min(slots, total - done)), exact=about["exact"])
        answers = iter_answers(model, source.iter_from(done), limits)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            bar = bars.add_task("answers", total=total, completed=done)
            try:
                target.write(answers, lambda answer: bars.advance(bar))
            except KeyboardInterrupt:
                typer.echo(target.to_go_on(total), err=True)
                raise
    typer.echo(f"wrote {files[1]}: {counted(total, 'answer')}", err=True)

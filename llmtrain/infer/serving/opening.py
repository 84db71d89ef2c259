"""A trained model, opened as a server's service."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.infer.serving.asked import ServingLimits
from llmtrain.words import short_bytes

if TYPE_CHECKING:
    from llmtrain.infer.model import TrainedModel
    from llmtrain.infer.packed.choice import KernelNames
    from llmtrain.infer.serving.service import Service


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served."""

    name: str
    """For clients."""
    limits: ServingLimits
    """Its texts are at most as long as the model's longest sequence, too."""
    slots: int = 8
    max_queue: int = 64
    exact: bool = False
    tokenizer: Path | None = None
    """Instead of the one beside the model."""

    def open(self, trained: "TrainedModel") -> "tuple[Service, str]":
        """The service, whose batch's thread runs from now on, and what is said about its memory.

        Raises ConfigError for a model that writes no text.
        """
        # Here: a command whose replicas do this is not to wait for them.
        from llmtrain.infer.batching.scheduler import Limits
        from llmtrain.infer.serving.batch_thread import start_batch
        from llmtrain.infer.serving.service import Service
        from llmtrain.infer.text_model import TextModel

        text_model = TextModel(trained, self.tokenizer)
        limits = Limits.of(text_model.config, self.slots, exact=self.exact)
        told = ""
        if text_model.continues:
            memory = short_bytes(limits.cache_bytes(text_model.config))
            told = f"{self.slots} slots; the memory of what was read takes {memory} at most"
        longest = min(self.limits.max_tokens, text_model.config.max_seq_len)
        thread = start_batch(trained, limits, self.slots + self.max_queue)
        return Service(text_model, self.name, thread, replace(self.limits, max_tokens=longest)), told


@dataclass(frozen=True)
class ServedSource:
    """A trained model, and how it is served."""

    path: Path
    device: str
    options: ServingOptions
    base: Path | None = None
    """Of what was finetuned, where it is not where it was."""
    kernels: "KernelNames" = "auto"
    """Of a quantized model."""

    def at_absolute_paths(self) -> "ServedSource":
        """Replicas run in other folders than the command."""
        tokenizer = self.options.tokenizer and self.options.tokenizer.absolute()
        options = replace(self.options, tokenizer=tokenizer)
        base = self.base and self.base.absolute()
        return replace(self, path=self.path.absolute(), options=options, base=base)

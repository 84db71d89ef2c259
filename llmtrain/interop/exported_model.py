"""What exports of every format begin with: a trained model, its text, and what is known of its training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from llmtrain.config.model import ModelConfig
from llmtrain.interop.examples import Logits
from llmtrain.interop.name_table import ReadTensor
from llmtrain.interop.text.proof import ChatExamples
from llmtrain.interop.text.special_tokens import NamedTokens
from llmtrain.interop.text.tokenizer_json import TokenizerSettings
from llmtrain.values.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExportedModel:
    """A model but for its weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    tokens: NamedTokens
    """Special tokens that it was trained with."""
    chats: ChatExamples | None = None
    """The conversations that it was trained to take part in; None: there were none."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Facts for the model card by their label."""

    def with_facts(self, facts: Mapping[str, str]) -> "ExportedModel":
        """The same model, of which more is known."""
        return replace(self, facts={**self.facts, **facts})

    def tokenizer_settings(self, model_type: str) -> TokenizerSettings:
        """What is told of its texts in the files of its tokenizer; `model_type` is a word of transformers'."""
        config, chats = self.config, self.chats
        settings = TokenizerSettings(config.max_seq_len, config.family, config.token_types, model_type)
        return settings if chats is None else replace(settings, template=chats.template, controls=chats.controls)


@dataclass(frozen=True)
class TrainedWeights:
    """A model's tensors, and what a model computes from such tensors.

    For an export in lower precision the tensors must already be rounded to it, so that equal weights are compared.
    """

    read: ReadTensor
    build: Callable[[ModelConfig, ReadTensor], Logits]

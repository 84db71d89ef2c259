"""Word and position embeddings: token ids to the residual stream.

Shape suffixes: B micro-batch, S sequence, H hidden.
"""

from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.models.norms import build_norm
from llmtrain.models.positions import sinusoids
from llmtrain.parallel.stateless_random import Draws, dropout_hidden, site_key


class Embeddings(nn.Module):
    """The sum of the word embedding, for learned and sinusoidal positions the position's, and where there are token
    types that of type 0, which all tokens have."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sinusoidal = config.position == "sinusoidal"
        self.dropout = config.dropout
        self.dropout_sites = {"decoder": site_key("embeddings"), "encoder": site_key("embeddings", "encoder")}
        self.word = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.position = nn.Embedding(config.max_seq_len, config.hidden_size) if learned else None
        self.token_type = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.norm = build_norm(config) if config.embedding_norm else None

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, draws: Draws | None, side: str) -> Tensor:
        """[S, B, H]; `side` is the stack that it is for."""
        x_SBH = self.word(tokens_BS).transpose(0, 1)
        if self.position is not None:
            x_SBH = x_SBH + self.position(positions_BS).transpose(0, 1)
        if self.sinusoidal:
            x_SBH = x_SBH + sinusoids(positions_BS, x_SBH.shape[-1]).to(x_SBH.dtype)
        if self.token_type is not None:
            x_SBH = x_SBH + self.token_type(tokens_BS.new_zeros(1))
        x_SBH = x_SBH.contiguous() if self.norm is None else self.norm(x_SBH.contiguous())
        return dropout_hidden(x_SBH, self.dropout, self.dropout_sites[side], draws)

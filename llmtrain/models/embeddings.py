"""Word and position embeddings: token ids to the residual stream.

Shape suffixes: B micro-batch, S sequence, H hidden.
"""

from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.models.positions import sinusoids
from llmtrain.parallel.draws import Draws, derived_key, dropout_hidden


class Embeddings(nn.Module):
    """The sum of the word embedding and, for learned and sinusoidal positions, the position's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sinusoidal = config.position == "sinusoidal"
        self.dropout = config.dropout
        self.dropout_site = derived_key("embeddings")
        self.word = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.position = nn.Embedding(config.max_seq_len, config.hidden_size) if learned else None

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, draws: Draws | None) -> Tensor:
        """[S, B, H]."""
        x_SBH = self.word(tokens_BS).transpose(0, 1)
        if self.position is not None:
            x_SBH = x_SBH + self.position(positions_BS).transpose(0, 1)
        if self.sinusoidal:
            x_SBH = x_SBH + sinusoids(positions_BS, x_SBH.shape[-1]).to(x_SBH.dtype)
        return dropout_hidden(x_SBH.contiguous(), self.dropout, self.dropout_site, draws)

"""The peers that training is measured beside: a GPT-2 as one would write it in an afternoon, and Hugging Face's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2 and of its batch, the same for every contender."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    seq_len: int
    batch_size: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


class Block(nn.Module):
    """A GPT-2 block with one product for queries, keys and values, and the fused attention kernel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.num_heads = shape.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """A GPT-2 with a tied head that returns the mean cross-entropy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.places = nn.Embedding(shape.seq_len, shape.hidden_size)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.num_layers)))
        self.norm = nn.LayerNorm(shape.hidden_size)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def hugging_face_gpt2(shape: Shape) -> nn.Module:
    """GPT2LMHeadModel of the same sizes without dropout. Its `labels` are the tokens themselves: it shifts them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size, n_positions=shape.seq_len, n_embd=shape.hidden_size,
            n_layer=shape.num_layers, n_head=shape.num_heads, bos_token_id=None, eos_token_id=None,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def random_tokens(shape: Shape, num_batches: int) -> list[Tensor]:
    """Batches [batch_size, seq_len + 1] of random ids, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, shape.seq_len + 1)
    return [torch.randint(shape.vocab_size, size, generator=generator) for _ in range(num_batches)]

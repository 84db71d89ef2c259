"""A text as one vector.

Shape suffixes: B batch, S sequence, H hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import Transformer, counted_positions
from llmtrain.values.batch import ModelInputs


@torch.no_grad()
def embedding(model: Transformer, ids: Sequence[int]) -> Tensor:
    """[H], of length 1: the mean over the tokens of what the last layer puts out, behind its norm; of an
    encoder-decoder, of the encoder's.

    Raises ConfigError for no tokens, and for more than the model can read.
    """
    if not 0 < len(ids) <= model.config.max_seq_len:
        raise ConfigError(
            f"The text has {len(ids)} tokens: give it at least 1 and at most {model.config.max_seq_len} "
            "(model.max_seq_len)."
        )
    tokens_BS = torch.tensor([list(ids)], device=next(model.parameters()).device)
    inputs = ModelInputs(tokens_BS, counted_positions(tokens_BS), encoder_tokens_BT=tokens_BS)
    if model.has_memory:
        hidden_SBH = model.encode(inputs, Pass())[0]
    else:
        found = list[Tensor]()
        # What the head gets is not it: an encoder's head for masks begins with a layer of its own.
        hook = model.stacks[-1].register_forward_hook(lambda _, __, output: found.append(output[0]))
        with hook:
            model(inputs)
        (hidden_SBH,) = found
    return F.normalize(hidden_SBH[:, 0].float().mean(0), dim=0)

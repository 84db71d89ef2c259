"""A text as one vector.

Shape suffixes: B batch, S sequence, H hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.infer.links import WHOLE, StageLinks, passed
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import Transformer, counted_positions
from llmtrain.values.batch import ModelInputs


@torch.no_grad()
def embedding(model: Transformer, ids: Sequence[int], first: int = 0, links: StageLinks = WHOLE) -> Tensor:
    """[H], of length 1: the mean over the tokens of what the last layer puts out, behind its norm; of an
    encoder-decoder, of the encoder's.

    Before the token `first` are the places of a soft prompt. There are at most as many as the model can read. Of a part
    of a model, which `links` join to the others, only what the leading rank finds says something.
    """
    tokens_BS = torch.tensor([list(ids)], device=next(model.parameters()).device)
    inputs = ModelInputs(tokens_BS, counted_positions(tokens_BS), encoder_tokens_BT=tokens_BS)
    mean_BH = torch.empty(0, model.config.hidden_size, device=tokens_BS.device)
    if model.has_memory and model.starts and model.ends:
        mean_BH = mean_of(model.encode(inputs, Pass())[0], first)
    else:
        read_by, found = model.encoder if model.has_memory else getattr(model, model.main_side), list[Tensor]()
        # What the head gets is not it: an encoder's head for masks begins with a layer of its own.
        hook = read_by and read_by.register_forward_hook(lambda _, __, output: found.append(output[0]))
        _, received = passed(model, inputs, links)
        if hook is not None:
            hook.remove()
        elif received is not None:  # encoded on the stages before, and sent on before the decoder's positions
            found.append(received[: len(ids)])
        if model.ends:
            mean_BH = mean_of(found[0], first)
    return F.normalize(links.gathered(mean_BH, 1)[0], dim=0)


def mean_of(x_SBH: Tensor, first: int) -> Tensor:
    """[B, H] in fp32: the mean over the positions from `first` on."""
    return x_SBH[first:].float().mean(0)

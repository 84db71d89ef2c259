"""A model in parts for a proof: some of its layers at a time, between the embeddings and the head."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.interop.name_table import Pairing, ReadTensor, Table, pairings


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of each stack as a model of their own; `first` is the number of the first in the whole.

    A proof for every group is one for the whole: each layer, the embeddings and the head have then computed the same.
    """

    model: ModelConfig
    first: dict[str, int]

    def names(self, table: Table, whole: ModelConfig) -> Iterator[tuple[Pairing, Pairing]]:
        """Each tensor of the part, and the same one in the whole model."""
        sizes = {"encoder": self.model.encoder_layers, "decoder": self.model.decoder_layers}
        chosen = (
            pairing
            for pairing in pairings(table, whole)
            if not pairing.stack or 0 <= pairing.layer - self.first[pairing.stack] < sizes[pairing.stack]
        )
        yield from zip(pairings(table, self.model), chosen, strict=True)

    def own_names(self, table: Table, whole: ModelConfig) -> dict[str, str]:
        """The names in the whole model of the part's parameters."""
        return {
            name: original
            for part, full in self.names(table, whole)
            for name, original in zip(part.ours, full.ours, strict=True)
        }

    def reader(self, table: Table, whole: ModelConfig, read: ReadTensor) -> ReadTensor:
        """Reads tensors of the whole model by the part's names."""
        names = self.own_names(table, whole)
        return lambda name, expert=None: read(names[name], expert)

    def their_tensors(
        self, table: Table, whole: ModelConfig, stored: Callable[[str], Iterable[tuple[str, Tensor]]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The part's tensors under transformers' names, from those that are stored of the whole model: of a name one,
        or several with what stands behind it in theirs."""
        for part, full in self.names(table, whole):
            originals = (full.theirs, *full.written_copies)
            for name, original in zip((part.theirs, *part.written_copies), originals, strict=True):
                yield from ((name + end, tensor) for end, tensor in stored(original))


def layer_parts(model: ModelConfig) -> list[LayerGroup]:
    """As few layers at a time as keep the order of layers with and without experts."""
    period = model.moe.every_n_layers if model.moe else 1
    stacks = {"encoder": model.encoder_layers, "decoder": model.decoder_layers}
    counts = {stack: -(-layers // period) for stack, layers in stacks.items()}
    main = "encoder" if model.family == "encoder" else "decoder"
    parts = []
    for number in range(max(counts.values())):
        # The shorter stack stays with its last layers.
        first = {stack: period * max(0, min(number, count - 1)) for stack, count in counts.items()}
        sizes = {stack: min(period, layers - first[stack]) for stack, layers in stacks.items()}
        changed = {"num_layers": sizes[main]}
        if model.family == "encoder_decoder":
            changed["num_encoder_layers"] = sizes["encoder"]
        parts.append(LayerGroup(model.with_keys(changed), first))
    return parts

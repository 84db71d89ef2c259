"""Which keys a query may see, whatever the kind of attention: order, documents, padding, prefixes.

Shape suffixes: B micro-batch, S queries, T keys.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys a query may see, besides what the kind of attention leaves out.

    Query s sees key t where the kind allows it, and t <= s or t < prefix if `causal`, and both belong to one document.
    With a cache, `keys_BT` covers the cached keys too; the last query stands at the position of the last key.
    """

    causal: bool = True
    queries_BS: Tensor | None = None
    """Document number of each query (-1: padding). None: keys need only be no padding."""
    keys_BT: Tensor | None = None
    """Document number of each key (-1: padding). None: all keys belong together."""
    prefix_B: Tensor | None = None
    """Causal only: keys before this position are seen by every query of the sample."""
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """Masks made from this value, which all layers share."""

    def __post_init__(self) -> None:
        assert self.queries_BS is None or self.keys_BT is not None, "documents of queries need those of keys"
        assert self.prefix_B is None or self.causal, "without an order there is no prefix"

    @property
    def looks_ahead(self) -> bool:
        """Whether a query may see keys behind its own position."""
        return not self.causal or self.prefix_B is not None

    @property
    def may_see_nothing(self) -> bool:
        """Whether a query of self-attention may be left without any key, its own included."""
        return self.keys_BT is not None and self.keys_BT is not self.queries_BS

    def order(self, s_S: Tensor, t_T: Tensor) -> Tensor | None:
        """[1 or B, S, T] for queries and keys at these positions: what causality leaves; None: everything."""
        if not self.causal:
            return None
        before = (t_T <= s_S[:, None])[None]
        return before if self.prefix_B is None else before | (t_T < self.prefix_B[:, None])[:, None]

    def belonging(self, queries: slice = ALL, keys: slice = ALL) -> Tensor | None:
        """[B, 1 or S, T] for these of the queries and keys: what documents and padding leave; None: everything."""
        if self.keys_BT is None:
            return None
        keys_B1T = self.keys_BT[:, None, keys]
        return keys_B1T >= 0 if self.queries_BS is None else self.queries_BS[:, queries, None] == keys_B1T

    def allowed(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """[1 or B, 1 or S, T], True where seen; None where everything is. Made once, for all layers; but a compiled
        layer makes its own, since it would be compiled again for each change of what it finds made."""
        key = (num_queries, num_keys)
        if torch.compiler.is_compiling() or key not in self.made:
            s_S = torch.arange(num_keys - num_queries, num_keys, device=device)
            order = self.order(s_S, torch.arange(num_keys, device=device))
            mask = both(order, self.belonging())
            if torch.compiler.is_compiling():
                return mask
            self.made[key] = mask
        return self.made[key]


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a & b, where None is True everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b

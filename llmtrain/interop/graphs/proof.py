"""The proof that a model's graphs are the model: they are run, and compared with it row by row.

Shape suffixes: B rows, S tokens, P positions, C what the head chooses from, H hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ExportError
from llmtrain.interop.examples import Example, Logits
from llmtrain.interop.graphs.memory import GraphModel, Rows
from llmtrain.interop.proof import TOLERANCE

SHAPES = ((1, 7), (3, 1), (2, 12), (1, 1), (4, 64))
"""Rows and tokens of the texts that are compared; of more rows than one, the last has fewer tokens."""
NUM_STEPS = 6
"""Tokens that follow one by one, from the memory of those before."""
NUM_GREEDY = 32
ALLOWED = {"float32": TOLERANCE, "float16": 2e-2, "bfloat16": 2e-1}
"""How far logits of usual size may be apart; beyond 10 in proportion. Of fp16 and bf16, which round all activations to
11 and 8 bits, where fp32 has 24; whole numbers are other weights, which the perplexity alone judges."""


@dataclass(frozen=True)
class OriginalModel:
    """The model to compare with: its logits of whole texts; how it goes on with one (of an encoder-decoder: what it
    makes of one), the likeliest token each time; and the vector of a text, where the graphs give one."""

    config: ModelConfig
    logits: Logits
    continued: Callable[[Sequence[int], int], list[int]]
    vector: Callable[[Sequence[int]], Tensor]
    start_id: int


@dataclass
class GraphComparison:
    """What was compared so far. `divergence` is the sum over positions of the Kullback-Leibler divergence, in nats."""

    max_difference: float = 0.0
    largest: float = 0.0
    divergence: float = 0.0
    num_positions: int = 0
    num_equal_best: int = 0
    max_vector_difference: float = 0.0
    num_greedy: int = 0
    shapes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ours_PC: Tensor, theirs_PC: Tensor) -> None:
        """The logits of some positions. Raises ExportError where their shapes differ."""
        if ours_PC.shape != theirs_PC.shape:
            raise ExportError(f"Logits have the shape {list(ours_PC.shape)} here and {list(theirs_PC.shape)} there.")
        apart = float((ours_PC - theirs_PC).abs().max())
        # A NaN is the larger of two, whichever stands first.
        self.max_difference = apart if not apart <= self.max_difference else self.max_difference
        self.largest = max(self.largest, float(ours_PC.abs().max()))
        ours, theirs = ours_PC.double().log_softmax(-1), theirs_PC.double().log_softmax(-1)
        self.divergence += float((ours.exp() * (ours - theirs)).sum())
        self.num_positions += len(ours_PC)
        self.num_equal_best += int((ours_PC.argmax(-1) == theirs_PC.argmax(-1)).sum())

    @property
    def perplexity_increase(self) -> float:
        """The share that the perplexity rises by on what the trained model itself would say: the divergence is the
        rise of its logarithm."""
        return math.expm1(self.divergence / max(1, self.num_positions))

    def require(self, precision: str, max_increase: float) -> None:
        """Raise ExportError where the graphs are another model: by more than their type rounds, or by more than
        weights of that type may add to the perplexity."""
        allowed = ALLOWED.get(precision, math.inf)
        of_logits = allowed * max(1.0, self.largest / 10)
        if not self.max_difference <= of_logits:
            raise ExportError(
                f"The graphs compute other logits: they differ by up to {self.max_difference:.3g}, and at most "
                f"{of_logits:.3g} is allowed in {precision}. They would be another model than the trained one."
            )
        if not self.max_vector_difference <= allowed:
            raise ExportError(
                f"The graphs give other vectors: they differ by up to {self.max_vector_difference:.3g}, and at most "
                f"{allowed:.3g} is allowed in {precision}."
            )
        if not self.perplexity_increase <= max_increase:
            raise ExportError(
                f"With rounded weights the perplexity rises by {self.perplexity_increase:.3g} of itself, and "
                f"--max-perplexity-increase = {max_increase:g} allows less. Try more bits (--dtype), or allow more."
            )


def compare_graphs(graphs: GraphModel, trained: OriginalModel, ids: Sequence[int], precision: str) -> GraphComparison:
    """Compare on real tokens, of which any number will do. Raises ExportError where they differ in greedy tokens, if
    the weights are the same."""
    found, config, exact = GraphComparison(), trained.config, precision == "float32"
    if max(ids) >= config.vocabulary:
        raise ExportError(
            f"The tokenizer gives the id {max(ids)}, the model has {config.vocabulary} tokens: it was trained with "
            "another tokenizer. Name that one."
        )
    tokens = cycle(ids)
    for rows, length in SHAPES:
        length = min(length, config.max_seq_len)
        sizes = [length] * rows if rows == 1 else [length] * (rows - 1) + [max(1, length - 5)]
        texts = [list(islice(tokens, size)) for size in sizes]
        found.shapes.append((rows, length))
        if not graphs.has_memory:
            _compare_whole(graphs, trained, texts, found)
        elif config.family == "encoder_decoder":
            targets = [[trained.start_id, *islice(tokens, size - 1)] for size in sizes]
            _compare_steps(graphs, trained, targets, tokens, found, texts)
        else:
            _compare_steps(graphs, trained, texts, tokens, found)
    if graphs.has_memory:
        _compare_greedy(graphs, trained, list(islice(tokens, min(16, max(1, config.max_seq_len - 1)))), found, exact)
    return found


def _compare_whole(graphs: GraphModel, trained: OriginalModel, texts: Rows, found: GraphComparison) -> None:
    """Texts without a memory, padded at their ends; where a model reads pairs, the second half is the second text."""
    longest = max(map(len, texts))
    types = (torch.arange(longest) >= longest // 2).long().expand(len(texts), -1)
    given = graphs.read(texts, types)
    reads_pairs = trained.config.token_types > 1
    for row, text in enumerate(texts):
        tokens_BS = torch.tensor([list(text)])
        types_BS = types[:1, : len(text)] if reads_pairs else None
        ours = trained.logits(Example(tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool), types_BS=types_BS))[0]
        match trained.config.head:
            case "span":
                ends = torch.stack((given["start_logits"], given["end_logits"]))
                found.add(ours.T, ends[:, row, : len(text)])
            case "classifier":
                found.add(ours[None], given["logits"][row, None])
            case _:
                found.add(ours, given["logits"][row, : len(text)])
        if "text_embedding" in given and not reads_pairs:
            _compare_vector(trained, text, given["text_embedding"][row], found)


def _compare_steps(
    graphs: GraphModel,
    trained: OriginalModel,
    texts: list[list[int]],
    tokens: Iterator[int],
    found: GraphComparison,
    sources: Rows | None = None,
) -> None:
    """Texts at once from an empty memory, padded before their beginnings, and then token by token."""
    logits, memory = graphs.begin(texts, sources)
    found_BSC = [logits]
    texts = [list(text) for text in texts]
    for _ in range(min(NUM_STEPS, trained.config.max_seq_len - max(map(len, texts)))):
        new = [next(tokens) for _ in texts]
        found_BSC.append(memory.extend(torch.tensor(new)[:, None]))
        texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
    theirs_BSC = torch.cat(found_BSC, 1)
    for row, text in enumerate(texts):
        source = None if sources is None else torch.tensor([list(sources[row])])
        ours = trained.logits(Example(torch.tensor([text]), encoder_tokens_BT=source))[0]
        found.add(ours, theirs_BSC[row, -len(text) :])
    if sources is not None:
        given = graphs.read(sources)
        for row, source in enumerate(sources):
            _compare_vector(trained, source, given["text_embedding"][row], found)


def _compare_vector(trained: OriginalModel, text: Sequence[int], theirs_H: Tensor, found: GraphComparison) -> None:
    apart = float((trained.vector(text) - theirs_H).abs().max())
    found.max_vector_difference = apart if not apart <= found.max_vector_difference else found.max_vector_difference


def _compare_greedy(
    graphs: GraphModel, trained: OriginalModel, prompt: list[int], found: GraphComparison, exact: bool
) -> None:
    """The likeliest tokens after a prompt, from the memory, beside those that `llmtrain generate` gives."""
    encodes = trained.config.family == "encoder_decoder"
    begun = [trained.start_id] if encodes else prompt
    count = min(NUM_GREEDY, trained.config.max_seq_len - len(begun))
    ours = trained.continued(prompt, count)
    logits, memory = graphs.begin([begun], [prompt] if encodes else None)
    theirs = list[int]()
    for _ in ours:
        theirs.append(int(logits[0, -1].argmax()))
        logits = memory.extend(torch.tensor([theirs[-1:]]))
    equal = next((place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
    if exact and equal < len(ours):
        raise ExportError(f"Greedy continuations differ: ours {ours}, of the graphs {theirs}.")
    found.num_greedy = equal

"""The keys that say over which ranks a trained model is spread for decoding. Pure."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from llmtrain.config.launch import LaunchConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.rules.parallel import pipeline_has_layers, split_names_every_layer, tensor_divides_layers
from llmtrain.config.schema import ParallelConfig
from llmtrain.config.section import Section
from llmtrain.errors import Problem


class DecodingConfig(Section):
    """A trained model, and how ranks hold it."""

    NARROWED: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "parallel": ("tensor", "pipeline", "pipeline_split"),
        "launch": ("num_workers", "threads_per_worker", "timeout_seconds"),
    }

    model: ModelConfig
    exact: bool = False
    """Scores are to be the same to the last bit, alone or in a crowd."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)

    @property
    def num_ranks(self) -> int:
        """Ranks that hold one model."""
        return self.parallel.tensor * self.parallel.pipeline

    def problems(self) -> list[Problem]:
        """What is wrong between the keys."""
        found = [
            Problem(
                f"{name}.{key}", f"has no meaning in decoding. Known are {', '.join(allowed)}.", where="command line"
            )
            for name, allowed in self.NARROWED.items()
            for key in sorted(getattr(self, name).model_fields_set - {*allowed})
        ]
        for rule in (tensor_divides_layers, pipeline_has_layers, split_names_every_layer):
            found += rule(self)
        workers = self.launch.num_workers
        if "num_workers" in self.launch.model_fields_set and workers != self.num_ranks:
            message = f"must be parallel.tensor x parallel.pipeline = {self.num_ranks}. Leave it out, or give that."
            found.append(Problem("launch.num_workers", message, workers))
        if self.exact and self.parallel.tensor > 2:
            message = (
                f"does not go with parallel.tensor = {self.parallel.tensor}: more than two numbers are summed in an "
                "order that depends on their place in memory. Try parallel.tensor=2, or leave it out."
            )
            found.append(Problem("--exact", message, where="command line"))
        return found

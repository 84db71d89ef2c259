"""Figures of several replicas as one page for Prometheus."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


@dataclass(frozen=True, eq=False)
class Families(Collector):
    """Figures that are known already, as a registry asks for them."""

    known: Mapping[str, Metric]

    def collect(self) -> Iterator[Metric]:
        yield from self.known.values()


def merged(own: str, pages: Mapping[str, str]) -> bytes:
    """The figures of `own`, and those of each page with the label `replica`.

    What is in `own` too is left out of the pages: a call that one replica refuses and another takes is one call. Counts
    keep their replica, so that a new one that begins at 0 is not taken for one that counts backwards.
    """
    known = {family.name: family for family in text_string_to_metric_families(own)}
    mine = set(known)
    for replica, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page):
            if family.name in mine:
                continue
            into = known.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(Families(known))
    return generate_latest(registry)

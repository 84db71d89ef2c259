"""A row of metrics, on its way from the loop to whoever records or shows it."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
"""Metrics of one step by name. `step` is always there; training rows carry `loss`, evaluation rows `valid_loss`."""

RESUMED_FROM = "resumed_from"
"""In a row: the step that the run went back to. The row replaces all earlier ones after that step."""

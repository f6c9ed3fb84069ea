"""WAAD: windowed average attention distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headscope.probes.base import Metric, Needs, Probe, by_layer, mean_rows
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class Waad(Probe):
    """Mean look-back distance, each distance cut at a window.

    WAAD_t = sum_s A[t, s] min(t - s, `window`), here averaged over rows per head. The cut removes the growth of plain distance with the
    position.

    Departures: the paper averages the matrices of its local heads and keeps the curve over t; WAAD is linear in A, so the curve of any set
    of heads is the mean of their curves, which the run directory keeps. The head's number is the mean of its own curve.
    """

    window: int = 10

    name: ClassVar[str] = "waad"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("waad", "tokens", "looks beyond the window's nearest tokens", (0.0, None)),)
    data: ClassVar[TextKind] = "natural"
    source: ClassVar[str] = "Attention Illuminates LLM Reasoning, arXiv:2510.13554"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("waad",), {"waad_window": self.window})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        rows = stats["waad"]
        return {"waad": by_layer(stats, lambda layer: mean_rows(rows[layer]))}

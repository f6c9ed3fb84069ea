"""Local and global heads: how far back a head looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.probes.base import Metric, Needs, Probe, by_layer, mean_rows
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class Locality(Probe):
    """Mean look-back distance, and the share of attention within a window.

    distance d = mean over rows of sum_s A[t, s] |t - s|. The paper calls the 30 % of heads with the smallest d local and the 30 % with the
    largest global; roles follow it. local_mass = mean over rows of sum of A over |t - s| < `window`.

    Departures: all rows count, where the paper has only response rows; and a second number is given, distance_beyond_sink, the mean
    distance of the weight that is not on the first token, sum_t (d_t - t A[t, 0]) / sum_t (1 - A[t, 0]). A head that rests on the sink
    looks global by d alone. d grows with the text, so compare it at equal lengths only.
    """

    window: int = 64

    name: ClassVar[str] = "locality"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("distance", "tokens", "looks far back on average", (0.0, None)),
        Metric("distance_beyond_sink", "tokens", "looks far back, the first token not counted", (0.0, None)),
        Metric("local_mass", "probability", "looks at its nearest tokens"),
    )
    data: ClassVar[TextKind] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("statistics", "pairs")
    source: ClassVar[str] = "Attention Illuminates LLM Reasoning, arXiv:2510.13554"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        queries = torch.arange(len(text))
        column = (queries, torch.zeros_like(queries))
        return Needs(("distance", "local_mass", "pairs"), {"local_window": self.window}, {self.name: column})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        distance, local, first = stats["distance"], stats["local_mass"], stats.pairs(self.name)
        place = torch.arange(len(text), dtype=torch.float64)

        def beyond(layer: int) -> Tensor:
            weight = first[layer].to(torch.float64)
            rest = (1 - weight).sum(dim=(0, 2))
            far = (distance[layer].to(torch.float64) - place * weight).sum(dim=(0, 2))
            return torch.where(rest > 1e-9 * len(text), far / rest, torch.zeros_like(rest)).clamp_min(0)

        return {
            "distance": by_layer(stats, lambda layer: mean_rows(distance[layer])),
            "distance_beyond_sink": by_layer(stats, beyond),
            "local_mass": by_layer(stats, lambda layer: mean_rows(local[layer])),
        }

"""Previous-token heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.probes.base import Metric, Needs, Probe, mean_pairs
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class PreviousToken(Probe):
    """Mean attention to the token just before.

    previous_token = mean over t >= 1 of A[t, t - 1].

    Departures: TransformerLens' detector divides by the sum of A over all rows, the first one included, and so gives (N - 1) / N of this.
    """

    name: ClassVar[str] = "previous_token"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("previous_token", "probability", "looks at the token just before"),)
    data: ClassVar[TextKind] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("pairs",)
    source: ClassVar[str] = "In-context Learning and Induction Heads, arXiv:2209.11895; TransformerLensOrg/TransformerLens head_detector"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        queries = torch.arange(1, len(text))
        return Needs(("pairs",), pairs={self.name: (queries, queries - 1)})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        return {"previous_token": mean_pairs(stats, self.name)}

"""Attention sink: how much of later attention lands on one early position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.probes.base import Metric, Needs, Probe, by_layer, mean_pairs
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class Sink(Probe):
    """Share of attention that later rows give to the first token.

    alpha_k = mean over t >= k of A[t, k], per head; a head is a sink head when alpha_k > `eps`. The model's number Sink_k^eps is the share
    of sink heads. `position` is k counted from 0. `length`: only the first so many rows count (the paper's T = 64); None takes all rows.

    Departures: the paper's code averages alpha over 100 texts of 64 tokens; here T is the profile's context unless `length` is given, since
    a sink at 64 tokens says little about one at 8,192. Beyond that the same formula.
    """

    position: int = 0
    eps: float = 0.3
    length: int | None = None

    name: ClassVar[str] = "sink"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("sink", "probability", "later tokens look at the first one"),)
    data: ClassVar[TextKind] = "natural"
    source: ClassVar[str] = "When Attention Sink Emerges, arXiv:2410.10781, sail-sg/Attention-Sink"

    def minimum(self) -> int:
        return max(self.position + 2, self.length or 0)

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        if self.length is None:
            return Needs(("sink_importance",))
        return Needs(("pairs",), pairs={self.name: sink_pairs(self.position, self.length)})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        if self.length is None:
            columns = stats["sink_importance"]
            return {"sink": by_layer(stats, lambda layer: columns[layer][:, :, self.position].to(torch.float64).mean(dim=0))}
        return {"sink": mean_pairs(stats, self.name)}

    def numbers(self, scores: dict[str, Tensor]) -> dict[str, float]:
        return {"sink_rate": sink_rate(scores["sink"], self.eps)}


def sink_pairs(position: int, length: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of column `position` over rows position .. length - 1."""
    queries = torch.arange(position, length)
    return queries, torch.full_like(queries, position)


def sink_rate(alpha: Tensor, eps: float) -> float:
    """Sink_k^eps: the mean over layers of the share of heads with alpha > eps."""
    shares = []
    for row in alpha:
        heads = row[~row.isnan()]
        shares.append(float((heads > eps).double().mean()))
    return sum(shares) / len(shares)

"""Late sinks: tokens behind the first one that draw more attention than their share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.base import Metric, Needs, Probe, by_layer
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology

CODE_THRESHOLD = 0.1
"""The absolute threshold of the official code; equal to alpha / N at N = 50 only."""


@dataclass(frozen=True)
class LateSinks(Probe):
    """ACT's sinks in the middle of a text: tokens s >= 1 whose mean received attention is above alpha / N.

    a_s = (1 / (N - s)) sum over t >= s of A[t, s], per head; s is a sink of the head when a_s > `alpha` / N. `late_sink_count` is the
    number of sinks, `late_sink_mass` the mean attention per row that lies on them. The table `tokens` lists the sinks that the most
    attention rests on. `threshold` sets an absolute one in place of alpha / N, as the official code does with 0.1: at short N it marks
    ordinary tokens, at long N next to none.

    A head with many late sinks and much mass on them is one that ACT calibrates. Token 0 is never counted: it is the sink that ACT leaves
    alone.

    Departures: the official code drops its first *detected* sink in place of token 0, does not leave padding out of the means, and
    reads one element of a batch. As published, a token near the end is judged by few rows, its own among them; `rows` leaves out tokens
    that fewer rows see (1: none, as published).
    """

    alpha: float = 5.0
    threshold: float | None = None
    rows: int = 1
    listed: int = 64

    name: ClassVar[str] = "late_sinks"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("late_sink_count", "tokens", "singles out tokens behind the first one", (0.0, None)),
        Metric("late_sink_mass", "probability", "rests on such tokens"),
    )
    data: ClassVar[TextKind] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("statistics", "causal")
    source: ClassVar[str] = "ACT, Unveiling and Harnessing Hidden Attention Sinks, arXiv:2406.15765, github.com/GATECH-EIC/ACT"

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.rows < 1 or (self.threshold is not None and not 0 <= self.threshold < 1):
            raise refusal(
                ProbeError,
                f"alpha={self.alpha}, threshold={self.threshold}, rows={self.rows}",
                "alpha is a multiple of an even share, a threshold a probability, rows are counted",
                "use alpha=5, or threshold=0.1",
            )

    def minimum(self) -> int:
        return max(int(self.alpha) + 2 if self.threshold is None else 2, self.rows + 1)

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("sink_importance", "column_sum"))

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        sums = stats["column_sum"]
        count = len(text)

        def mass(layer: int) -> Tensor:
            return (sums[layer].double() * self.sinks(stats, layer, count)).sum(2).mean(0) / count

        return {
            "late_sink_count": by_layer(stats, lambda layer: self.sinks(stats, layer, count).double().sum(2).mean(0)),
            "late_sink_mass": by_layer(stats, mass),
        }

    def sinks(self, stats: HeadStatistics, layer: int, count: int) -> Tensor:
        """Bool [B, H, N]."""
        least = self.alpha / count if self.threshold is None else self.threshold
        found = stats["sink_importance"][layer].double() > least
        found[..., 0] = False
        found[..., count - self.rows + 1 :] = False
        return found

    def tables(self, stats: HeadStatistics, text: ProbeText) -> dict[str, pd.DataFrame]:
        """`tokens`: position, token, of how many heads it is a sink, the mean attention that later rows of these give it, and the attention
        that rests on it there, as a share of that of all heads and rows. Largest share first.
        """
        import pandas as pd

        count = len(text)
        sums = stats["column_sum"]
        heads, received, mass = torch.zeros(3, count, dtype=torch.float64)
        for layer in stats.topology.layers:
            found = self.sinks(stats, layer, count)[0].double()
            heads += found.sum(0)
            mass += (sums[layer][0].double() * found).sum(0) / count / stats.topology.heads
            received += (stats["sink_importance"][layer][0].double().nan_to_num() * found).sum(0)
        order = mass.argsort(descending=True, stable=True)[: self.listed]
        order = order[heads[order] > 0]
        given = received[order] / heads[order]
        pieces = text.strings or tuple(str(one) for one in text.ids.tolist())
        return {
            "tokens": pd.DataFrame(
                {
                    "position": order.tolist(),
                    "token": [pieces[place] for place in order.tolist()],
                    "heads": heads[order].long().tolist(),
                    "received": given.tolist(),
                    "mass": mass[order].tolist(),
                }
            )
        }

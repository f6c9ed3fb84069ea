"""Sinks by position: which positions, not only the first, draw the attention of later rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.base import Metric, Needs, Probe, by_layer
from headscope.probes.sink import sink_rate
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class SinkPositions(Probe):
    """Attention that position k receives from the rows t >= k, for every k.

    alpha_k = mean over t >= k of A[t, k], per head, from column sums; Sink_k^eps is the mean over layers of the share of heads with alpha_k
    > `eps`. `sink_peak` is a head's largest alpha_k, `sink_beyond_first` the largest with k >= 1: a head with a high one has its sink
    elsewhere (a line break, a full stop, a second token). The table `positions` has Sink_k^eps, the mean alpha_k and the number of heads
    above eps for every k; probe `sink` is k = 0 alone.

    Departures: a key near the end of the text is seen by a few rows, its own among them, and every local head would seem to sink there;
    only positions with `rows` rows or more count (the paper looks at the first positions of 64). The paper averages over 100 texts of 64
    tokens; T is the profile's context here.
    """

    eps: float = 0.3
    rows: int = 32

    name: ClassVar[str] = "sink_positions"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("sink_peak", "probability", "some position draws the attention of later rows"),
        Metric("sink_beyond_first", "probability", "a position other than the first does"),
    )
    data: ClassVar[TextKind] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("statistics", "causal")
    source: ClassVar[str] = "When Attention Sink Emerges, arXiv:2410.10781, sail-sg/Attention-Sink"

    def __post_init__(self) -> None:
        if self.rows < 1 or not 0 <= self.eps < 1:
            raise refusal(ProbeError, f"rows={self.rows}, eps={self.eps}", "rows are counted, eps is a probability", "use 32 and 0.3")

    def minimum(self) -> int:
        return self.rows + 1

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("sink_importance",))

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        columns = stats["sink_importance"]

        def peak(layer: int, first: int) -> Tensor:
            return columns[layer][:, :, first : len(text) - self.rows + 1].to(torch.float64).amax(2).mean(0)

        return {
            "sink_peak": by_layer(stats, lambda layer: peak(layer, 0)),
            "sink_beyond_first": by_layer(stats, lambda layer: peak(layer, 1)),
        }

    def numbers(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """`sink_rate_anywhere`, `sink_rate_beyond_first`: the mean over layers of the share of heads above eps."""
        return {
            "sink_rate_anywhere": sink_rate(scores["sink_peak"], self.eps),
            "sink_rate_beyond_first": sink_rate(scores["sink_beyond_first"], self.eps),
        }

    def tables(self, stats: HeadStatistics, text: ProbeText) -> dict[str, pd.DataFrame]:
        """`positions`: one row per position that counts."""
        import pandas as pd

        stop = len(text) - self.rows + 1
        columns = stats["sink_importance"]
        rates, alphas, above = torch.zeros(3, stop, dtype=torch.float64)
        for layer in stats.topology.layers:
            alpha = columns[layer][..., :stop].double().mean(0)  # [H, stop]
            rates += (alpha > self.eps).double().mean(0) / len(stats.topology.layers)
            alphas += alpha.sum(0) / stats.topology.heads
            above += (alpha > self.eps).sum(0)
        return {
            "positions": pd.DataFrame(
                {
                    "position": range(stop),
                    "token": text.strings[:stop] if text.strings else [str(one) for one in text.ids[:stop].tolist()],
                    "sink_rate": rates.tolist(),
                    "alpha": alphas.tolist(),
                    "heads": above.long().tolist(),
                }
            )
        }

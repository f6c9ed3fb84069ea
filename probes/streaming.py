"""Streaming recall: would a few first tokens and a recent window have been enough for this head?"""

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
class Streaming(Probe):
    """Share of attention on the first tokens and a recent window (the A shape).

    recall_t = sum of A[t, s] over s < `sink` or t - s < `recent`, averaged over the rows t >= sink + recent. On those rows the two sets do
    not overlap, so recall = sink mass + local mass. Earlier rows have no other key to look at; they are 1 for every head and are left out,
    so that the number does not rise as the text gets shorter.

    Departures: StreamingLLM defines a cache and no head score; this is the recall of its mask. Its examples keep 4 + 2,000 tokens,
    DuoAttention 128 + 256 in training and 64 + 256 in use; the default here is 4 + 64, which separates the heads of a small model at 2,048
    tokens.
    """

    sink: int = 4
    recent: int = 64

    name: ClassVar[str] = "streaming"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("streaming", "probability", "a few first tokens and a recent window are enough"),)
    data: ClassVar[TextKind] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("statistics", "causal")
    source: ClassVar[str] = (
        "StreamingLLM, arXiv:2309.17453, mit-han-lab/streaming-llm; DuoAttention, arXiv:2410.10819, mit-han-lab/duo-attention"
    )

    def minimum(self) -> int:
        return self.sink + self.recent + 1

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("sink_mass", "local_mass"), {"sink_tokens": self.sink, "local_window": self.recent})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        begin = self.sink + self.recent
        sink, local = stats["sink_mass"], stats["local_mass"]
        return {"streaming": by_layer(stats, lambda layer: mean_rows((sink[layer] + local[layer])[:, :, begin:]))}

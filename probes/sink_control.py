"""The control of the sink probe: one token, repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headscope.probes.base import Metric, Needs, Probe, mean_pairs
from headscope.probes.sink import sink_pairs, sink_rate
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class SinkControl(Probe):
    """The sink score on a text of one repeated token.

    alpha_1 = mean over t of A[t, 0] on [x, x, x, ...] without a BOS. All hidden states are then equal, so a model that marks positions only
    by rotation (RoPE) cannot single out the first token: A[t, 0] <= e^(2 xi) / (e^(2 xi) + t - 1) with xi the largest |q.k|, and without
    positions A = 1/t exactly. A model that still has a sink here finds it by position (learned embeddings, as in GPT-2).

    Departures: none; 64 tokens as in the paper.
    """

    eps: float = 0.3

    name: ClassVar[str] = "sink_control"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("sink_repeated", "probability", "the first of equal tokens still draws attention: a sink by position"),
    )
    data: ClassVar[TextKind] = "repeated_token"
    requires: ClassVar[tuple[str, ...]] = ("pairs",)
    source: ClassVar[str] = "When Attention Sink Emerges, arXiv:2410.10781, sail-sg/Attention-Sink"

    def minimum(self) -> int:
        return 8

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("pairs",), pairs={self.name: sink_pairs(0, len(text))})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        return {"sink_repeated": mean_pairs(stats, self.name)}

    def numbers(self, scores: dict[str, Tensor]) -> dict[str, float]:
        return {"sink_rate_repeated": sink_rate(scores["sink_repeated"], self.eps)}

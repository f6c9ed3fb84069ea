"""FAI: future attention influence, how much a token is looked at later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.base import Metric, Needs, Probe, by_layer, mean_rows
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class Fai(Probe):
    """Mean attention that a token receives from later rows, in a band and to the end of the text.

    FAI_s = mean of A[t, s] over t in s + lo .. min(N, s + hi). The paper trains with the band 10..50 and analyses with the horizon to the
    end; both are given: fai_band, and fai_end with the rows t >= s, which is the sink importance of key s. The head's number is the mean
    over keys. fai_peak is the largest band FAI of a key beyond the first four, the head's strongest anchor; only keys whose whole band lies
    in the text can be it.

    Departures: all rows count, where the paper has only response rows; keys with an empty band (the last lo) are undefined and left out.
    FAI is linear in A, so the paper's mean over global heads is the mean of their curves, which the run directory keeps.
    """

    lo: int = 10
    hi: int = 50

    name: ClassVar[str] = "fai"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("fai_band", "probability", "tokens are looked at again 10 to 50 tokens later"),
        Metric("fai_end", "probability", "tokens are looked at until the end of the text"),
        Metric("fai_peak", "probability", "some token is an anchor for what follows"),
    )
    data: ClassVar[TextKind] = "natural"
    source: ClassVar[str] = "Attention Illuminates LLM Reasoning, arXiv:2510.13554"

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi:
            raise refusal(ProbeError, f"Fai(lo={self.lo}, hi={self.hi})", "the band is 0 <= lo <= hi", "use Fai(10, 50)")

    def minimum(self) -> int:
        return self.hi + 6

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("fai", "sink_importance"), {"fai_band": (self.lo, self.hi)})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        band, end = stats["fai"], stats["sink_importance"]
        stop = len(text) - self.hi

        def peak(layer: int) -> Tensor:
            return band[layer][:, :, 4:stop].to(torch.float64).amax(dim=2).mean(dim=0)

        return {
            "fai_band": by_layer(stats, lambda layer: mean_rows(band[layer])),
            "fai_end": by_layer(stats, lambda layer: mean_rows(end[layer])),
            "fai_peak": by_layer(stats, peak),
        }

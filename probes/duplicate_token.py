"""Duplicate-token heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headscope.probes.base import Metric, Needs, Probe, mean_pairs
from headscope.probes.repetition import second_block
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class DuplicateToken(Probe):
    """Attention to the earlier occurrence of the same token, on a block of random tokens and its first repetition.

    duplicate_token = mean over the rows i of the second block of A[i, i - K].

    Departures: TransformerLens' detector sums over every earlier occurrence and divides by the sum of A; with one earlier occurrence, as
    here, that is the same up to the factor K / (2K + 1).
    """

    name: ClassVar[str] = "duplicate_token"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("duplicate_token", "probability", "looks at the same token earlier"),)
    data: ClassVar[TextKind] = "repeated_random"
    requires: ClassVar[tuple[str, ...]] = ("pairs",)
    source: ClassVar[str] = "Interpretability in the Wild (IOI), arXiv:2211.00593; TransformerLensOrg/TransformerLens head_detector"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("pairs",), pairs={self.name: second_block(text, 0)})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        return {"duplicate_token": mean_pairs(stats, self.name)}

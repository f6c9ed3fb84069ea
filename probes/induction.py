"""Induction heads, by prefix matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headscope.probes.base import Metric, Needs, Probe, by_layer, mean_pairs
from headscope.probes.repetition import second_block, shape
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class Induction(Probe):
    """Attention to the token that followed the earlier occurrence of the current one, on random tokens repeated.

    induction = mean over the rows i of the second block of A[i, i - K + 1]. A head that finds it by content alone reaches 1: only one
    earlier occurrence exists there. induction_mul is TransformerLens' detector with error_measure="mul" on the text up to the end of the
    second block, sum(A * D) / sum(A) with D[i, j + 1] = 1 where j < i holds the same token; rows without a target count too, so it cannot
    exceed about 1/2.

    Departures: the text goes on after the second block (other probes read on); attention is causal, so rows of the first two blocks are the
    same as if it did not. For models that look both ways it is not the same text.
    """

    name: ClassVar[str] = "induction"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("induction", "probability", "looks at what followed this token last time"),
        Metric("induction_mul", "share of all weight", "as induction, rows without a target counted", (0.0, 0.5)),
    )
    data: ClassVar[TextKind] = "repeated_random"
    requires: ClassVar[tuple[str, ...]] = ("pairs", "causal")
    source: ClassVar[str] = "In-context Learning and Induction Heads, arXiv:2209.11895; TransformerLensOrg/TransformerLens head_detector"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        names = ("pairs", "sink_logit_mass") if any(module.has_sinks for module in topology.main) else ("pairs",)
        return Needs(names, pairs={self.name: second_block(text, 1)})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        first, block, _ = shape(text)
        rows = first + 2 * block
        induction = mean_pairs(stats, self.name)

        def weight(layer: int) -> Tensor:
            """Sum of A over the rows of the two blocks: one per row, less what a sink logit took."""
            pairs = stats.pairs(self.name)[layer]
            full = pairs.new_full((pairs.shape[1],), float(rows)).double()
            if not stats.topology[layer].has_sinks:
                return full
            return full - stats["sink_logit_mass"][layer][:, :, :rows].double().mean(dim=0).sum(dim=-1)

        return {"induction": induction, "induction_mul": induction * block / by_layer(stats, weight)}

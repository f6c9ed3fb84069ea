"""Receiver heads: heads that single out a few sentences which later sentences look back at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.base import Metric, Needs, Probe, by_layer
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class Receiver(Probe):
    """Kurtosis of the attention that sentences receive from later sentences.

    M[j, i] = mean of A[t, s] over the tokens t of sentence j and s of sentence i. Vertical score v_i = mean of M[j, i] over j >= i +
    `ignore`. receiver = Fisher kurtosis (biased) of v over the sentences i that have a later one that far; a head's number is its mean over
    texts. High: a few sentences get nearly all the attention. The reference takes the 20 heads with the highest kurtosis.

    Departures: the first `skip` sentences are left out, because the first token is a sink in many heads and would make every such head a
    receiver (the reference scores the sentences of a chain of thought, which has a prompt before it); sentences are split at . ! ? and line
    breaks, not by a sentence model; only the next `limit` sentences are read, so that the map stays small on long texts; depth is not
    controlled for (an option of the reference).
    """

    ignore: int = 4
    skip: int = 1
    limit: int = 512

    name: ClassVar[str] = "receiver"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("receiver", "kurtosis", "singles out a few sentences", (-2.0, None)),)
    data: ClassVar[TextKind] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("segments",)
    source: ClassVar[str] = "Thought Anchors, arXiv:2506.19143, interp-reasoning/thought-anchors"

    def check(self, text: ProbeText, topology: Topology) -> None:
        super().check(text, topology)
        count = 0 if text.segments is None else int(text.segments.max()) + 1
        if count < self.skip + self.ignore + 4:
            raise refusal(
                ProbeError,
                f"probe 'receiver' on a text of {count} sentences",
                f"a kurtosis over fewer than 4 sentences says nothing, and the first {self.skip} and last {self.ignore} do not count",
                "raise the context, or name the other probes only",
            )

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("segment_mass",), segments=self._segments(text))

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        segments = self._segments(text)
        sizes = torch.bincount(segments[segments >= 0]).double()
        mass = stats["segment_mass"]
        return {"receiver": by_layer(stats, lambda layer: self._kurtosis(mass[layer].double() / (sizes[:, None] * sizes[None, :])))}

    def _segments(self, text: ProbeText) -> Tensor:
        if text.segments is None:
            raise refusal(
                ProbeError, f"probe 'receiver' on {text}", "this text has no sentences marked", "pass ProbeText.natural(ids, segments=...)"
            )
        moved = text.segments - self.skip
        return torch.where((moved >= 0) & (moved < self.limit), moved, -1)

    def _kurtosis(self, means: Tensor) -> Tensor:
        """[B, H, S, S] sentence means -> [H]."""
        count = means.shape[-1]
        later = torch.ones(count, count, dtype=torch.bool).tril(-self.ignore)
        vertical = (means * later).sum(dim=2) / later.sum(dim=0)
        vertical = vertical[:, :, : count - self.ignore]
        centred = vertical - vertical.mean(dim=2, keepdim=True)
        variance = centred.square().mean(dim=2)
        return (centred.pow(4).mean(dim=2) / variance.square() - 3).mean(dim=0)

"""Echo and induction scores as RazorAttention defines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headscope.probes.base import Metric, Needs, Probe, by_layer
from headscope.probes.repetition import earlier_occurrences, shape
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class Razor(Probe):
    """Echo (the same token earlier) and induction (the token after it), on K random tokens repeated R times.

    Over the rows i of all blocks but the first: echo_sum = mean_i sum of A[i, j] over every earlier occurrence j of the token; echo_last =
    mean_i A[i, i - K]; ind_sum = mean_i sum of A[i, j + 1]; ind_last = mean_i A[i, i - K + 1], without the last token of a block, whose
    successor opens the row's own block. A perfect head that goes by content alone has ind_sum 1 and ind_last mean(1, 1/2, 1/3) = .61 at R =
    4.

    The paper keeps the 1 % of heads with the highest echo and the 14 % with the highest induction score, and with grouped queries the whole
    group of any such head (role `retrieval_like`). These are quotas: a model without induction heads fills them too.

    Departures: tokens are drawn without replacement and are never special (one published script draws with replacement and divides by N^2,
    so that only its ranks can be used); K is context / (R + 1) and not 2,500, to stay inside the trained positions; roles go by the sums.
    """

    name: ClassVar[str] = "razor"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("echo_sum", "probability", "looks at all earlier copies of this token"),
        Metric("echo_last", "probability", "looks at the latest copy of this token"),
        Metric("ind_sum", "probability", "looks at what followed every earlier copy"),
        Metric("ind_last", "probability", "looks at what followed the latest copy"),
    )
    data: ClassVar[TextKind] = "repeated_random"
    requires: ClassVar[tuple[str, ...]] = ("pairs", "causal")
    source: ClassVar[str] = "RazorAttention, arXiv:2407.15891"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        echo, induction = earlier_occurrences(text, 0), earlier_occurrences(text, 1)
        return Needs(("pairs",), pairs={"razor_echo": echo[:2], "razor_induction": induction[:2]})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        first, block, repeats = shape(text)
        queries, _, last = earlier_occurrences(text, 0)
        inside = last & ((queries - first) % block != block - 1)
        rows = block * (repeats - 1)

        def total(name: str) -> Tensor:
            return by_layer(stats, lambda layer: stats.pairs(name)[layer].double().sum(dim=2).mean(dim=0) / rows)

        def latest(name: str, which: Tensor) -> Tensor:
            return by_layer(stats, lambda layer: stats.pairs(name)[layer].double()[:, :, which].mean(dim=(0, 2)))

        return {
            "echo_sum": total("razor_echo"),
            "echo_last": latest("razor_echo", last),
            "ind_sum": total("razor_induction"),
            "ind_last": latest("razor_induction", inside),
        }

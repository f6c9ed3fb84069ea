"""Entropy with length: does a head spread further as the context grows?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.probes.base import Metric, Needs, Probe, by_layer
from headscope.probes.entropy import visible_keys
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True)
class EntropyLength(Probe):
    """How much a head's entropy grows with the number of keys it sees, in nats per nat of ln n.

    By causality, row t of a long text is the last row of a text of t + 1 tokens, so one text shows every length up to its own.
    entropy_slope is the least-squares slope of H_t = -sum_s A ln A over ln n_t, n_t the keys that row t may see, over rows with n_t >=
    `shortest`: 1 for a uniform head (H = ln n), 0 for one that looks at a fixed number of tokens however long the text. entropy_slope_layer
    is that of the layer's mean entropy, which is what the paper plots; entropy_layers_rising in the numbers counts layers above `rising`.

    High: the head is diluted in longer contexts. The paper finds this in layers 0 and 1 of Llama-2-7B only, leaves those alone, and scales
    the scores of all others by max(log_c i, 1), c the trained length. NaN where every row sees as many keys (a short sliding window).

    Departures: the paper averages the entropy over 128 documents at a few lengths; a slope over all rows of one text is the same trend with
    more scatter, and content that changes along the text is part of it. Average over several texts (texts=...) where it matters.
    """

    shortest: int = 16
    rising: float = 0.5

    name: ClassVar[str] = "entropy_length"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("entropy_slope", "nats per nat of ln n", "spreads further in longer texts", (None, None)),
        Metric("entropy_slope_layer", "nats per nat of ln n", "its layer spreads further in longer texts", (None, None), "layer"),
    )
    data: ClassVar[TextKind] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("statistics", "causal")
    source: ClassVar[str] = "Entropy-ABF, arXiv:2401.07004"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("entropy",))

    def minimum(self) -> int:
        return 2 * self.shortest

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        rows = stats["entropy"]

        def slopes(layer: int, whole: bool) -> Tensor:
            values = rows[layer].double().nanmean(0)  # [H, N]
            seen = visible_keys(stats.topology[layer], values.shape[-1])
            kept = seen >= self.shortest
            own = values.mean(0, keepdim=True).expand_as(values) if whole else values
            return slope(own[:, kept], seen[kept].log())

        return {
            "entropy_slope": by_layer(stats, lambda layer: slopes(layer, False)),
            "entropy_slope_layer": by_layer(stats, lambda layer: slopes(layer, True)),
        }

    def numbers(self, scores: dict[str, Tensor]) -> dict[str, float]:
        layers = scores["entropy_slope_layer"][:, 0]
        return {"entropy_layers_rising": float((layers > self.rising).sum())}


def slope(values: Tensor, over: Tensor) -> Tensor:
    """Least-squares slope of values [H, n] over [n]: [H]; NaN where `over` is constant."""
    centred = over - over.mean()
    size = centred.square().sum()
    if len(over) < 2 or float(size) < 1e-9:
        return torch.full((len(values),), float("nan"), dtype=values.dtype)
    return ((values - values.mean(1, keepdim=True)) * centred).sum(1) / size

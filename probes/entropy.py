"""Entropy: how many keys a head spreads over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.probes.base import Metric, Needs, Probe, by_layer, mean_rows
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import AttentionModule, Topology


@dataclass(frozen=True)
class Entropy(Probe):
    """Mean entropy of the rows, in nats and as a share of the largest possible.

    H_t = -sum_s A ln A. entropy is the mean over rows; entropy_normalised the mean of H_t / ln n_t over the rows with n_t > 1, n_t the keys
    that row t may see (t + 1, or the window of a sliding layer). 0 is one key, 1 is uniform.

    Departures: the sign is the usual one (a published formula lacks the minus). With sink logits the weight of the logit is no key and is
    not in H.
    """

    name: ClassVar[str] = "entropy"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("entropy", "nats", "spreads over many tokens", (0.0, None)),
        Metric("entropy_normalised", "share of the largest", "spreads evenly over what it may see"),
    )
    data: ClassVar[TextKind] = "natural"
    source: ClassVar[str] = "Entropy-ABF, arXiv:2401.07004"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        return Needs(("entropy",))

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        rows = stats["entropy"]

        def normalised(layer: int) -> Tensor:
            values = rows[layer].to(torch.float64)
            seen = visible_keys(stats.topology[layer], values.shape[-1])
            return mean_rows((values / seen.log())[:, :, seen > 1])

        return {
            "entropy": by_layer(stats, lambda layer: mean_rows(rows[layer])),
            "entropy_normalised": by_layer(stats, normalised),
        }


def visible_keys(module: AttentionModule, tokens: int) -> Tensor:
    """[N] float64: how many keys each row of an unpadded text may see."""
    place = torch.arange(tokens, dtype=torch.float64)
    if module.causal:
        seen = place + 1
        return seen if module.window is None else seen.clamp_max(module.window)
    if module.window is None:
        return torch.full((tokens,), float(tokens), dtype=torch.float64)
    return (place + module.window).clamp_max(tokens) - (place - module.window + 1).clamp_min(0)

"""FlexPrefill: how sparse a head may run when its pattern is chosen from the last block of queries, and what that keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric
from headscope.probes.block_choice import cover, distances, measure_blocks, pooled, summed, top
from headscope.probes.calls import not_readable, texts_of, weight_rows

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

NAMES = ("flexprefill_density", "flexprefill_recall", "flexprefill_query_aware", "flexprefill_divergence")


@dataclass(frozen=True)
class FlexPrefill(ActiveProbe):
    """Density and recall of the blocks that FlexPrefill would compute, per head.

    From A of the last block of queries: `vertical`, its mean weight per key, and `slash`, its mean weight per distance. The same rows are
    estimated from means of blocks, softmax(mean q . mean k). If the square root of the Jensen-Shannon divergence of estimate and truth, per
    block of keys, is below `tau`, block means speak for this head and it is query-aware: blocks are taken from the map of block means,
    whole map at once, until they hold `gamma` of its rows. Otherwise it is vertical-slash: as many columns and diagonals of blocks as its
    keys and its distances need to hold `gamma`. Either way at least `least` columns and diagonals, the heaviest, are kept, and the first
    column and the main diagonal.

    `flexprefill_density` is the share of the causal blocks chosen, `flexprefill_recall` the share of the exact attention mass in them (a
    head whose recall is far below gamma is misjudged by its last queries), `flexprefill_query_aware` 1 for the query-aware pattern,
    `flexprefill_divergence` the root of the divergence (natural logarithm).

    Departures: `least` is 1 block (the official budget of 1,024 tokens is half of a 2,048-token text). The first column and the main
    diagonal come on top of the budget: out of it, as in the official code, a head with one far diagonal would lose just that. 0 log 0 is 0:
    there, a block that gets no weight makes the divergence NaN, and the head silently vertical-slash. The code's fixed 128 tokens a block
    are `block` here. Cost: one forward pass and a block map.
    """

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    least: int = 1
    texts: int = 1

    name: ClassVar[str] = "flexprefill"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(NAMES[0], "share of blocks", "many blocks are computed"),
        Metric(NAMES[1], "probability", "the chosen blocks hold the head's attention"),
        Metric(NAMES[2], "share of texts", "block means describe the head's last queries"),
        Metric(NAMES[3], "sqrt(nats)", "block means misjudge the head's last queries", (0.0, math.sqrt(math.log(2.0)))),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass and its block map"
    source: ClassVar[str] = "FlexPrefill, arXiv:2502.20766, ByteDance-Seed/FlexPrefill, and its port in microsoft/MInference"

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or not_readable(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        if not 0 < self.gamma <= 1 or self.tau < 0 or self.least < 1:
            raise refusal(ProbeError, f"{self!r}", "gamma is a share, tau is not negative, least counts blocks", "pass gamma=0.9, tau=0.1")
        return measure_blocks(self, scope, texts_of(scope, data, work, texts=self.texts), work, self.block, self._layer, NAMES)

    def _layer(self, call: AttentionCall) -> tuple[Tensor, list[Tensor]]:
        """The chosen blocks [H, n, n], and (query-aware, divergence) [H] each."""
        length = call.q.shape[2]
        count = -(-length // self.block)
        last = weight_rows(call, length - self.block, length)[0].cpu()  # [H, block, N]
        vertical, slash = last.mean(1), distances(last) / self.block
        q, k = call.q[0].float().cpu(), call.k[0].float().cpu()
        means = pooled(k, self.block).repeat_interleave(call.group, 0)
        estimate = torch.softmax((q[:, -self.block :].mean(1)[:, None] @ means.transpose(1, 2))[:, 0] * call.scale, -1)
        blocks = summed(vertical, self.block)
        divergence = root_divergence(estimate.double(), blocks.double() / blocks.double().sum(-1, keepdim=True))
        aware = divergence < self.tau
        columns = self._budget(vertical, aware, count)
        diagonals = self._budget(slash, aware, count)
        place = torch.arange(count)
        first = place == 0
        column = top(blocks, columns) | first
        diagonal = top(summed(slash, self.block), diagonals) | first
        behind = place[:, None] - place
        choice = column[:, None, :] | diagonal[:, behind.clamp_min(0)]
        for head in aware.nonzero().flatten().tolist():
            choice[head] |= self._query_aware(pooled(q[head], self.block), means[head], call.scale, behind >= 0)
        return choice & (behind >= 0), [aware.double(), divergence]

    def _budget(self, weights: Tensor, aware: Tensor, count: int) -> Tensor:
        """[H] how many blocks of columns (or diagonals) hold gamma of the weights [H, N]."""
        entries = cover(weights.double(), self.gamma).sum(-1)
        blocks = (entries // self.block + 1).clamp(self.least, count)
        return blocks.masked_fill(aware, self.least)

    def _query_aware(self, q: Tensor, k: Tensor, scale: float, causal: Tensor) -> Tensor:
        """[n, n] bool: the heaviest blocks of the map of block means that hold gamma of it."""
        weights = torch.softmax((q @ k.T * scale).masked_fill(~causal, -torch.inf), -1)
        return cover(weights.double().flatten(), self.gamma).view_as(causal)


def root_divergence(p: Tensor, q: Tensor) -> Tensor:
    """[...] square root of the Jensen-Shannon divergence of distributions [..., n], in nats."""
    middle = (p + q) / 2
    parts = [torch.special.xlogy(one, one) - torch.special.xlogy(one, middle) for one in (p, q)]
    return (0.5 * (parts[0] + parts[1]).sum(-1)).clamp_min(0.0).sqrt()

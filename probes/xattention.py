"""XAttention: how sparse a head may run when its blocks are chosen by sums along antidiagonals, and what that keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric
from headscope.probes.block_choice import cover, measure_blocks
from headscope.probes.calls import not_readable, texts_of

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

NAMES = ("xattention_density", "xattention_recall")


@dataclass(frozen=True)
class XAttention(ActiveProbe):
    """Density and recall of the blocks that XAttention would compute, per head.

    The matrix is cut into tiles of `stride` x `stride`. A tile's score is the sum of q . k along its antidiagonal, which every column and
    every diagonal of the tile crosses once, times the softmax scale and divided by the stride. A softmax over a row of tiles (causal by
    tile) and a sum over the tiles of each block give an estimate of its mass; in each row of blocks the first and the diagonal block are
    taken, then the heaviest others until `threshold` of the row's estimate is held.

    `xattention_density` is the share of the causal blocks chosen, `xattention_recall` the share of the exact attention mass in them. A head
    whose recall is far below the threshold is one that antidiagonals misjudge.

    Departures: q and k are not padded to a multiple of 2,048 with zeros, whose tiles the official code masks; a last, partial tile is left
    out of the estimate and its blocks are judged by the tiles that they have. The official `keep_sink` sets the first row of blocks instead
    of the first column and is not needed, since the first column is always kept. The threshold is one number for all heads; the paper's
    search of one per head by dynamic programming is not made. Cost: one forward pass, N^2 / stride^2 scores per head and a block map.
    """

    stride: int = 8
    threshold: float = 0.9
    block: int = 128
    texts: int = 1

    name: ClassVar[str] = "xattention"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(NAMES[0], "share of blocks", "many blocks are computed"),
        Metric(NAMES[1], "probability", "the chosen blocks hold the head's attention"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass and its block map"
    source: ClassVar[str] = "XAttention, arXiv:2503.16428, mit-han-lab/x-attention"

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or not_readable(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        if not 0 < self.threshold <= 1 or self.stride < 1 or self.block % self.stride:
            why = "the threshold is a share, and a block is made of whole tiles"
            raise refusal(ProbeError, f"{self!r}", why, "pass threshold=0.9, stride=8 or 16")
        return measure_blocks(self, scope, texts_of(scope, data, work, texts=self.texts), work, self.block, self._layer, NAMES)

    def _layer(self, call: AttentionCall) -> tuple[Tensor, list[Tensor]]:
        """The chosen blocks [H, n, n]."""
        count = -(-call.q.shape[2] // self.block)
        tiles = call.q.shape[2] // self.stride
        per_block = self.block // self.stride
        place = torch.arange(count)
        behind = place[:, None] - place
        forced = (behind == 0) | ((place == 0) & (behind >= 0))
        choice = []
        for head in range(call.q.shape[1]):
            q = call.q[0, head, : tiles * self.stride].float().view(tiles, self.stride, -1).flip(1).flatten(1)
            k = call.k[0, head // call.group, : tiles * self.stride].float().view(tiles, self.stride, -1).flatten(1)
            rows = []
            for start in range(0, tiles, per_block):
                stop = min(start + per_block, tiles)
                scores = q[start:stop] @ k[:stop].T * (call.scale / self.stride)
                hidden = torch.arange(start, stop, device=q.device)[:, None] < torch.arange(stop, device=q.device)
                weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).sum(0).cpu()
                padded = torch.nn.functional.pad(weights, (0, count * per_block - stop))
                rows.append(padded.view(count, per_block).sum(-1))
            rows += [torch.zeros(count)] * (count - len(rows))  # a last block shorter than a tile: its forced blocks alone
            choice.append(cover(torch.stack(rows).double(), self.threshold, forced))
        return torch.stack(choice) & (behind >= 0), []

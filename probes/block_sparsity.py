"""Block sparsity: how many blocks of its attention a head needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.base import Metric, Needs, Probe, by_layer
from headscope.probes.block_choice import cover, visible_blocks
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology

MASSES = ((0.9, "blocks_90"), (0.95, "blocks_95"), (0.99, "blocks_99"))
USUAL = 128
LONG = 131_072
"""Up to so many tokens a map's blocks are of 128 or less; otherwise the probe asks for blocks of its own, at the cost of a pass."""


@dataclass(frozen=True)
class BlockSparsity(Probe):
    """Share of the blocks of its attention that hold 90, 95 and 99 % of a head's weight.

    In every row of blocks (of `block` queries by `block` keys) the fewest blocks are taken, heaviest first, that hold the share of the
    row's mass; the number is all that were taken over all that the mask lets the row see. It is the density that a block-sparse kernel
    would need if it knew the weights, so no estimate can be sparser at the same mass. 2 / (n + 1) with n rows of
    blocks: each looks at one place; 1: at all of them.

    Departures: no paper defines this number; it is the oracle that block-sparse methods (MInference, XAttention, FlexPrefill) approach. It
    is made of the profile's block map, whose blocks are summed up to `block`. The first block of rows has one block only and needs it, so
    short texts of few blocks give large numbers: compare heads at one length. Cost: nothing beyond the map.
    """

    block: int = 128

    name: ClassVar[str] = "block_sparsity"
    metrics: ClassVar[tuple[Metric, ...]] = tuple(
        Metric(name, "share of blocks", f"the head spreads: many blocks are needed for {mass:.0%} of its weight") for mass, name in MASSES
    )
    data: ClassVar[TextKind] = "natural"
    source: ClassVar[str] = "headscope, after MInference, arXiv:2407.02490, and XAttention, arXiv:2503.16428"

    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        if self.block < 16 or self.block & (self.block - 1):
            raise refusal(ProbeError, f"block={self.block}", "a map's block is a power of two, 16 or more", "use 64 or 128")
        # a map in smaller blocks serves as well, so blocks of 128 ask for none of their own where every map is at least as fine
        return Needs(("block_mass",), {} if self.block >= USUAL and len(text) <= LONG else {"block": self.block})

    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        measured = stats.request.block
        if measured > self.block:
            raise refusal(
                ProbeError,
                f"a map in blocks of {measured}",
                f"{self.name} counts blocks of {self.block}",
                f"pass block={self.block} or less",
            )
        maps = stats["block_mass"]

        def share(mass: float, layer: int) -> Tensor:
            whole = coarser(maps[layer].double(), self.block // measured)
            module = stats.topology[layer]
            seen = visible_blocks(whole.shape[-1], self.block, module.window) if module.causal else torch.ones(whole.shape[-2:]).bool()
            return (cover(whole, mass).double().sum((-1, -2)) / seen.sum()).mean(0)

        return {name: by_layer(stats, partial(share, mass)) for mass, name in MASSES}


def coarser(maps: Tensor, factor: int) -> Tensor:
    """[..., n, m] maps with blocks `factor` times as large."""
    if factor == 1:
        return maps
    rows, columns = -maps.shape[-2] % factor, -maps.shape[-1] % factor
    padded = torch.nn.functional.pad(maps.nan_to_num(), (0, columns, 0, rows))
    return padded.unflatten(-1, (-1, factor)).sum(-1).unflatten(-2, (-1, factor)).sum(-2)

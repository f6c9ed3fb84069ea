"""HeldBlocks: tiles chosen once in a denoising run and kept to its end (SparseD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.patterns import Pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeldBlocks(Pattern):
    """Over the steps of a diffusion model: dense for the first `dense` of `steps` steps, and at the last of these the tiles of `block` keys
    that hold most of A are chosen, per row tile; later steps compute those and no others (SparseD, arXiv:2509.24014).

    Of n key tiles, int(n * share) + 1 are kept. Where a model attends to a prompt as well, `prompt` says how they are shared out: "share"
    keeps that part of the prompt's tiles and of those that are generated, each for itself, as the official code does; "all" keeps every
    tile of the prompt, and the rest of the same total, one at least, of those that are generated.
    `spread`: the dense steps lie evenly over the run, the first one among them, and tiles are chosen anew at each: they follow the picture,
    at the same cost (headscope's; the paper has all dense steps first, and the tiles of the last of them to the end).

    `carry`: the tiles that are left out go on giving what they gave when tiles were chosen. With d the weight that a row had outside its
    tiles and r what that weight brought, out = (1 - d) sparse + r. Costs no entries, and a row of the output's size to remember
    (headscope's; the paper leaves them out, as if they had no weight).

    Not causal: a row tile sees tiles on both sides. `kept` counts entries of the full square, averaged over the steps.
    """

    share: float
    steps: int
    dense: int
    block: int = 32
    prompt: Literal["share", "all"] = "share"
    spread: bool = False
    carry: bool = False
    kind = "held_blocks"
    static = False

    def check(self) -> None:
        self._whole(1, "steps", "block", "dense")
        if not 0 < self.share <= 1:
            raise refusal(PlanError, f"{self.kind} with share={self.share!r}", "it is a part of the tiles", "use 0 < share <= 1")
        if self.dense > self.steps:
            raise refusal(PlanError, f"{self.kind} with dense={self.dense}", f"a run has steps={self.steps}", "use dense <= steps")
        if self.prompt not in ("share", "all"):
            raise unknown_name(PlanError, "prompt", self.prompt, ("share", "all"))

    def dense_at(self, step: int) -> bool:
        """Whether every entry of this step, from 0, is computed."""
        return step in {number * self.steps // self.dense for number in range(self.dense)} if self.spread else step < self.dense

    def chooses_at(self, step: int) -> bool:
        """Whether tiles are chosen at the end of this step."""
        return self.dense_at(step) if self.spread else step == self.dense - 1

    def tiles(self, count: int) -> int:
        """How many of `count` tiles a row keeps."""
        return min(count, int(count * self.share + 1e-9) + 1)

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """PlanError: it depends on the input."""
        raise refusal(
            PlanError, f"the mask of {self}", "its tiles are chosen per input, while the model runs", "run it: scope.execute(plan)"
        )

    def density(self, length: int) -> float:
        """Kept share of all entries, averaged over the steps."""
        count = -(-length // self.block)
        return (self.dense + (self.steps - self.dense) * self.tiles(count) / count) / self.steps

    def kept(self, length: int) -> float:
        return self.density(length) * length * length

    def cached(self, length: int) -> float:
        return length

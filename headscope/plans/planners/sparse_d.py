"""SparseD: a diffusion model's heads choose tiles once, early in the denoising, and keep them to its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic_steps import HeldBlocks
from headscope.plans.patterns import Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, share, whole


@dataclass(frozen=True)
class SparseD(Planner):
    """All heads dense for the first `skip` of `steps` denoising steps; at the last of these each head chooses, per row tile, the `select`
    share of the key tiles that hold most of its attention, and computes those alone in the steps that remain.

    Tiles have `block` tokens; of n tiles int(n * select) + 1 are kept, of prompt and generated tokens apart in models that attend to both.
    With `density`, the largest `select` is taken whose average over all steps, the dense ones included, is within the bound; `length`
    counts the tokens of one picture.

    `prompt`, `spread`, `carry`: see `headscope.plans.HeldBlocks`; as they are by default, the method is the paper's. On the bundled picture
    model, of 68 tokens, it is dense steps that are spread and rests that are carried which keep its pictures as they were.

    Departures: attention weights are scaled as the model scales them; one of the official versions divides scores by the square root of the
    number of heads. The dense steps are the first ceil(steps * skip), where it counts two more.
    """

    steps: int = 32
    select: float | None = None
    skip: float = 0.2
    block: int = 128
    prompt: Literal["share", "all"] = "share"
    spread: bool = False
    carry: bool = False

    name: ClassVar[str] = "sparse-d"
    source: ClassVar[str] = "SparseD, arXiv:2509.24014, INV-WZQ/SparseD"
    dials: ClassVar[tuple[str, ...]] = ("select",)
    bounds: ClassVar[tuple[str, ...]] = ("density",)
    causal: ClassVar[bool] = False

    def check(self) -> None:
        whole(self.name, "steps", self.steps, 1)
        whole(self.name, "block", self.block, 1)
        share(self.name, "skip", self.skip)
        if self.select is not None:
            share(self.name, "select", self.select)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        scope = evidence.scope
        if scope is not None and any(module.causal for module in scope.topology.main):
            raise refusal(
                PlanError,
                f"planner {self.name!r} on {evidence.model.name}",
                "its attention is causal, and tiles are kept over denoising steps",
                "pass a diffusion model",
            )
        dense = math.ceil(self.steps * self.skip - 1e-9)
        rule = HeldBlocks(0.3 if self.select is None else self.select, self.steps, dense, self.block, self.prompt, self.spread, self.carry)
        if self.density is not None:
            count = -(-evidence.length // self.block)
            room = (self.density * self.steps - dense) / max(1, self.steps - dense) * count
            kept = int(room + 1e-9)
            if kept < 1:
                raise refusal(
                    PlanError,
                    f"density {self.density} with {dense} of {self.steps} steps dense",
                    f"not one of {count} tiles is left to the others",
                    "pass a larger density, a smaller skip or a smaller block",
                )
            rule = HeldBlocks(
                min(1.0, max(1e-9, (kept - 0.5) / count)), self.steps, dense, self.block, self.prompt, self.spread, self.carry
            )
        return dict.fromkeys(evidence.model.places, rule)

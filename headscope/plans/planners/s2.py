"""S2-Attention: heads share out the context between them, each with a window and every n-th block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.patterns import BLOCK, Dense, Pattern, Strided
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, whole


@dataclass(frozen=True)
class S2(Planner):
    """A window of `local` blocks, and of the blocks before it every `stride`-th; heads begin at different ones, so that together they see
    all.

    The i-th of the model's heads begins at block i mod stride. `per`: what is counted, "kv_head" (the default: heads that share keys take
    the same blocks, so that memory is saved too) or "head". `dense_layers`: layers that keep everything (the paper's hybrid models have
    two). With `density` or `cache`, the smallest stride that the bound allows.

    Nothing is measured: the method is made for models trained under it. Departures: in the official kernels the offset turns with the layer
    only if one asks for it; here heads are counted through all layers, so that a model with few key heads covers the text as well.
    """

    stride: int | None = None
    local: int = 1
    block: int = BLOCK
    sink: int = 0
    per: Literal["kv_head", "head"] = "kv_head"
    dense_layers: tuple[int, ...] = ()

    name: ClassVar[str] = "s2"
    source: ClassVar[str] = "S2-Attention, arXiv:2407.17678, linxihui/dkernel"
    dials: ClassVar[tuple[str, ...]] = ("stride",)

    def check(self) -> None:
        whole(self.name, "local", self.local, 1)
        whole(self.name, "block", self.block, 1)
        whole(self.name, "sink", self.sink)
        if self.stride is not None:
            whole(self.name, "stride", self.stride, 1)
        if self.per not in ("kv_head", "head"):
            raise unknown_name(PlanError, "per", self.per, ("kv_head", "head"))

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        for layer in self.dense_layers:
            if layer not in evidence.model.layers:
                raise refusal(PlanError, f"dense layer {layer}", f"the model has {evidence.model.layers}", "name its layers")
        evidence.note("this mask is meant for models that were trained under it")
        if not evidence.bounded:
            return self._patterns(evidence, 16 if self.stride is None else self.stride)
        most = -(-evidence.length // self.block)
        for stride in range(1, most + 1):
            found = self._patterns(evidence, stride)
            if evidence.fits(found):
                return found
        return found

    def _patterns(self, evidence: Evidence, stride: int) -> dict[Place, Pattern]:
        out: dict[Place, Pattern] = {}
        number = 0
        for group in evidence.groups:
            for place in evidence.members(*group):
                if place[0] in self.dense_layers:
                    out[place] = Dense()
                    continue
                out[place] = Strided(self.local * self.block, stride, number % stride, self.block, self.sink)
                number += self.per == "head"
            number += self.per == "kv_head" and group[0] not in self.dense_layers
        return out

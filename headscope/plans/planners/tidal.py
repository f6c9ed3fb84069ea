"""TidalDecode: a few layers choose keys when decoding, the layers after them take these over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic import TopKeys
from headscope.plans.patterns import Dense, Pattern
from headscope.plans.plan import Place, PlanModel
from headscope.plans.planners.base import Evidence, Planner, whole

START, DEPTH = 2 / 32, 13 / 32
"""Where the official code chooses and chooses again, as shares of its model's 32 layers."""


@dataclass(frozen=True)
class Tidal(Planner):
    """Decoding only: layers before `start` are dense; layer `start` sees every key and chooses, per head, the `keep` (256) keys of largest
    score for the layers after it; layer `correction` sees every key and chooses again for those after it.

    `start`, `correction`: counted along the main stack; None puts them at 2 and 13 of 32 layers, as the official code does, and -1 leaves
    the correction out.

    Head h takes over what head h of the choosing layer chose, so all layers need the same number of heads. The prefill is dense and every
    key stays in the cache, so a plan's density and its cache say nothing of what it saves: that is keys read per step.
    """

    keep: int | None = None
    start: int | None = None
    correction: int | None = None

    name: ClassVar[str] = "tidal"
    source: ClassVar[str] = "TidalDecode, arXiv:2410.05076, DerrickYLJ/TidalDecode"
    dials: ClassVar[tuple[str, ...]] = ("keep",)
    bounds: ClassVar[tuple[str, ...]] = ()

    @property
    def kept(self) -> int:
        """Keys of a choice."""
        return 256 if self.keep is None else self.keep

    def check(self) -> None:
        whole(self.name, "keep", self.kept, 1)
        if self.start is not None:
            whole(self.name, "start", self.start)
        if self.correction is not None and self.correction != -1:
            whole(self.name, "correction", self.correction, (self.start or 0) + 1)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        layers = evidence.model.layers
        start = round(START * len(layers)) if self.start is None else self.start
        again = max(start + 1, round(DEPTH * len(layers))) if self.correction is None else self.correction
        for at, given in ((start, self.start), (again, self.correction)):
            if given not in (None, -1) and at >= len(layers):
                raise refusal(PlanError, f"layer {at} as a chooser", f"{evidence.model.name} has {len(layers)}", "name an earlier one")
        choosers = [start] if self.correction == -1 or again >= len(layers) else [start, again]
        evidence.note("decoding only: the prefill is dense, and no key leaves the cache")
        return taken_over(evidence.model, self.kept, choosers)


def taken_over(model: PlanModel, keep: int, choosers: list[int]) -> dict[Place, Pattern]:
    """Layers before the first of `choosers` (places in the stack, ascending) dense, choosers full, the others with the keys of the chooser
    before them. PlanError where layers differ in their number of heads.
    """
    if len(set(model.heads)) > 1:
        raise refusal(
            PlanError,
            f"{model.name}, with layers of {min(model.heads)} to {max(model.heads)} heads",
            "each head takes over the keys of the head with its number",
            "use a planner that chooses per head",
        )
    out: dict[Place, Pattern] = {}
    for at, layer in enumerate(model.layers):
        before = [model.layers[one] for one in choosers if one < at]
        for head in range(model.heads[at]):
            if at in choosers:
                out[layer, head] = TopKeys(keep, sink=0, window=1, full=True)
            else:
                out[layer, head] = TopKeys(keep, sink=0, window=1, source=(before[-1], head)) if before else Dense()
    return out

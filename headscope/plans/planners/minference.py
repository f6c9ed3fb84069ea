"""MInference: each head gets the family of pattern that keeps most of its attention, with the sizes that it won with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic import TopBlocks, VerticalSlash
from headscope.plans.patterns import Pattern, Streaming
from headscope.plans.plan import Place, SparsePlan
from headscope.plans.planners.base import Evidence, Planner, Requires, whole

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 64.0
"""Sizes that are so many times those of the search keep everything."""
SINK, WINDOW = 30, 100
"""First columns and nearest diagonals that the paper's kernel always keeps."""


@dataclass(frozen=True)
class MInference(Planner):
    """The winner of MInference's offline search per head: A-shape, vertical-slash or block-sparse, with its sizes.

    The search (probe "minference") names sizes for the text that it ran on; they grow in proportion to `length`. Vertical-slash heads
    choose columns and diagonals per input from the last `last_q` rows; block-sparse ones tiles of `block` tokens by mean query . mean
    key, as many as the search's candidate kept. Both act in the prefill. `scale` multiplies every size; with `density` instead, the largest
    scale within the bound is found.

    Departures: the official search renames A-shape and block-sparse winners to vertical-slash before it saves them; here a head runs what
    it won with. The forced 30 columns and 100 diagonals are the paper's for 30,000 tokens and shrink with the length on shorter texts, as
    the candidates do. A-shape heads stream when decoding too, where the official code decodes dense.
    """

    scale: float | None = None
    last_q: int = 64
    block: int = 64

    name: ClassVar[str] = "minference"
    source: ClassVar[str] = "MInference, arXiv:2407.02490, microsoft/MInference"
    requires: ClassVar[Requires] = Requires(metrics=(("minference_pattern",),), tables=("minference.search",))
    dials: ClassVar[tuple[str, ...]] = ("scale",)
    bounds: ClassVar[tuple[str, ...]] = ("density",)

    def check(self) -> None:
        whole(self.name, "last_q", self.last_q, 1)
        whole(self.name, "block", self.block, 1)
        if self.scale is not None and not 0 < self.scale <= LARGEST:
            raise refusal(PlanError, f"scale={self.scale!r}", "it multiplies every size", f"use 0 < scale <= {LARGEST:g}")

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        won = evidence.table("minference.search")
        won = won[won["won"]]
        rows = {(int(row.layer), int(row.head)): row for row in won.itertuples()}
        missing = [place for place in evidence.model.places if place not in rows]
        if missing:
            raise refusal(
                PlanError, f"head {missing[0][0]}.{missing[0][1]}", "the search has no winner for it", "run the probe minference again"
            )
        tokens = self._tokens(evidence, won)
        if self.density is None:
            return self._at(evidence, rows, tokens, self.scale or 1.0)
        low, high = 0.0, LARGEST
        if SparsePlan(evidence.model, self._at(evidence, rows, tokens, high)).density(evidence.length) <= self.density:
            return self._at(evidence, rows, tokens, high)
        for _ in range(32):
            middle = (low + high) / 2
            kept = SparsePlan(evidence.model, self._at(evidence, rows, tokens, middle)).density(evidence.length)
            low, high = (middle, high) if kept <= self.density else (low, middle)
        evidence.note(f"sizes are {low:.4f} times those that won the search, to meet density {self.density}")
        return self._at(evidence, rows, tokens, low)

    def _tokens(self, evidence: Evidence, won: pd.DataFrame) -> int:
        """Tokens of the text that the search ran on."""
        assert evidence.profile is not None
        listed = [int(row["tokens"]) for row in evidence.profile.card.data if row.get("kind") == "natural"]
        return max(listed) if listed else evidence.length

    def _at(self, evidence: Evidence, rows: Mapping[Place, Any], tokens: int, scale: float) -> dict[Place, Pattern]:
        return {place: self._pattern(row, evidence.length, tokens, scale) for place, row in rows.items()}

    def _pattern(self, row: Any, length: int, tokens: int, scale: float) -> Pattern:
        from headscope.probes.minference import scaled

        def size(value: int) -> int:
            return min(length, max(1, round(value * length / tokens * scale)))

        if row.pattern == "a_shape":
            return Streaming(size(row.columns), size(row.diagonals))
        if row.pattern == "vertical_slash":
            columns, diagonals = size(row.columns), size(row.diagonals)
            sink, window = (scaled(one, length) for one in (SINK, WINDOW))
            return VerticalSlash(columns, diagonals, self.last_q, min(sink, columns), min(window, diagonals))
        return TopBlocks(share=min(1.0, max(1e-6, float(row.kept) * scale)), rule="pooled", block=self.block)

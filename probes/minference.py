"""MInference's pattern search: A-shape, vertical-slash or block-sparse, per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.block_choice import distances, pooled, top
from headscope.probes.calls import each_call, long_enough, normalised, not_readable, row_chunks, score_rows, texts_of, weighed, weight_rows

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.text import ProbeText
    from headscope.scope import Scope

Family = Literal["a_shape", "vertical_slash", "block_sparse"]
FAMILIES: tuple[Family, ...] = ("a_shape", "vertical_slash", "block_sparse")
LAST_ROWS = 64
"""Query rows that columns and diagonals are chosen from."""
FORCED = 30
"""First columns and nearest diagonals that are always kept, in tokens of a text of REFERENCE tokens."""
POOL = 32
"""Side of a block of the block-sparse pattern."""
OFFSET = 2500
"""First row that is judged, in tokens of a text of REFERENCE tokens."""
REFERENCE = 30_000
"""Length of the text that the paper's sizes were made for; shorter texts get sizes in proportion."""
DEVIATION = 5e-3
"""An output that differs by more counts as deviating."""


@dataclass(frozen=True)
class MInference(ActiveProbe):
    """Which of three sparse patterns keeps most of a head's attention: 0 A-shape, 1 vertical-slash, 2 block-sparse.

    A-shape keeps the first `columns` keys and the nearest `diagonals` distances. Vertical-slash keeps the columns and the diagonals with
    the largest sums over the last 64 rows. Block-sparse keeps, in every row of blocks of 32, the eighth of the blocks with the largest
    product of mean query and mean key. `scoring` "mass": the mean, over rows from an offset on, of the attention weight kept; the largest
    wins. "outputs": how many output numbers of those rows differ by more than .005 from the full output; the fewest win. Sizes are the
    paper's for a text of 30,000 tokens, (100, 800) for A-shape and (30, 800), (100, 750), (500, 700), (3500, 100) for vertical-slash, and
    shrink in proportion on shorter ones, as do the offset of 2,500 rows and the 30 columns and diagonals that are always kept.

    `minference_pattern` is the winner's number; the other three metrics are the most mass that each family kept. The table `search` has
    every candidate: family, columns, diagonals, kept mass, deviating outputs (with "outputs"), share of the causal entries kept. Candidates
    are not equal in cost, which is why the share stands beside the score.

    Departures: the official search renames its winners before it saves them (A-shape to vertical-slash, block-sparse to vertical-slash with
    (1000, 6096)); here the pattern is what won. Ties within `tie` go to the family named first and then to the smaller candidate, since a
    wider mask scores no less by construction. The second scoring runs the same candidates as the first, exactly, instead of the kernels.

    Cost: one forward pass, all rows of A once, and each candidate's mask on them; "outputs" adds each candidate's output.
    """

    scoring: Literal["mass", "outputs"] = "mass"
    a_shape: tuple[tuple[int, int], ...] = ((100, 800),)
    vertical_slash: tuple[tuple[int, int], ...] = ((30, 800), (100, 750), (500, 700), (3500, 100))
    ratio: int = 8
    tie: float = 1e-3

    name: ClassVar[str] = "minference"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("minference_pattern", "0 A-shape, 1 vertical-slash, 2 block-sparse", "the pattern that won", (0.0, 2.0)),
        *(Metric(f"{family}_mass", "probability", f"{family.replace('_', '-')} keeps the head's attention") for family in FAMILIES),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass and N^2 work per head and candidate"
    source: ClassVar[str] = "MInference, arXiv:2407.02490, microsoft/MInference"

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or not_readable(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        if self.scoring not in ("mass", "outputs"):
            raise unknown_name(ProbeError, "scoring", self.scoring, ("mass", "outputs"))
        if not (self.a_shape and self.vertical_slash) or self.ratio < 1 or self.tie < 0:
            raise refusal(ProbeError, f"{self!r}", "each family needs a candidate", "pass (columns, diagonals) pairs, ratio >= 1, tie >= 0")
        (text, *more) = texts_of(scope, data, work)
        if more:
            raise refusal(ProbeError, f"{1 + len(more)} texts", "the search runs on one", "pass one text")
        long_enough(self.name, text, 4 * LAST_ROWS, f"it judges {LAST_ROWS} rows and blocks of {POOL}")
        found = work.unit("search", lambda: self._search(scope, text))
        mass, density, outputs = found["mass"], found["density"], found["outputs"]
        candidates = [Candidate.of(*one) for one in found["candidates"]]
        chosen = self._choose(candidates, mass, density, outputs)
        scores = {"minference_pattern": torch.full(mass.shape[1:], torch.nan, dtype=torch.float64)}
        known = mass[0].isfinite()
        families = torch.tensor([FAMILIES.index(one.family) for one in candidates])
        scores["minference_pattern"][known] = families[chosen[known]].double()
        for number, family in enumerate(FAMILIES):
            scores[f"{family}_mass"] = mass[families == number].amax(0)
        facts = {"name": text.name, "kind": text.kind, "sha256": text.sha256, "sequences": 1, "tokens": len(text)}
        table = search_table(scope, candidates, mass, density, outputs if self.scoring == "outputs" else None, chosen)
        shares = {
            f"minference_{family}": float((scores["minference_pattern"] == n).sum()) / int(known.sum()) for n, family in enumerate(FAMILIES)
        }
        return Findings(scores, shares, [facts], {"search": table})

    def candidates(self, length: int) -> list[Candidate]:
        """The candidates for a text of `length` tokens, simplest family first."""
        out = [Candidate("a_shape", scaled(c, length), scaled(d, length)) for c, d in self.a_shape]
        out += [Candidate("vertical_slash", scaled(c, length), scaled(d, length)) for c, d in self.vertical_slash]
        return [*dict.fromkeys(out), Candidate("block_sparse", 0, 0)]

    def _search(self, scope: Scope, text: ProbeText) -> dict[str, Any]:
        """Kept mass, share of entries kept and deviating outputs, [candidates, L, H] each."""
        candidates = self.candidates(len(text))
        first = round(OFFSET * min(len(text) / REFERENCE, 1.0))
        found: dict[str, Tensor] = {}

        def see(call: AttentionCall, output: Tensor) -> None:
            masks = [one.mask(call, self.ratio) for one in candidates]
            found[call.module] = judge(call, masks, first, outputs=self.scoring == "outputs")

        each_call(scope, text.ids, see)
        layers = [found[module.name] for module in scope.topology.main]
        names = ("mass", "density", "outputs")
        parts = {
            name: torch.stack([stack(one[place, c] for one in layers) for c in range(len(candidates))]) for place, name in enumerate(names)
        }
        return {**parts, "candidates": [[one.family, one.columns, one.diagonals] for one in candidates]}

    def _choose(self, candidates: list[Candidate], mass: Tensor, density: Tensor, outputs: Tensor) -> Tensor:
        """[L, H] the number of the winner."""
        tied = outputs <= outputs.amin(0) * (1 + self.tie) if self.scoring == "outputs" else mass >= mass.amax(0) - self.tie
        family = torch.tensor([FAMILIES.index(one.family) for one in candidates])[:, None, None]
        return (family + density).masked_fill(~tied, torch.inf).argmin(0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pattern with its sizes, in tokens of the text at hand."""

    family: Family
    columns: int
    diagonals: int

    @classmethod
    def of(cls, family: Any, columns: Any, diagonals: Any) -> Candidate:
        """From plain data."""
        return cls(family, int(columns), int(diagonals))

    def mask(self, call: AttentionCall, ratio: int) -> Mask:
        """What it keeps in this call."""
        length, heads = call.q.shape[2], call.q.shape[1]
        place = torch.arange(length, device=call.q.device)
        if self.family == "a_shape":
            return Mask((place < self.columns)[None], (place < self.diagonals)[None])
        if self.family == "block_sparse":
            return Mask(blocks=heaviest_blocks(call, ratio))
        rows = weight_rows(call, length - LAST_ROWS, length)[0]
        always = place < scaled(FORCED, length)
        parts = ((rows.sum(1), self.columns), (distances(rows.cpu()).to(rows.device), self.diagonals))
        kept = [top(sums.masked_fill(always, torch.inf).cpu(), torch.full((heads,), size)).to(rows.device) for sums, size in parts]
        return Mask(*kept)


@dataclass(frozen=True, eq=False)
class Mask:
    """What a pattern keeps: `columns` [H or 1, N] and `diagonals` [H or 1, N] by distance t - s, or `blocks` [H, n, n] of POOL."""

    columns: Tensor | None = None
    diagonals: Tensor | None = None
    blocks: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """[H or 1, rows, stop] bool: what rows start..stop keep of the keys before stop, causality aside."""
        if self.blocks is not None:
            at = torch.arange(start, stop, device=self.blocks.device) // POOL
            return self.blocks[:, at].repeat_interleave(POOL, -1)[..., :stop]
        assert self.columns is not None
        assert self.diagonals is not None
        # by key instead of by distance: row t reads the reversed distances from stop - 1 - t on
        near = torch.nn.functional.pad(self.diagonals[:, :stop].flip(-1), (0, stop - start))
        return self.columns[:, None, :stop] | near.unfold(-1, stop, 1)[:, : stop - start].flip(1)


def heaviest_blocks(call: AttentionCall, ratio: int) -> Tensor:
    """[H, n, n] bool: in each row of blocks, 1 / ratio of all n (at least one) by mean query . mean key, causal ones only."""
    q, k = pooled(call.q[0].float(), POOL), pooled(call.k[0].float(), POOL).repeat_interleave(call.group, 0)
    scores = q @ k.transpose(1, 2)
    count = scores.shape[-1]
    place = torch.arange(count, device=scores.device)
    causal = place[:, None] >= place
    flat = scores.masked_fill(~causal, -torch.inf).flatten(0, 1).cpu()
    chosen = top(flat, torch.full((len(flat),), max(count // ratio, 1)))
    return chosen.view_as(scores).to(scores.device) & causal


def scaled(size: int, length: int) -> int:
    """A size of the paper on a text of `length` tokens: in proportion below REFERENCE, at least 1, never more than the text."""
    return min(max(round(size * min(length / REFERENCE, 1.0)), 1), length)


@torch.no_grad()
def judge(call: AttentionCall, masks: list[Mask], first: int, *, outputs: bool) -> Tensor:
    """[3, masks, H] float64: mean mass kept on rows from `first` on, share of all visible entries kept, deviating outputs (or 0)."""
    length, heads = call.q.shape[2], call.q.shape[1]
    found = torch.zeros(3, len(masks), heads, dtype=torch.float64)
    seen_entries = torch.zeros((), dtype=torch.float64)
    for start, stop in row_chunks(length):
        seen = torch.arange(stop, device=call.q.device)
        weights = normalised(call, score_rows(call, start, stop, seen))[0]
        judged = slice(max(first - start, 0), None)
        causal = seen[start:, None] >= seen
        seen_entries += float(causal.sum())
        total = weights.sum(-1)
        full = weighed(call, weights[None], seen)[0] if outputs and stop > first else None
        for number, mask in enumerate(masks):
            taken = mask.rows(start, stop) & causal
            found[1, number] += taken.sum((-1, -2)).double().cpu()
            if stop <= first:
                continue
            kept = weights * taken
            mass = kept.sum(-1)
            found[0, number] += mass[:, judged].double().sum(-1).cpu()
            if full is not None:
                # a sink logit keeps its part of the row, as a kernel would have it
                sparse = weighed(call, kept[None], seen)[0] / (mass + (1 - total).clamp_min(0)).clamp_min(1e-30)[..., None]
                found[2, number] += ((full - sparse).abs() > DEVIATION)[:, judged].sum((-1, -2)).double().cpu()
    found[0] /= length - first
    found[1] /= seen_entries
    return found


def search_table(
    scope: Scope, candidates: list[Candidate], mass: Tensor, density: Tensor, outputs: Tensor | None, chosen: Tensor
) -> pd.DataFrame:
    """One row per head and candidate."""
    rows = []
    for place, module in enumerate(scope.topology.main):
        for head in range(module.heads):
            for number, one in enumerate(candidates):
                at = (number, place, head)
                row: dict[str, Any] = {
                    "layer": module.layer,
                    "head": head,
                    "pattern": one.family,
                    "columns": one.columns,
                    "diagonals": one.diagonals,
                }
                row |= {"mass": float(mass[at]), "kept": float(density[at])}
                if outputs is not None:
                    row["deviating"] = float(outputs[at])
                rows.append({**row, "won": bool(int(chosen[place, head]) == number)})
    return pd.DataFrame(rows)

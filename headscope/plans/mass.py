"""Kept attention mass: how much of each head's attention a plan leaves standing, from what was measured.

Three grounds, named in the result, since the same number means less and less from one to the next:

exact         q and k are there (a live model, or a run that kept them): a row keeps exp(lse of the kept keys - lse of all keys).
maps          a block map: cells that the pattern keeps whole count, cells that it cuts are shared out evenly, and `lower` and `upper` say
              how wrong that can be. Column sums, where kept, place the first keys exactly: an even share of the first cell would lose the
              sink, which is most of many heads.
extrapolated  texts longer than any measured: rows past the end are taken to keep what the last quarter of the measured rows keeps.

Mass is over the text's rows from `first` on, sum of kept weights by sum of all weights, so rows count alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from headscope.errors import PlanError, refusal
from headscope.plans.patterns import Dense, Pattern, Streaming

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.plan import SparsePlan
    from headscope.profile import HeadProfile
    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics

Basis = Literal["exact", "maps", "extrapolated"]
LONGEST = 16_384
"""Tokens up to which the cells of any pattern are counted; sink and window are counted at any length."""


@dataclass(frozen=True, eq=False)
class KeptMass:
    """`value`, `lower`, `upper` [L, H] float64 share of the attention kept, NaN where a layer has fewer heads; `basis`; `length` tokens the
    number is for, `tokens` of the text it was read from.
    """

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    basis: Basis
    length: int
    tokens: int

    @property
    def mean(self) -> float:
        """Mean over the heads."""
        return float(np.nanmean(self.value))

    @property
    def least(self) -> float:
        """Of the head that keeps least."""
        return float(np.nanmin(self.value))

    def __repr__(self) -> str:
        return f"KeptMass(mean {self.mean:.4f}, least {self.least:.4f}, {self.basis}, {self.length:,} tokens)"


def kept_mass(
    plan: SparsePlan, source: Scope | HeadProfile | HeadStatistics, length: int | None = None, data: Any = None, *, exact: bool = False
) -> KeptMass:
    """Kept mass of every head of `plan` at `length` tokens (None: the length of the text that was measured).

    `source`: a live Scope (exact; `data`: a text or ids [N], None for bundled prose), a HeadProfile (its block maps; where q and k of
    every layer were kept, with `exact`, without maps or for rules that choose keys per input, those, which costs an attention of every
    head), or HeadStatistics with block_mass. PlanError where there is neither, and for a plan of another shape.
    """
    from headscope.profile.head_profile import HeadProfile
    from headscope.scope import Scope

    if isinstance(source, Scope):
        plan.check(source, force=True)
        return _live(plan, source, length, data)
    if isinstance(source, HeadProfile):
        from headscope.plans.plan import PlanModel

        if PlanModel.of(source).places != plan.model.places:
            raise refusal(PlanError, f"a run of {source.card.model['name']}", f"{plan._shape()}", "pass a run of the plan's model")
        if (exact or plan.dynamic or source.maps is None) and set(plan.model.layers) <= set(source.kept_layers):
            return _from_kept(plan, source, length)
        if exact:
            raise refusal(PlanError, "exact kept mass", "this run did not keep q and k of every layer", "profile with --keep all")
        return _from_profile(plan, source, length)
    return _from_statistics(plan, source, length)


# ---- exact ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_rows(call: AttentionCall, patterns: Sequence[Pattern]) -> tuple[Tensor, Tensor]:
    """(kept, all) [B, Hq, Nq] float64: per row the weight on kept keys and on all keys. Rules that choose per input choose here; those
    that act in decoding only are read at the last row, and the rows before are kept whole.
    """
    from headscope.kernels.sparse_blocked import blocked_sparse_attention
    from headscope.plans.indices import Chosen, choose, element

    batch, heads, rows, _ = call.q.shape
    values = call.k[..., :1]
    plain = replace(call, sink_logits=None, v=values)
    _, whole = blocked_sparse_attention(plain, [Dense()] * heads)
    kept = torch.empty_like(whole)
    for b in range(batch):
        one = element(plain, b)
        chosen = [choose(one, head, _uncompensated(pattern)) for head, pattern in enumerate(patterns)]
        last = [isinstance(pattern, Chosen) for pattern in chosen]
        _, kept[b : b + 1] = blocked_sparse_attention(one, [Dense() if cut else p for p, cut in zip(chosen, last, strict=True)])
        if any(last):
            start = max(0, rows - 1)
            end = replace(one, q=one.q[:, :, start:], query_offset=one.query_offset + start, mask=_last_mask(one, start))
            _, decode = blocked_sparse_attention(end, chosen)
            for head in (at for at, cut in enumerate(last) if cut):
                kept[b, head, start:] = decode[0, head]
    total = whole.double()
    if call.sink_logits is not None:
        total = torch.logaddexp(total, call.sink_logits.to(total)[None, :, None])
    found = [torch.exp(part.double() - total).nan_to_num(nan=0.0).cpu() for part in (kept, whole)]
    return found[0], found[1]


def _last_mask(call: AttentionCall, start: int) -> Any:
    mask = call.mask
    cut = {name: getattr(mask, name)[:, start:] for name in ("query_valid", "query_segments") if getattr(mask, name) is not None}
    cut |= {name: getattr(mask, name)[:, :, start:] for name in ("allowed", "bias") if getattr(mask, name) is not None}
    return replace(mask, **cut)


def _uncompensated(pattern: Pattern) -> Pattern:
    return replace(pattern, compensate=False) if isinstance(pattern, Streaming) else pattern


def _live(plan: SparsePlan, scope: Scope, length: int | None, data: Any) -> KeptMass:
    from headscope.probes.calls import each_call

    if isinstance(data, str) or data is None:
        limit = scope.max_length or 2048
        ids = scope.encode(data)[0].cpu() if data is not None else _prose(scope, min(length or 2048, limit))
    else:
        ids = torch.as_tensor(data).cpu().flatten()
    ids = ids if length is None else ids[:length]
    if length is not None and len(ids) < length:
        raise refusal(PlanError, f"length={length}", f"the text has {len(ids)} tokens", "pass a longer text")
    shares: dict[int, np.ndarray] = {}

    def see(call: AttentionCall, output: Tensor) -> None:
        if call.layer in plan.model.layers:
            kept, whole = exact_rows(call, plan.layer(int(call.layer or 0)))
            shares[int(call.layer or 0)] = (kept.sum((0, 2)) / whole.sum((0, 2))).numpy()

    each_call(scope, ids, see)
    return _exact(plan, shares, len(ids))


def _prose(scope: Scope, tokens: int) -> Tensor:
    """Bundled prose, or for a model without a tokenizer random tokens four times over."""
    from headscope.data import natural_texts
    from headscope.probes.text import REPEATS, block_for, natural_probe_text, repeated_random

    if scope.tokenizer is None:
        return repeated_random(scope, block=block_for(tokens, int(scope.vocabulary or 0), REPEATS), seed=0).ids
    return natural_probe_text(natural_texts(scope.tokenizer, tokens, texts=1)[0], scope.tokenizer).ids


def _from_kept(plan: SparsePlan, profile: HeadProfile, length: int | None) -> KeptMass:
    from headscope.store.kept import window_call

    assert profile._content is not None
    tokens = len(profile._content.tokens or ())
    size = tokens if length is None else length
    if size > tokens:
        return _from_profile(plan, profile, length)
    shares: dict[int, np.ndarray] = {}
    for layer in plan.model.layers:
        kept = profile._content.kept_layer(layer)
        found = []
        for head, pattern in enumerate(plan.layer(layer)):
            call = window_call(kept, head, kept.first, size, 0, size)
            sinks = kept.facts.sink_logits
            call = call if sinks is None else replace(call, sink_logits=torch.tensor([sinks[head]]))
            part, whole = exact_rows(call, [pattern])
            found.append(float(part.sum() / whole.sum()))
        shares[layer] = np.array(found)
    return _exact(plan, shares, size)


def _exact(plan: SparsePlan, shares: Mapping[int, np.ndarray], length: int) -> KeptMass:
    value = np.full((len(plan.model.layers), max(plan.model.heads)), np.nan)
    for at, layer in enumerate(plan.model.layers):
        value[at, : plan.model.heads[at]] = shares[layer]
    return KeptMass(value, value, value, "exact", length, length)


# ---- from maps ------------------------------------------------------------------------------------------------------


def _from_profile(plan: SparsePlan, profile: HeadProfile, length: int | None) -> KeptMass:
    info = profile.maps
    if info is None or "block_mass" not in info.planes:
        where = profile.card.model.get("source") or profile.card.model["name"]
        raise refusal(
            PlanError,
            "the kept mass of a run without block maps",
            "it is read from them",
            f"measure them: headscope profile {where} --out RUN",
        )
    columns = "column/column_sum" in profile.statistics

    def head(layer: int, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        one = profile.map("block_mass", layer, number)
        return one, profile.statistic("column/column_sum", layer, number) if columns else None

    return _maps(plan, head, info.block, info.tokens, length)


def _from_statistics(plan: SparsePlan, stats: HeadStatistics, length: int | None) -> KeptMass:
    names = set(getattr(stats, "names", ()))
    if "block_mass" not in names:
        raise refusal(
            PlanError, "statistics without block_mass", "kept mass is read from it", "capture with statistics=['block_mass', ...]"
        )
    if not bool(stats.valid.all()):
        raise refusal(PlanError, "statistics of padded texts", "their maps do not lie on one another", "capture one text at a time")

    def head(layer: int, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        one = stats["block_mass"][layer][:, number].double().sum(0).numpy()
        return one, stats["column_sum"][layer][:, number].double().sum(0).numpy() if "column_sum" in names else None

    return _maps(plan, head, stats.request.block, stats.valid.shape[1], length)


def _maps(plan: SparsePlan, head: Any, block: int, tokens: int, length: int | None) -> KeptMass:
    """Kept mass from maps [n, n] of sums over cells of `block` tokens and (or None) column sums [N] of the text of `tokens`."""
    size = tokens if length is None else length
    rows = min(size, tokens)
    cells: dict[Pattern, Cells] = {}
    shape = (len(plan.model.layers), max(plan.model.heads))
    found = np.full((3, *shape), np.nan)
    for (layer, number), pattern in plan.patterns.items():
        if not pattern.static:
            raise refusal(
                PlanError,
                f"{pattern.kind} of head {layer}.{number}",
                "its keys are chosen per input, so no map says what it keeps",
                "pass a live scope, or a run that kept q and k of every layer (--keep all)",
            )
        fixed = pattern.fixed(size)
        if fixed not in cells:
            cells[fixed] = count_cells(fixed, rows, block)
        mass, columns = head(layer, number)
        found[:, plan.model.layers.index(layer), number] = cells[fixed].of(mass, columns, size)
    basis: Basis = "maps" if size <= tokens else "extrapolated"
    return KeptMass(found[0], found[1], found[2], basis, size, tokens)


@dataclass(frozen=True, eq=False)
class Cells:
    """Of one pattern on a map: `part` [n, n] float64 share of each cell's causal entries that is kept; `near` the same without the sink
    (equal to `part` where the pattern has none); `sink` keys; `rows` tokens; `block` tokens a side.
    """

    part: np.ndarray
    near: np.ndarray
    sink: int
    rows: int
    block: int

    def of(self, mass: np.ndarray, columns: np.ndarray | None, length: int) -> tuple[float, float, float]:
        """(value, lower, upper) of the kept share of a map [n, n]; `columns` [N] column sums of the whole text, or None."""
        n = len(self.part)
        mass = np.tril(np.asarray(mass, dtype=np.float64)[:n, :n])
        inside = 0 < self.sink <= self.block and columns is not None
        first = float(columns[: self.block].sum()) if columns is not None else 0.0
        share = float(columns[: self.sink].sum()) / first if inside and columns is not None and first > 0 else 0.0
        part = self.part.copy()
        if inside:
            part[:, 0] = self.near[:, 0] + (1 - self.near[:, 0]) * share
        value, lower, upper = mass * part, mass * (self.part >= 1), mass * (self.part > 0)
        whole = mass.sum(1)
        if whole.sum() <= 0:
            return math.nan, math.nan, math.nan
        if length > self.rows:  # rows past the end keep what the last quarter does
            more = (length - self.rows) / self.rows
            last = slice(n - max(1, n // 4), n)
            tail = value[last].sum() / max(whole[last].sum(), 1e-300)
            total = whole.sum()
            return (value.sum() + more * total * tail) / (total * (1 + more)), lower.sum() / (total * (1 + more)), 1.0
        low, high = lower.sum(), upper.sum()
        if inside and columns is not None and len(columns) == self.rows:  # the sink's own mass is known to the last digit
            exact = float(columns[: self.sink].sum())
            full = float((mass[:, 0] * (self.near[:, 0] >= 1)).sum())
            touched = float((mass[:, 0] * (self.near[:, 0] > 0)).sum())
            low += max(exact, full) - lower[:, 0].sum()
            high += min(upper[:, 0].sum(), exact + touched) - upper[:, 0].sum()
        total = whole.sum()
        low, high = min(low / total, 1.0), min(high / total, 1.0)
        return float(np.clip(value.sum() / total, low, high)), low, high


def count_cells(pattern: Pattern, rows: int, block: int) -> Cells:
    """Which share of each cell's causal entries a static pattern keeps. PlanError for patterns too long to be counted entry by entry."""
    n = -(-rows // block)
    keys = np.arange(n) * block
    ends = np.minimum(keys + block, rows)
    part, near, whole = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n))
    if not isinstance(pattern, Streaming | Dense) and rows > LONGEST:
        raise refusal(PlanError, f"{pattern.kind} at {rows:,} tokens", f"its cells are counted up to {LONGEST:,}", "pass a smaller length")
    for tile in range(n):
        t = np.arange(keys[tile], ends[tile])[:, None]
        causal = np.clip(np.minimum(ends, t + 1) - keys, 0, None)
        whole[tile] = causal.sum(0)
        if isinstance(pattern, Streaming):
            begin = np.maximum(t - pattern.window + 1, 0)
            window = np.clip(np.minimum(ends, t + 1) - np.maximum(keys, begin), 0, None)
            outside = np.clip(np.minimum(np.minimum(ends, pattern.sink), begin) - keys, 0, None)
            near[tile] = window.sum(0)
            part[tile] = (window + outside).sum(0)
        elif isinstance(pattern, Dense):
            part[tile] = near[tile] = whole[tile]
        else:
            seen = pattern.visible(torch.from_numpy(t[:, 0]), torch.arange(int(ends[tile]))).numpy()
            seen = seen & (np.arange(int(ends[tile])) <= t)
            padded = np.pad(seen, ((0, 0), (0, n * block - seen.shape[1])))
            part[tile] = near[tile] = padded.reshape(len(t), n, block).sum((0, 2))
    safe = np.maximum(whole, 1)
    sink = pattern.sink if isinstance(pattern, Streaming) else 0
    return Cells(part / safe, near / safe, sink, rows, block)

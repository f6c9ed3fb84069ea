"""PatchHeads: put values of another run (or any values) in place of a head's output, query, key or value.

At z, q the head is a query head. k and v belong to a key head that a whole group of query heads reads, so an edit for one of them alone
does not exist: the group must be named whole. Keys and values are patched as attention sees them; a cache keeps the model's own, and the
patch is made again at every decode step that reads them.

Values that equal the run's own leave every bit as it was, so a patch can be checked by patching a run with itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import register, resolve
from headscope.interventions.head_edit import HeadEdit, Site, merged
from headscope.interventions.head_values import check_values, values_at
from headscope.interventions.record import SITES, HeadRecord
from headscope.interventions.values import Values
from headscope.interventions.where import at_positions

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

PatchSite = Literal["z", "q", "k", "v"]


@register("patch_heads")
@dataclass(frozen=True)
class PatchHeads(HeadEdit):
    """Replace heads' activations. `values`: [heads, D], [heads, N, D] or [B, heads, N, D] in the order of `heads` (for k and v: of their
    key heads, each once); a HeadRecord takes them from there. `at`: "z" (output before W_O), "q", "k" or "v" (after rotary embedding).

    `positions`: which rows; for k and v, which keys (a slice, a list or a mask, no "last_prompt"). Activation patching as in Meng et al.
    (2022, arXiv 2202.05262) and Wang et al. (2022, arXiv 2211.00593).
    """

    values: Any
    at: PatchSite = "z"

    site: ClassVar[Site] = "Z"
    always_written: ClassVar[tuple[str, ...]] = ("at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at not in SITES:
            raise unknown_name(InterventionError, "site", self.at, SITES)
        if isinstance(self.values, HeadRecord):
            object.__setattr__(self, "values", _recorded(self.values, self.heads, self.at))
        if self.values is None:
            raise refusal(InterventionError, "values=None", "there is nothing to put in place", "pass a HeadRecord or a tensor")
        object.__setattr__(self, "values", Values.of(self.values))
        if self.at in ("k", "v") and isinstance(self.positions, str):
            raise refusal(
                InterventionError,
                f"positions={self.positions!r} with at={self.at!r}",
                "keys stay where they are",
                "pass positions as numbers",
            )

    def bind(self, scope: Scope) -> PatchHeads:
        """A copy that knows its heads by module; InterventionError for a head, a width or a part of a group that does not fit."""
        bound = super().bind(scope)
        if self.at in ("z", "q"):
            check_values(self.values, self.pairs(scope), scope, "values")
            return bound
        keys = key_heads(self.pairs(scope), scope)
        check_values(self.values, keys, scope, "values")
        places: dict[str, list[int]] = {}
        for place, (layer, _) in enumerate(keys):
            places.setdefault(scope.topology[layer].name, []).append(place)
        bound.bound.places = places
        return bound

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call with q, k or v patched."""
        heads = self.heads_in(call)
        if self.at == "z" or not heads:
            return call
        if self.at == "q":
            rows = self.rows_in(call)
            if rows is None:
                return call
            own = call.q.transpose(1, 2)
            new = values_at(self.values, self.places_in(call), call, own, rows, "PatchHeads(at='q')")
            return replace(call, q=merged(own, heads, rows, new).transpose(1, 2))
        return self._keys(call, sorted({head // call.group for head in heads}))

    def _keys(self, call: AttentionCall, heads: list[int]) -> AttentionCall:
        from headscope.interventions.where import phase_of

        if self.phase not in ("both", phase_of(call)):
            return call
        source = call.k if self.at == "k" else call.v
        assert source is not None
        own = source.transpose(1, 2)  # [B, Nk, Hkv, D]
        table = self.values.like(own)
        here = torch.arange(own.shape[1], device=own.device) + call.key_offset
        known = table.shape[-2] if table.dim() > 2 else None
        rows = None if self.positions is None else at_positions(self.positions, here, own.shape[0])
        if rows is None:
            rows = (here < known if known is not None else torch.ones_like(here, dtype=torch.bool))[None]
        elif known is not None and bool((rows & (here >= known)).any()):
            raise refusal(
                InterventionError, f"PatchHeads(at={self.at!r})", f"it has values for {known} positions", "choose positions among those"
            )
        if not bool(rows.any()):
            return call
        as_keys = replace(call, q=own.transpose(1, 2), query_offset=call.key_offset)
        new = values_at(self.values, self.places_in(call), as_keys, own, rows, f"PatchHeads(at={self.at!r})")
        changed = merged(own, heads, rows, new).transpose(1, 2)
        return replace(call, k=changed) if self.at == "k" else replace(call, v=changed)

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The outputs [B, Nq, Hq, Dv] with the chosen heads' rows replaced."""
        heads = self.heads_in(call)
        if self.at != "z" or not heads:
            return output
        rows = self.rows_in(call)
        if rows is None:
            return output
        return merged(output, heads, rows, values_at(self.values, self.places_in(call), call, output, rows, "PatchHeads"))

    def acts_at(self) -> Site:
        """z is an output; q, k and v make scores."""
        return "Z" if self.at == "z" else "S"

    def algebra(self) -> str:
        """Queries, keys and values are put in place of others without touching one another."""
        return "replace" if self.at == "z" else f"replace {self.at}"

    def what(self) -> str:
        """What is done to a head, in words."""
        part = {"z": "output before W_O", "q": "queries", "k": "keys", "v": "values"}[self.at]
        return f"replace the head's {part} by given values"


def key_heads(pairs: tuple[tuple[int | str, int], ...], scope: Scope) -> list[tuple[int | str, int]]:
    """The key heads of query heads, each once, in order. InterventionError where a group is named in part."""
    resolve(pairs, scope.topology)
    out: dict[tuple[int | str, int], None] = {}
    for layer, head in pairs:
        record = scope.topology[layer]
        kv = record.kv_head(head)
        group = [(layer, other) for other in range(kv * record.group, (kv + 1) * record.group)]
        missing = [f"{a}.{b}" for a, b in group if (a, b) not in pairs]
        if missing:
            raise refusal(
                InterventionError,
                f"keys or values of head {layer}.{head} alone",
                f"it shares key head {layer}.{kv} with {', '.join(missing)} (grouped queries)",
                f"name the whole group ({', '.join(f'{a}.{b}' for a, b in group)}), or edit at 'q' or 'z'",
            )
        out[layer, kv] = None
    return list(out)


def _recorded(record: HeadRecord, heads: Any, at: PatchSite) -> Tensor:
    """[B, heads, N, D] from a record; of key heads each once for k and v."""
    if isinstance(heads, str):
        heads = tuple((m.layer, h) for m in record.topology.main if m.name in record.heads for h in range(m.heads) if m.layer is not None)
    if at in ("k", "v"):
        first: dict[tuple[Any, int], tuple[Any, int]] = {}
        for layer, head in heads:
            first.setdefault((layer, record.topology[layer].kv_head(head)), (layer, head))
        heads = tuple(first.values())
    return record.stacked(at, heads)


__all__ = ["PatchHeads", "PatchSite", "key_heads"]

"""RescaledPattern: a sparse plan's pattern with its rows put back to the size that full attention gives the kept keys.

    z'_i = rho_i z_sparse,i + sum_T r_iT v_T          z_sparse the pattern's own softmax, lse_sparse its normaliser

    ratio="exact"      rho_i = exp(lse_sparse - lse_full), no tiles: what the kept keys give in full attention, and nothing else
    ratio="pooled"     r_iT = n_iT exp(q_i.k_T) / ( exp(lse_sparse) + sum_T n_iT exp(q_i.k_T) ),  rho_i = 1 - sum_T r_iT

T runs over tiles of keys that end before the row, n_iT is how many of a tile's keys the row would see and the pattern drops, k_T and v_T
are the tile's mean key and value. So the second one needs no full attention and no mean query (which would know later rows), holds in
decode steps, and says what a plan with such tiles would give. The silent failure both avoid is the plan's own: rows that sum to one over
a tenth of their keys, so that each kept key has ten times its weight.

The host's full kernel runs as well: this is for judging a pattern before kernels are written for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import InterventionError, PlanError, refusal, unknown_name
from headscope.interventions.base import register
from headscope.interventions.fold import Fold, put, refuse_gradients
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.prompts import starts
from headscope.kernels.gather import visible_at
from headscope.kernels.sparse_dispatch import sparse_attention

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans import Pattern
    from headscope.scope import Scope

RATIOS = ("exact", "pooled")
ENTRIES = 1 << 21
"""Entries of the pattern's mask held at a time."""


@register("rescaled_pattern")
@dataclass(frozen=True)
class RescaledPattern(HeadEdit):
    """Row rescaling for sparse plans: Re-ttention's ratio (2025, arXiv 2505.22918) where it is fresh, and Rectified SpaAttn's pooled
    estimate (2025, arXiv 2511.19835) made causal, a row's own query in the place of its block's mean.

    `pattern`: a static pattern of `headscope.plans` (Streaming, Span, Strided, Power, Lines, Blocks), or its {"kind": ..., ...}, for all
    heads named. `ratio`: see the module. `block`: keys a tile, counted from each sequence's first token. A pattern that drops nothing
    changes nothing beyond rounding.

    InterventionError for a pattern whose keys are chosen per input (its plan chooses them; make the choice first), for one that compensates
    already, for attention that is not causal, and for a cache that has dropped keys, whose tiles have no means.
    """

    pattern: Any
    ratio: Literal["exact", "pooled"] = "pooled"
    block: int = 128

    site: ClassVar[Site] = "P"
    folds: ClassVar[bool] = True
    always_written: ClassVar[tuple[str, ...]] = ("ratio",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pattern", _read(self.pattern))
        if self.ratio not in RATIOS:
            raise unknown_name(InterventionError, "ratio", self.ratio, RATIOS)
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise refusal(InterventionError, f"block={self.block!r}", "it counts keys", "pass block=128")

    def bind(self, scope: Scope) -> RescaledPattern:
        """A copy that knows its heads by module; InterventionError where attention looks both ways."""
        bound = super().bind(scope)
        for name in bound.bound.heads:
            if not scope.topology[name].causal:
                given, why = f"RescaledPattern in {name}", "patterns of plans are of causal attention"
                raise refusal(InterventionError, given, why, "use RectifiedSparse on a diffusion transformer")
        return bound

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Rows as above; rows that see no key stay."""
        refuse_gradients(output, "RescaledPattern")
        fold = Fold.of(call)
        fold.refuse_closed(heads)
        if any(set(stage.heads) & set(heads) for stage in fold.stages):
            given, why = f"RescaledPattern in {call.module} after another edit of its weights", "it computes rows anew, from scores"
            raise refusal(InterventionError, given, why, "let it come first (order=), or edit other heads")
        if self.ratio == "pooled" and call.key_offset:
            given, why = f"ratio='pooled' in {call.module}", f"its cache begins at position {call.key_offset}, inside or behind tiles"
            raise refusal(InterventionError, given, why, "use a cache that keeps every key, or ratio='exact'")
        sub, full = fold.sub(heads), fold.lse(heads)
        found, lse = sparse_attention(sub, [self.pattern] * len(heads))
        z, sparse = found.transpose(1, 2).to(full.dtype), lse.to(full.dtype)
        new = torch.exp(sparse - full)[..., None] * z if self.ratio == "exact" else self._pooled(sub, z, sparse)
        fold.close(heads, "RescaledPattern")
        return put(output, heads, rows, new, ~full.isnan())

    def _pooled(self, sub: AttentionCall, z: Tensor, sparse: Tensor) -> Tensor:
        """[B, h, Nq, Dv]: sparse rows and the tiles that they dropped."""
        assert sub.v is not None
        out, first = torch.empty_like(z), starts(sub).tolist()
        step = max(1, ENTRIES // sub.k.shape[2])
        for b, start in enumerate(first):
            k, counts = _tiles(sub.k[b], sub.mask.key_valid, b, start, self.block, z.dtype)
            v, _ = _tiles(sub.v[b], sub.mask.key_valid, b, start, self.block, z.dtype)
            for part in torch.arange(sub.q.shape[2], device=z.device).split(step):
                number = self._dropped(sub, b, start, part, len(counts))  # [1 or h, R, T]
                scores = sub.q[b, :, part].to(z.dtype) @ k.repeat_interleave(sub.group, 0).transpose(-1, -2) * sub.scale
                if sub.softcap is not None:
                    scores = sub.softcap * torch.tanh(scores / sub.softcap)
                terms = scores + number.to(z.dtype).log()
                total = torch.logaddexp(sparse[b, :, part], torch.logsumexp(terms, -1))
                weights = torch.exp(terms - total[..., None])
                told = weights @ v.repeat_interleave(sub.group, 0)
                out[b, :, part] = torch.exp(sparse[b, :, part] - total)[..., None] * z[b, :, part] + told
        return out

    def _dropped(self, sub: AttentionCall, b: int, start: int, part: Tensor, tiles: int) -> Tensor:
        """[1 or h, R, T]: how many keys of each tile before the row it would see and the pattern drops."""
        keys = torch.arange(sub.k.shape[2], device=part.device)
        fixed = self.pattern.fixed(sub.q.shape[2] + sub.query_offset - start)
        kept = fixed.visible((part + sub.query_offset - start).cpu(), (keys - start).cpu()).to(part.device)
        heads = sub.q.shape[1] if sub.mask.allowed is not None or sub.mask.bias is not None else 1
        b_, h = torch.tensor(b, device=part.device), torch.arange(heads, device=part.device)[:, None, None]
        gone = visible_at(sub, b_, h, part[None, :, None], keys[None, None]).expand(heads, len(part), -1) & ~kept
        width = (tiles * self.block) - (len(keys) - start)
        count = torch.nn.functional.pad(gone[..., start:], (0, width)).unflatten(-1, (tiles, self.block)).sum(-1)
        ends = torch.arange(1, tiles + 1, device=part.device) * self.block  # of tiles, in the sequence's own positions
        return count.masked_fill(ends > (part + sub.query_offset - start)[:, None], 0)

    def settings(self) -> dict[str, Any]:
        """The fields as they go into JSON."""
        return {**super().settings(), "pattern": self.pattern.to_dict()}

    def algebra(self) -> str:
        """It computes rows anew."""
        return "rectified"

    def what(self) -> str:
        """In words."""
        back = {
            "exact": "scale each row to the share that full attention gives the kept keys",
            "pooled": f"give what is dropped back by the means of tiles of {self.block} keys",
        }[self.ratio]
        return f"attend by the pattern {self.pattern}, and {back}"

    def cost(self) -> str:
        """In words."""
        return "the full kernel, the sparse one" + (
            ", and a pass over tile means, O(N^2 / block) per head" if self.ratio == "pooled" else ""
        )


def _read(given: Any) -> Pattern:
    from headscope.plans import Pattern
    from headscope.plans.registry import pattern_from

    try:
        found = given if isinstance(given, Pattern) else pattern_from(given)
    except PlanError as error:
        raise InterventionError(str(error)) from None
    if not found.static:
        given, why = f"pattern {found}", "its keys are chosen per input, by a plan"
        raise refusal(InterventionError, given, why, "run the plan (scope.execute), or pass a static pattern")
    if getattr(found, "compensate", False):
        raise refusal(InterventionError, f"pattern {found}", "it puts a mean in the place of what it drops itself", "pass compensate=False")
    return found


def _tiles(values: Tensor, valid: Tensor | None, b: int, start: int, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """([Hkv, T, D] means of one sequence's tiles over real tokens, [T] how many these are)."""
    own = values[:, start:].to(dtype)
    real = torch.ones(own.shape[1], dtype=torch.bool, device=own.device) if valid is None else valid[b, start:]
    own = own.masked_fill(~real[None, :, None], 0.0)
    sums = torch.stack([part.sum(1) for part in own.split(block, 1)], 1)
    counts = torch.stack([part.sum() for part in real.split(block)]).to(dtype)
    return sums / counts.clamp_min(1.0)[None, :, None], counts


__all__ = ["RescaledPattern"]

"""P-site primitives: edits of attention probabilities, folded into the heads' outputs.

    redistribute   A_S *= keep; what is freed goes to T in proportion:  z' = z - (1 - keep) z_S + (1 - keep) (m_S / m_T) z_T
    mix            A' = (1 - u) A + u P                                 z' = (1 - u) z + u (P v)
    set_rows       A'_i = p, a given sparse row                         z'_i = sum_j p_j v_j
    row_rescale    A'_i = rho_i A_i                                     z'_i = rho_i z_i

Each takes the call and all heads' outputs [B, Nq, Hq, Dv] and gives them back edited, on a copy; where it changes nothing it gives back the
very object it was given. `rows` is True or a bool mask [1 or B, Nq]. Heads are query heads. A redistribution is not a constant key bias:
scaling columns and renormalising keeps keep / (keep m + 1 - m) of S's mass, not keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.fold import Fold, Rows, as_set, own_outputs, put, refuse_gradients, shift, table_stage
from headscope.interventions.head_edit import merged, taken
from headscope.interventions.patterns import PATTERNS
from headscope.kernels.shifted import Gate

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

EPSILON = 1e-12
"""Rows whose target set holds less mass are left as they are: there is nothing to give the freed mass to."""


def redistribute(
    call: AttentionCall,
    output: Tensor,
    heads: list[int],
    source: Tensor,
    target: Tensor | None = None,
    *,
    keep: float,
    rows: Rows = True,
    gate: Tensor | Gate | None = None,
    watched: Tensor | None = None,
    spare: Tensor | None = None,
    limit: float | None = None,
    apart: bool = False,
) -> Tensor:
    """Take 1 - `keep` of the mass on `source` and give it to `target` in proportion to the weights there.

    `source`, `target`: bool [Nk], [B, Nk] or [B or 1, h or 1, Nk]; `target` None means every key that is not in `source`. They must not
    overlap; `apart` says that they do not, and saves asking the device. `spare`: keys that a target of None leaves out. `gate` [B, h, Nq]
    bool, or a Gate, which asks for the masses on target and on `watched`, some of the source's keys: rows it leaves out are not edited.
    `limit`: see `fold.LIMIT`.
    """
    if keep == 1.0:
        return output
    refuse_gradients(output, "redistribute")
    fold, source = Fold.of(call), as_set(source)
    given = None if target is None else as_set(target)
    if given is not None and not apart and bool((source & given).any()):
        raise refusal(InterventionError, "redistribute", "source and target share keys", "leave the source's keys out of the target")
    left = None if given is not None or spare is None else as_set(spare) & ~source
    seen = None if watched is None else as_set(watched)
    step = _fused if fold.fused(heads) else _folded
    return step(fold, output, heads, _Sets(source, given, left, seen), keep, rows, gate, fold.limit(output) if limit is None else limit)


@dataclass(frozen=True, slots=True)
class _Sets:
    """Bool [1 or B, 1 or h, Nk]; `target` None: what is neither in `source` nor in `left`."""

    source: Tensor
    target: Tensor | None
    left: Tensor | None
    watched: Tensor | None

    @property
    def rest(self) -> Tensor:
        """The target, written out."""
        if self.target is not None:
            return self.target
        return ~self.source if self.left is None else ~self.source & ~self.left


def _gain(m_s: Tensor, m_t: Tensor, m_w: Tensor | None, keep: float, gate: Tensor | Gate | None) -> tuple[Tensor, Tensor]:
    """(which rows change [B, h, Nq], what their target's weights grow by)."""
    counts = (m_t >= EPSILON) & (m_s > 0)  # false on NaN rows as well
    if gate is not None:
        counts = counts & (gate if isinstance(gate, torch.Tensor) else gate(m_t, torch.zeros_like(m_t) if m_w is None else m_w))
    return counts, torch.where(counts, (1.0 - keep) * m_s / m_t.clamp_min(EPSILON), torch.zeros_like(m_s))


def _fused(
    fold: Fold, output: Tensor, heads: list[int], sets: _Sets, keep: float, rows: Rows, gate: Tensor | Gate | None, limit: float
) -> Tensor:
    """By the kernel that does it in one pass; nothing waits for the device."""
    from headscope.kernels.triton_keys import listed

    second = sets.left if sets.target is None else sets.target
    codes = sets.source.contiguous().view(torch.int8)
    for bit, one in ((1, second), (2, sets.watched)):
        codes = codes if one is None else codes | one.view(torch.int8) << bit
    keys = listed(codes, 1 if second is None else 2)
    return shift(fold, output, heads, keys, keep=keep, others=sets.target is None, rows=rows, gate=gate, limit=limit)


def _folded(
    fold: Fold, output: Tensor, heads: list[int], sets: _Sets, keep: float, rows: Rows, gate: Tensor | Gate | None, limit: float
) -> Tensor:
    """By partial sums in plain PyTorch, of weights as earlier edits left them."""
    if not bool(sets.source.any()) or not bool(sets.rest.any()):
        return output
    m_s, z_s = fold.partial(heads, sets.source)
    z = own_outputs(output, heads, z_s.dtype)
    if sets.target is None:
        m_t, z_t = fold.total(heads) - m_s, z - z_s
        m_o, z_o = (torch.zeros_like(m_s), torch.zeros_like(z_s)) if sets.left is None else fold.partial(heads, sets.left)
        m_t, z_t = m_t - m_o, z_t - z_o
        weak = (m_t < limit).flatten(0, 1).any(0).nonzero().flatten()
        if len(weak):
            few_m, few_z = fold.partial(heads, sets.rest, weak)
            m_t, z_t, z = m_t.clone(), z_t.clone(), z.clone()
            m_t[:, :, weak], z_t[:, :, weak] = few_m, few_z
            z[:, :, weak] = z_s[:, :, weak] + z_o[:, :, weak] + few_z
    else:
        m_t, z_t = fold.partial(heads, sets.target)
    m_w = None if sets.watched is None else fold.partial(heads, sets.watched)[0]
    counts, gain = _gain(m_s, m_t, m_w, keep, gate)
    new = z - (1.0 - keep) * z_s + gain[..., None] * z_t
    kept = torch.where(counts, torch.full_like(m_s, keep), torch.ones_like(m_s))
    fold.push(heads, table_stage(lambda: [(sets.source, kept), (sets.rest, 1.0 + gain)], rows))
    return put(output, heads, rows, new, counts)


def mix(call: AttentionCall, output: Tensor, heads: list[int], pattern: str | Tensor, u: float, rows: Rows = True) -> Tensor:
    """Move a head's weights by u towards a pattern: "identity", "uniform", "argmax" or "query_mean" (see `patterns`), or a given P v
    [B, h, Nq, Dv]. Rows that see no key stay as they are."""
    if u == 0.0:
        return output
    if isinstance(pattern, str):
        if pattern not in PATTERNS:
            raise unknown_name(InterventionError, "pattern", pattern, PATTERNS)
        fold = Fold.of(call)
        if pattern == "argmax" and any(set(stage.heads) & set(heads) for stage in fold.stages):
            raise refusal(
                InterventionError,
                f"mix with argmax in {call.module} after another edit of its weights",
                "the largest weight is looked up in the attention as the model computed it",
                "mix other heads, or with another pattern",
            )
        pattern = PATTERNS[pattern](call, heads)
    z, p = taken(output, heads), pattern.transpose(1, 2)
    dtype = torch.promote_types(z.dtype, p.dtype)  # lerp itself computes half precision in float32
    new = p if u == 1.0 else torch.lerp(z.to(dtype), p.to(dtype), u)
    Fold.of(call).close(heads, "mix")
    return merged(output, heads, rows, new)


def set_rows(call: AttentionCall, output: Tensor, heads: list[int], keys: Tensor, weights: Tensor, rows: Rows = True) -> Tensor:
    """Let rows attend to `keys` (absolute positions [X]) with `weights` [X] and to nothing else.

    InterventionError for keys that the call does not hold, that are padding, or that a causal row cannot see.
    """
    assert call.v is not None
    index = keys.to(call.q.device) - call.key_offset
    if rows is not True and not bool(rows.any()):
        return output
    if bool((index < 0).any()) or bool((index >= call.k.shape[2]).any()):
        raise refusal(
            InterventionError,
            f"set_rows with keys {keys.tolist()[:8]}",
            f"{call.module} sees positions {call.key_offset}..{call.key_offset + call.k.shape[2] - 1}",
            "choose keys among these, or later query positions",
        )
    t = torch.arange(call.q.shape[2], device=call.q.device) + call.query_offset
    edited = t if rows is True else t[rows.any(0)]
    if call.mask.causal and len(edited) and int(edited.min()) < int(keys.max()):
        raise refusal(
            InterventionError,
            f"set_rows at position {int(edited.min())} with key {int(keys.max())}",
            "the key comes later",
            "set later rows",
        )
    valid = call.mask.key_valid
    if valid is not None and not bool(valid[:, index].all()):
        raise refusal(
            InterventionError, "set_rows", "a key is padding in one of the sequences", "choose keys that are real tokens everywhere"
        )
    dtype = torch.promote_types(call.v.dtype, torch.float32)
    values = call.v[:, [head // call.group for head in heads]][:, :, index].to(dtype)
    new = torch.einsum("x,bhxd->bhd", weights.to(device=values.device, dtype=dtype), values)[:, :, None]
    Fold.of(call).close(heads, "set_rows")
    return merged(output, heads, rows, new.transpose(1, 2).expand(-1, output.shape[1], -1, -1))


def row_rescale(call: AttentionCall, output: Tensor, heads: list[int], factor: float | Tensor, rows: Rows = True) -> Tensor:
    """Multiply rows of weights by `factor`, a number or [Nq], [B, Nq] or [B, h, Nq]. Rows then no longer sum to one."""
    if isinstance(factor, float | int) and factor == 1.0:
        return output
    own = taken(output, heads)
    if isinstance(factor, torch.Tensor):
        while factor.dim() < 3:
            factor = factor[None] if factor.dim() == 1 else factor[:, None]
        new = own * factor.transpose(1, 2)[..., None].to(own.dtype)
    else:
        new = own * factor
    Fold.of(call).close(heads, "row_rescale")
    return merged(output, heads, rows, new)


__all__ = ["EPSILON", "mix", "redistribute", "row_rescale", "set_rows"]

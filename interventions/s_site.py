"""S-site primitives: edits of attention scores.

    key_bias        s_ij += b_j                    set_bias      s_ij += b_i for j in X
    temperature     s_ij /= tau                    abs_boost     s_ij += a |s_ij| for j in X
    query_replace   q_i := 0, the mean q, or q blurred over the image

What a query or a per-key number can say is said to the call before it runs: q goes to the model's own kernel; a bias is one number per
key and head, seen by whatever measures the call. What depends on row and key together is folded into the output afterwards. All of them
give back the very object they were given where they change nothing.

A score is everything under the softmax's exponent: after the soft cap, with the bias. So a temperature is a scaled query only where there
is neither, nor a sink logit; elsewhere every one of these terms is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.fold import Fold, Rows, as_set, own_outputs, put, refuse_gradients
from headscope.interventions.patterns import mean_query
from headscope.kernels.partial import exact_attention, head_index, select_heads

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def with_queries(call: AttentionCall, heads: list[int], new: Tensor, rows: Rows = True) -> AttentionCall:
    """The call with q of some heads replaced by `new` [B, h, Nq, D] at `rows`."""
    q, index = call.q.clone(), head_index(tuple(heads), call.q.device)
    q[:, index] = new.to(q.dtype) if rows is True else torch.where(rows[:, None, :, None], new.to(q.dtype), call.q[:, index])
    return replace(call, q=q)


# ---- before the call runs ----------------------------------------------------------------------------------------------


def key_bias(call: AttentionCall, heads: list[int], bias: Tensor) -> AttentionCall:
    """Add b_j to the scores of heads, in every row. `bias`: [Nk], [B, Nk] or [B, h, Nk]; -inf hides a key.

    Kept as one number per key and head behind an expanded view, O(H N): no row-by-key matrix is made unless the call has one already.
    """
    while bias.dim() < 3:
        bias = bias[None] if bias.dim() == 1 else bias[:, None]
    if not bool(bias.any()):
        return call
    batch, total, rows, keys = call.q.shape[0], call.q.shape[1], call.q.shape[2], call.k.shape[2]
    old = call.mask.bias
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    add = torch.zeros(bias.shape[0], total, 1, keys, dtype=dtype, device=call.q.device)
    add[:, head_index(tuple(heads), add.device)] = bias.to(device=call.q.device, dtype=dtype)[:, :, None]
    if old is not None:
        add = (old[:, :, :1] if old.stride(2) == 0 or rows == 1 else old) + add
    whole = add.expand(max(add.shape[0], 1), total, rows, keys)
    if whole.shape[0] not in (1, batch):
        raise refusal(InterventionError, f"a key bias of {whole.shape[0]} sequences", f"the batch has {batch}", "pass one, or as many")
    return replace(call, mask=replace(call.mask, bias=whole))


def temperature_before(call: AttentionCall, heads: list[int], tau: float, rows: Rows = True) -> AttentionCall | None:
    """The call with scores divided by tau; None where the call cannot say it, and `temperature_after` must."""
    if tau == 1.0:
        return call
    if call.softcap is None and call.mask.bias is None and call.sink_logits is None:
        return with_queries(call, heads, call.q[:, head_index(tuple(heads), call.q.device)] / tau, rows)
    if rows is True and len(heads) == call.q.shape[1]:
        return cooled(call, tau)
    return None


def cooled(call: AttentionCall, tau: float) -> AttentionCall:
    """The call with everything under the exponent divided by tau: scale, soft cap (c tanh(s / c) scales with both), bias, sink logits."""
    bias = call.mask.bias
    if bias is not None:
        bias = (bias[:, :, :1] / tau).expand(bias.shape) if bias.stride(2) == 0 else bias / tau
    return replace(
        call,
        scale=call.scale / tau,
        softcap=None if call.softcap is None else call.softcap / tau,
        sink_logits=None if call.sink_logits is None else call.sink_logits / tau,
        mask=replace(call.mask, bias=bias),
    )


def query_replace(
    call: AttentionCall, heads: list[int], how: str, rows: Rows = True, sigma: float | None = None, grid: tuple[int, int] | None = None
) -> AttentionCall:
    """q := 0 ("zero": every visible key scores the same), the mean query ("mean", SEG with infinite blur), or q blurred over the image's
    grid ("blur", SEG with `sigma` in patches); for the rows given."""
    own = call.q[:, head_index(tuple(heads), call.q.device)]
    if how == "zero":
        return with_queries(call, heads, torch.zeros_like(own), rows)
    if how == "mean":
        return with_queries(call, heads, mean_query(call, heads).expand_as(own), rows)
    from headscope.interventions.blur import blurred

    assert sigma is not None
    return call if sigma == 0.0 else with_queries(call, heads, blurred(call, own, sigma, grid), rows)


# ---- folded into the output --------------------------------------------------------------------------------------------


def temperature_after(call: AttentionCall, output: Tensor, heads: list[int], tau: float, rows: Rows = True) -> Tensor:
    """Heads' outputs under s / tau by exact attention of these heads, for calls whose scores are more than q.k."""
    if tau == 1.0:
        return output
    refuse_gradients(output, "temperature")
    fold = Fold.of(call)
    fold.refuse_closed(heads)
    if any(set(stage.heads) & set(heads) for stage in fold.stages):
        raise refusal(
            InterventionError,
            f"temperature on {call.module} after another edit of its scores",
            "this model's scores have a soft cap, a bias or sink logits, so they are computed anew",
            "let the temperature come first (order=), or edit all heads",
        )
    new = exact_attention(cooled(select_heads(call, heads), tau)).transpose(1, 2)
    fold.close(heads, "temperature")
    every = torch.ones(new.shape[:3], dtype=torch.bool, device=new.device)
    return put(output, heads, rows, new, every)


def reweigh(
    call: AttentionCall,
    output: Tensor,
    heads: list[int],
    keys: Tensor,
    log_factor: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Rows = True,
    what: str = "reweigh",
) -> Tensor:
    """Multiply exp(s_ij) by a factor on a key set and normalise again: s_ij += ln f_ij for j in X.

    `log_factor(scores [B, h, R, X], rows, keys)` gives ln f. z' = (z - z_X + z_Xf) / (1 - m_X + m_Xf): O(N |X| d).
    """
    if not bool(keys.any()):
        return output
    refuse_gradients(output, what)
    fold = Fold.of(call)
    keys = as_set(keys)
    m_x, z_x = fold.partial(heads, keys)
    m_f, z_f = fold.partial(heads, keys, extra=log_factor)
    z = own_outputs(output, heads, z_x.dtype)
    size, top = 1.0 - m_x + m_f, z - z_x + z_f
    weak = ((1.0 - m_x < fold.limit(output)) & (m_f < m_x)).flatten(0, 1).any(0).nonzero().flatten()
    if len(weak):
        m_r, z_r = fold.partial(heads, ~keys, weak)
        sinks = (1.0 - fold.total(heads))[:, :, weak]
        size, top = size.clone(), top.clone()
        size[:, :, weak] = m_r + m_f[:, :, weak] + sinks
        top[:, :, weak] = z_r + z_f[:, :, weak]
    counts = size > 0  # false on NaN rows
    if not bool(size[counts].isfinite().all()):
        raise refusal(InterventionError, what, "the scores it raises leave the range of their dtype", "use a smaller factor")
    new = top / torch.where(counts, size, torch.ones_like(size))[..., None]
    mask = counts if rows is True else counts & rows[:, None]
    shift = torch.where(mask, size, torch.ones_like(size)).log()

    def stage(scores: Tensor, local: Tensor, part: Tensor, at: Tensor) -> Tensor:
        known = (local >= 0)[None, :, None, None]
        index = local.clamp_min(0)
        members = (keys[:, index] if keys.shape[1] > 1 else keys)[:, :, None, at]
        inside = members & known if rows is True else members & known & rows[:, None, part, None]
        full = torch.zeros(scores.shape[0], len(heads), *scores.shape[2:], dtype=scores.dtype, device=scores.device)
        here = (local >= 0).nonzero().flatten()
        full[:, local[here]] = scores[:, here]
        value = log_factor(full, part, at).expand_as(full)[:, index]
        return torch.where(inside, value, torch.zeros_like(scores))

    fold.push(heads, stage, shift)
    return put(output, heads, rows, new, counts)


def set_bias(call: AttentionCall, output: Tensor, heads: list[int], keys: Tensor, bias: float | Tensor, rows: Rows = True) -> Tensor:
    """s_ij += b_i for j in `keys`. `bias`: a number, or [Nq], [B, Nq] or [B, h, Nq], one per row."""
    if isinstance(bias, float | int) and bias == 0.0:
        return output
    if isinstance(bias, torch.Tensor):
        while bias.dim() < 3:
            bias = bias[None] if bias.dim() == 1 else bias[:, None]
    given = bias

    def log_factor(scores: Tensor, part: Tensor, at: Tensor) -> Tensor:
        if isinstance(given, torch.Tensor):
            return given.to(scores.dtype)[:, :, part, None]
        return torch.full((), float(given), dtype=scores.dtype, device=scores.device)

    return reweigh(call, output, heads, keys, log_factor, rows, "set_bias")


def set_mass(call: AttentionCall, output: Tensor, heads: list[int], keys: Tensor, mass: float, rows: Rows = True) -> Tensor:
    """The set bias that gives `keys` the share `mass` of each row, b_i = ln(c (1 - m_i) / (m_i (1 - c))); rows that see none of the keys,
    or only these, stay as they are."""
    if not bool(keys.any()):
        return output
    m = Fold.of(call).partial(heads, as_set(keys))[0]
    tiny = torch.finfo(m.dtype).tiny
    free = (1.0 - m).clamp_min(0.0)
    bias = math.log(mass / (1.0 - mass)) + torch.log(free.clamp_min(tiny)) - torch.log(m.clamp_min(tiny))
    possible = (m > tiny) & (free > torch.finfo(m.dtype).eps)
    return set_bias(call, output, heads, keys, torch.where(possible, bias, torch.zeros_like(bias)), rows)


def abs_boost(call: AttentionCall, output: Tensor, heads: list[int], keys: Tensor, factor: float, rows: Rows = True) -> Tensor:
    """s_ij += a |s_ij| for j in `keys` (PAI, PAINT). A negative score is moved towards zero: a = 1 maps all of them to 0."""
    if factor == 0.0:
        return output

    def log_factor(scores: Tensor, part: Tensor, at: Tensor) -> Tensor:
        return factor * scores.abs().masked_fill(scores == -math.inf, 0.0)

    return reweigh(call, output, heads, keys, log_factor, rows, "abs_boost")


def column_scale(call: AttentionCall, output: Tensor, heads: list[int], keys: Tensor, bias: Tensor, rows: Rows = True) -> Tensor:
    """s_ij += b_j for j in `keys` at some rows only; `bias` [Nk], [B, Nk] or [B, h, Nk]. In every row it is `key_bias`."""
    while bias.dim() < 3:
        bias = bias[None] if bias.dim() == 1 else bias[:, None]
    table = bias

    def log_factor(scores: Tensor, part: Tensor, at: Tensor) -> Tensor:
        return table.to(scores.dtype)[:, :, None, at]

    return reweigh(call, output, heads, keys, log_factor, rows, "key_bias")


__all__ = [
    "abs_boost",
    "column_scale",
    "cooled",
    "key_bias",
    "query_replace",
    "reweigh",
    "set_bias",
    "set_mass",
    "temperature_after",
    "temperature_before",
    "with_queries",
]

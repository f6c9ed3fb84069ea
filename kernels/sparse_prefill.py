"""Launching the sparse prefill kernels: which of them takes a call, and how it is handed over.

The kernels are told everything by tensors on the device, so a launch waits for nothing. What a static plan visits is remembered per layer
and length; what a dynamic one visits is chosen on the device, for every call anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.errors import UnavailableError, refusal
from headscope.kernels.sparse_blocked import _compensation, blocked_sparse_attention
from headscope.kernels.sparse_cost import slower
from headscope.kernels.sparse_dynamic import chosen_on_device, dynamic_lists
from headscope.kernels.sparse_lists import ENDLESS, SIDE, TileLists, static_lists, supported
from headscope.kernels.triton_common import INTERPRETED, LOG2E
from headscope.kernels.triton_host import describable, padded, zero
from headscope.kernels.triton_launch import Tile, processors, tile_for

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans import Pattern

STRIP = 4096
"""Rows that are compensated at a time."""

POISON = False
"""Tests set this: outputs are then allocated full of NaN."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "" when the Triton kernel runs a call under these patterns, or why not."""
    mask = call.mask
    if not call.q.is_cuda and not INTERPRETED:
        return "it is not on a CUDA device"
    if call.q.dtype not in DTYPES or call.k.dtype != call.q.dtype or call.v is None or call.v.dtype != call.q.dtype:
        return f"q, k, v are {call.q.dtype}, {call.k.dtype}, {None if call.v is None else call.v.dtype}, not all one of {DTYPES}"
    if not mask.causal:
        return "it is not causal"
    if mask.allowed is not None or mask.bias is not None:
        return "it has an explicit mask or a bias"
    if padded(max(call.q.shape[3], call.v.shape[3])) > 256:
        return "its heads are wider than 256"
    length = call.query_offset + call.q.shape[2]
    return supported([pattern.fixed(length) for pattern in patterns if pattern.static])


def best(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "gluon" or "triton", for a call that is supported."""
    return "triton" if gluon_supports(call, patterns) else "gluon"


def slower_than_dense(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "" when a call that is supported is expected to be faster sparse than dense, or why it is not; see `sparse_cost`."""
    length = call.query_offset + call.q.shape[2]
    now = [pattern.fixed(length) if pattern.static else pattern for pattern in patterns]
    told = all(one.static for one in now) and call.first_token is None
    return slower(call, now, best(call, now), static_lists(call, now) if told else None, processors(call.q.device))


def prefill(call: AttentionCall, patterns: Sequence[Pattern], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(output [B, Nq, Hq, Dv], lse [B, Hq, Nq] float32) of a call that is supported, by "gluon", "triton" or the better of them.

    Raises UnavailableError for a backend that cannot run the call.
    """
    length = call.query_offset + call.q.shape[2]
    now = [pattern.fixed(length) if pattern.static else pattern for pattern in patterns]
    grows = call.first_token is not None and any(one is not pattern for one, pattern in zip(now, patterns, strict=True))
    if grows or (any(not one.static for one in now) and chosen_on_device(call, now)):
        return _each(call, patterns, backend)
    lists = lists_for(call, now)
    reason = gluon_supports(call, now)
    if backend == "gluon" and reason:
        raise refusal(UnavailableError, "the gluon backend", reason, "use the triton backend, or leave the choice to headscope")
    run = triton_prefill if reason or backend == "triton" else gluon_prefill
    out, lse = run(call, now, lists)
    if any(getattr(pattern, "compensate", False) for pattern in now):
        compensate(call, now, out, lse)
    return out, lse


def _each(call: AttentionCall, patterns: Sequence[Pattern], backend: str | None) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, where what a head sees differs between them."""
    from headscope.plans.indices import choose, element

    parts = []
    for b in range(call.q.shape[0]):
        one = element(call, b)
        start = 0 if one.first_token is None else int(one.first_token[0])
        length = call.query_offset + call.q.shape[2] - start
        chosen = [choose(one, head, pattern).fixed(length) for head, pattern in enumerate(patterns)]
        reason = supported(chosen)
        if reason and backend is not None:
            raise refusal(UnavailableError, f"the {backend} backend", reason, "leave the choice to headscope")
        parts.append(blocked_sparse_attention(one, chosen) if reason else prefill(one, chosen, backend))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def compensate(call: AttentionCall, patterns: Sequence[Pattern], out: Tensor, lse: Tensor) -> None:
    """Adds, in place, the mean of what each row dropped to the heads that are compensated for it (RazorAttention, arXiv:2407.15891).

    One key more per row, from running sums over the keys: O(N), in strips of rows.
    """
    batch, heads, rows, _ = call.q.shape
    device = call.q.device
    first = [0] * batch if call.first_token is None else [int(one) for one in call.first_token]
    sums: dict[str, Tensor] = {}
    for pattern in {id(one): one for one in patterns if getattr(one, "compensate", False)}.values():
        h = torch.tensor([head for head in range(heads) if patterns[head] is pattern], device=device)
        for b in range(batch):
            element = torch.tensor([b], device=device)
            for top in range(max(0, first[b] - call.query_offset), rows, STRIP):
                i = torch.arange(top, min(rows, top + STRIP), device=device)
                q = call.q[b : b + 1, h, top : top + STRIP].float()
                score, value = _compensation(call, pattern, q, element, h, i, first[b], sums)
                own = lse[b, h, top : top + STRIP]
                total = torch.logaddexp(own, score[0])
                share = torch.exp(own - total).nan_to_num(nan=0.0)[..., None]
                extra = torch.exp(score[0] - total).nan_to_num(nan=0.0)[..., None] * value[0]
                mixed = share * out[b, top : top + STRIP, h].transpose(0, 1).float() + extra
                out[b, top : top + STRIP, h] = mixed.transpose(0, 1).to(out.dtype)
                lse[b, h, top : top + STRIP] = total


def lists_for(call: AttentionCall, patterns: Sequence[Pattern]) -> TileLists:
    """What the kernels visit, on the call's device: remembered for static patterns, chosen now for dynamic ones."""
    return static_lists(call, patterns) if all(one.static for one in patterns) else dynamic_lists(call, patterns)


def triton_prefill(call: AttentionCall, patterns: Sequence[Pattern], lists: TileLists | None = None) -> tuple[Tensor, Tensor]:
    """(output [B, Nq, Hq, Dv], lse [B, Hq, Nq] float32) by the plain Triton kernel, for calls that it `supports`."""
    from headscope.kernels.sparse_prefill_triton import prefill_kernel

    made = lists_for(call, patterns) if lists is None else lists
    q, k, v, mask = call.q, call.k, call.v, call.mask
    assert v is not None
    batch, heads, rows, width = q.shape
    wide = max(width, v.shape[3])
    tile = tile_for("sparse", q.device, q.dtype, wide)
    if SIDE % tile.rows or SIDE % tile.keys:
        tile = Tile(64, 64, tile.warps, tile.stages)
    out, lse = outputs(call)
    cap = call.softcap or 1.0
    nothing = made.rules
    valid = None if mask.key_valid is None else mask.key_valid.to(torch.int8).contiguous()
    q_segments, k_segments = (None if x is None else x.to(torch.int32).contiguous() for x in (mask.query_segments, mask.key_segments))
    sinks = None if call.sink_logits is None else call.sink_logits.to(q.device, torch.float32).contiguous()
    careful = valid is not None or q_segments is not None or call.key_offset > 0
    first = zero(q.device).expand(batch, 1).contiguous() if call.first_token is None else call.first_token.to(q.device)
    lines = made.columns is not None
    prefill_kernel[(len(made.work) * (SIDE // tile.rows),)](
        q, k, v, out, lse, made.work, made.rules, made.tiles,
        *(nothing if x is None else x for x in (made.cells, made.columns, made.gaps, made.diagonals, made.marked)), first,
        *(nothing if x is None else x for x in (sinks, valid, q_segments, k_segments)),
        *q.stride(), *k.stride(), *v.stride(), out.stride(0), out.stride(2), out.stride(1),
        call.scale * LOG2E, 2.0 * call.scale / cap * LOG2E, cap * LOG2E, heads, call.group, rows, k.shape[2],
        call.query_offset, call.key_offset, mask.window or 0,
        *table_widths(made),
        LIMIT=mask.window is not None, CELLS=made.cells is not None, LINES=lines, VALID=valid is not None,
        SEGMENTS=q_segments is not None, CAREFUL=careful, SINKS=sinks is not None, SOFTCAP=call.softcap is not None,
        D=width, DP=padded(width), DV=v.shape[3], DVP=padded(v.shape[3]), BM=tile.rows, BN=tile.keys,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **tile.options,
    )  # fmt: skip
    return out, lse


def gluon_supports(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "" when the Hopper kernel runs a call that the Triton kernel `supports`, or why not."""
    from headscope.kernels.triton_interior import hopper

    mask, v = call.mask, call.v
    assert v is not None
    if INTERPRETED or not hopper(call.q.device):
        return "the device is no Hopper GPU"
    if call.q.element_size() != 2 or call.q.shape[3] not in (64, 128) or v.shape[3] != call.q.shape[3]:
        return f"its heads are {call.q.shape[3]} wide, of {call.q.dtype}"
    if not describable(call.q, call.k, v):
        return "its tensors are not laid out for bulk copies"
    if call.softcap is not None or call.first_token is not None or call.key_offset:
        return "softcap, padding and a cropped cache are the Triton kernel's"
    if mask.window is not None and any(pattern.kind in ("lines", "vertical_slash") for pattern in patterns):
        return "diagonals and columns under a window of the model's own are the Triton kernel's"
    if mask.key_valid is not None or mask.query_segments is not None:
        return "padding and packed sequences are the Triton kernel's"
    return ""


def gluon_prefill(call: AttentionCall, patterns: Sequence[Pattern], lists: TileLists | None = None) -> tuple[Tensor, Tensor]:
    """(output [B, Nq, Hq, Dv], lse [B, Hq, Nq] float32) by the Hopper kernel, for calls that `gluon_supports`."""
    from headscope.kernels.gluon_sparse import QUERIES, WARPS, sparse_kernel
    from headscope.kernels.triton_interior import descriptor

    made = lists_for(call, patterns) if lists is None else lists
    assert call.v is not None
    front = call.query_offset % SIDE
    out, lse = outputs(call, front)
    device = call.q.device
    sinks = no_sinks(call.q.shape[1], device) if call.sink_logits is None else call.sink_logits.to(device, torch.float32).contiguous()
    items, planes = len(made.work), made.planes
    k_g, v_g = (call.k, call.v) if planes is None else gather_columns(call, made)
    nothing = made.rules
    tables = (nothing, nothing, nothing) if planes is None else (planes.columns, planes.diagonals, planes.marks)
    sizes = (0, 0) if planes is None else planes.columns.shape[1:3]
    sparse_kernel[(min(items, processors(device)),)](
        descriptor(call.q, QUERIES), *(descriptor(x, SIDE) for x in (call.k, call.v, k_g, v_g)),
        descriptor(out.transpose(1, 2), QUERIES), lse, made.work, made.rules, made.tiles, nothing if made.cells is None else made.cells,
        *tables, sinks, call.scale * LOG2E, items, call.q.shape[1], call.group, call.q.shape[2],
        call.query_offset, call.mask.window or ENDLESS, int(made.cells is not None), *sizes,
        GENERAL=planes is not None or made.cells is not None, D=call.q.shape[3], STAGES=2, num_warps=WARPS,
    )  # fmt: skip
    return out[:, front:].contiguous(), lse


@lru_cache(maxsize=16)
def no_sinks(heads: int, device: torch.device) -> Tensor:
    """[heads] float32: sink logits that weigh nothing."""
    return torch.full((heads,), -torch.inf, device=device)


def table_widths(lists: TileLists) -> tuple[int, int, int]:
    """Columns, gaps and positions of a slot."""
    if lists.columns is None or lists.gaps is None or lists.marked is None:
        return 0, 0, 0
    return lists.columns.shape[1], lists.gaps.shape[1], lists.marked.shape[1]


def gather_columns(call: AttentionCall, lists: TileLists) -> tuple[Tensor, Tensor]:
    """Keys and values of each head's single columns side by side, [B, Hq, C, D] each: tiles for bulk copies."""
    assert lists.columns is not None
    assert call.v is not None
    batch, heads = call.q.shape[:2]
    device = call.q.device
    at = lists.columns[lists.slots.clamp(min=0)].long().clamp(max=call.k.shape[2] - 1)
    b = torch.arange(batch, device=device)[:, None, None]
    h = (torch.arange(heads, device=device) // call.group)[None, :, None]
    return call.k[b, h, at], call.v[b, h, at]


def outputs(call: AttentionCall, front: int = 0) -> tuple[Tensor, Tensor]:
    """Uninitialised (output [B, front + Nq, Hq, Dv], lse [B, Hq, Nq] float32); NaN where tests want that."""
    assert call.v is not None
    batch, heads, rows, _ = call.q.shape
    out = call.q.new_empty(batch, front + rows, heads, call.v.shape[3])
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=call.q.device)
    return (out.fill_(torch.nan), lse.fill_(torch.nan)) if POISON else (out, lse)

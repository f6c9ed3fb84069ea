"""Decoding an AttentionCall with the split-KV kernels: from patterns to the rules and lists that they read.

Dense, streaming and span heads become rules, whose tables are on the device once and for all; so do choices that were made once ("these
keys, and all since"). Every other static pattern becomes a list of the keys that its one row sees. Dynamic patterns choose their keys
before (`headscope.plans.execute_decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.kernels.sparse_decode_host import MAX_ROWS, NEVER, KeyLists, Places, cut, decode
from headscope.plans.indices import Chosen
from headscope.plans.patterns import Dense, Pattern, Span, Streaming

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WORTH_BYTES = 16 << 20
"""Bytes of keys and values that a step must save to be faster than dense: the joining kernel takes about as long as reading them."""
WIDEST = 256
"""Largest head_dim."""


def decode_refuses(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "" when the decode kernels run this call under these patterns, else the reason why they do not."""
    from headscope.kernels.triton_common import INTERPRETED

    rows, mask = call.q.shape[2], call.mask
    if not call.q.is_cuda and not INTERPRETED:
        return f"the call is on {call.q.device}"
    if rows * call.group > MAX_ROWS or call.group > 31:
        return f"{rows} rows of {call.group} heads a key head are more than a decode step has"
    if call.v is None or call.q.dtype not in DTYPES or call.k.dtype != call.q.dtype or call.v.dtype != call.q.dtype:
        return f"keys of {call.k.dtype} and queries of {call.q.dtype}"
    if max(call.q.shape[-1], call.v.shape[-1]) > WIDEST:
        return f"head_dim {max(call.q.shape[-1], call.v.shape[-1])} is above {WIDEST}"
    if not mask.causal or call.is_cross or call.query_offset + rows != call.key_offset + call.k.shape[2]:
        return "its rows are not the last of a causal text"
    if mask.allowed is not None or mask.bias is not None or mask.key_segments is not None:
        return "its mask is more than causality, a window and padding"
    for pattern in set(patterns):
        if not pattern.static:
            return f"the keys of {pattern.kind} are chosen per input"
        if getattr(pattern, "compensate", False):
            return "compensation keys are not in its cache"
        if rows > 1 and not isinstance(pattern, Dense | Streaming | Span | Chosen):
            return f"{pattern.kind} keeps other keys for each of {rows} rows"
    return ""


def decode_worth_it(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "" when a decode step under these patterns is faster than the model's dense kernel, or the reason why it is not.

    Both read keys as fast as the device can, so the parts read decide, beside what a second kernel costs on short texts (measured by
    `headscope bench decode`). On a CPU always "": there the plan's result is what is asked for.
    """
    if not call.q.is_cuda:
        return ""
    keys = call.k.shape[2]
    read = sum(min(keys, one) for one in visits(patterns, keys, call.group)) / (keys * call.k.shape[1])
    saved = (1.0 - read) * 2 * call.k.shape[0] * call.k.shape[1] * keys * call.k.shape[3] * call.k.element_size()
    if saved < WORTH_BYTES:
        return f"a decode step would read {read:.0%} of its keys, and what that saves is less than what it costs"
    return ""


def decode_attention(call: AttentionCall, patterns: Sequence[Pattern]) -> tuple[Tensor, Tensor]:
    """(output [B, n, Hq, Dv] in q's dtype, lse [B, Hq, n] float32) of a call that `decode_refuses` lets pass."""
    assert call.v is not None
    rules, lists = rules_and_lists(call, tuple(patterns))
    return launched(call, Places.of(call.k, call.v), rules, lists, visits(patterns, call.k.shape[2], call.group))


def launched(call: AttentionCall, places: Places, rules: Tensor, lists: KeyLists | None, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Runs the kernels over the keys at `places`, cut up for about `keys` of each key head."""
    batch, device = call.q.shape[0], call.q.device
    length = call.query_offset + call.q.shape[2] - call.key_offset
    return decode(
        call.q,
        places,
        rules,
        _lengths(batch, length, device),
        cut(keys, batch, device),
        scale=call.scale,
        starts=local_starts(call),
        lists=lists,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        window=call.mask.window,
        key_valid=call.mask.key_valid,
    )


def local_starts(call: AttentionCall) -> Tensor | None:
    """[B] int32: index of each sequence's first real token among the keys, below 0 where it has left the cache."""
    if call.first_token is not None:
        return (call.first_token - call.key_offset).to(device=call.q.device, dtype=torch.int32)
    if call.key_offset == 0:
        return None
    return torch.full((call.q.shape[0],), -call.key_offset, dtype=torch.int32, device=call.q.device)


@lru_cache(maxsize=64)
def _lengths(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def visits(patterns: Sequence[Pattern], length: int, group: int) -> list[int]:
    """About how many keys a row of each key head's group reads; what the work is cut by."""
    each = [length if isinstance(pattern, Dense) else int(pattern.cached(length)) for pattern in patterns]
    return [max(each[at : at + group]) for at in range(0, len(each), group)]


def rules_and_lists(call: AttentionCall, patterns: tuple[Pattern, ...]) -> tuple[Tensor, KeyLists | None]:
    """What `sparse_decode_host.decode` reads, for static patterns; in places of the call's own keys."""
    length = call.query_offset + call.q.shape[2]
    device = call.q.device
    if call.first_token is None:
        rules = _rules(patterns, length, -call.key_offset, device)
    else:
        rules = _rules(tuple(Dense() if isinstance(one, Span) else one for one in patterns), length, 0, device).repeat(
            call.q.shape[0], 1, 1
        )
        start = (call.first_token - call.key_offset).to(device=device, dtype=torch.int32)
        counted = torch.tensor([isinstance(one, Chosen) for one in patterns], device=device)
        rules[:, :, 2] += torch.where(counted, start[:, None], 0)
        for head, one in enumerate(patterns):
            if isinstance(one, Span):
                seen = (length - call.first_token.to(device)).double()
                window = (one.alpha + one.beta * seen).floor().minimum(seen).clamp(min=1)
                rules[:, head] = torch.stack([torch.full_like(window, one.sink), window, torch.full_like(window, NEVER)], -1).to(
                    torch.int32
                )
    if all(_is_range(one) for one in patterns):
        return rules, None
    starts = [0] if call.first_token is None else [int(one) for one in call.first_token]
    group = call.group
    parts = [
        _entries(patterns[at : at + group], length - start - 1, start - call.key_offset)
        for start in starts
        for at in range(0, len(patterns), group)
    ]
    return rules, _stacked(parts, len(starts), call.q.shape[0], device)


def _is_range(pattern: Pattern) -> bool:
    return isinstance(pattern, Dense | Streaming | Span) or (isinstance(pattern, Chosen) and not pattern.columns)


@lru_cache(maxsize=256)
def _rules(patterns: tuple[Pattern, ...], length: int, start: int, device: torch.device) -> Tensor:
    """[1, Hq, 3] int32: sink, window, since per head."""
    rows = []
    for pattern in patterns:
        one = pattern.fixed(length)
        if isinstance(one, Dense):
            rows.append((0, NEVER, -NEVER))
        elif isinstance(one, Streaming):
            rows.append((one.sink, min(one.window, NEVER), NEVER))
        elif isinstance(one, Chosen):
            rows.append((0, 0, one.since + start))
        else:
            rows.append((0, 0, NEVER))
    return torch.tensor([rows], dtype=torch.int32).to(device)


@lru_cache(maxsize=256)
def _entries(patterns: tuple[Pattern, ...], row: int, start: int) -> tuple[Tensor, Tensor]:
    """(places, bits) int32 of the keys that a group's row at position `row` sees beside its ranges; `start`: place of position 0."""
    bits = torch.zeros(row + 1, dtype=torch.int32)
    for head, pattern in enumerate(patterns):
        if _is_range(pattern):
            continue
        if isinstance(pattern, Chosen):
            keys = torch.tensor([one for one in pattern.columns if one < min(pattern.since, row + 1)], dtype=torch.int64)
        else:
            keys = pattern.reach(row, row)
            keys = keys[pattern.visible(torch.tensor([row]), keys)[0]]
        bits[keys] |= 1 << head
    keys = bits.nonzero().flatten()
    keys = keys[keys + start >= 0]
    return (keys + start).to(torch.int32), bits[keys]


def _stacked(parts: list[tuple[Tensor, Tensor]], starts: int, batch: int, device: torch.device) -> KeyLists:
    """KeyLists of parts in the order (sequence, key head); one sequence stands for all where there is one."""
    room = max(1, *(len(entries) for entries, _ in parts))
    padded = [torch.stack([torch.nn.functional.pad(one, (0, room - len(one))) for one in column]) for column in zip(*parts, strict=True)]
    counts = torch.tensor([len(entries) for entries, _ in parts], dtype=torch.int32)
    shaped = [x.reshape(starts, -1, *x.shape[1:]) for x in (*padded, counts)]
    entries, bits, count = (x.expand(batch, *x.shape[1:]).contiguous().to(device) for x in shaped)
    return KeyLists(entries, bits, count)

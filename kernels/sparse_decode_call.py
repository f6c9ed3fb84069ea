"""Decoding an AttentionCall with the split-KV kernels: from patterns to the rules and lists that they read.

Dense, streaming and span heads become rules, whose tables are on the device once and for all; so do choices that were made once ("these
keys, and all since"). Every other static pattern becomes a list of the keys that its one row sees. Dynamic patterns choose their keys
before (`headscope.plans.execute_decode`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.kernels.sparse_decode_host import LISTS_A_PROCESSOR, MAX_ROWS, NEVER, KeyLists, Places, cut, decode, rounded
from headscope.plans.indices import Chosen
from headscope.plans.patterns import Blocks, Dense, Lines, Pattern, Power, Span, Streaming, Strided

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
    for pattern in _distinct(patterns):
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
    rules, lists = rules_and_lists(call, patterns if isinstance(patterns, tuple) else tuple(patterns))
    return launched(call, Places.of(call.k, call.v), rules, lists, visits(patterns, call.k.shape[2], call.group))


def launched(
    call: AttentionCall, places: Places, rules: Tensor, lists: KeyLists | None, keys: Sequence[int], ranges: bool = True
) -> tuple[Tensor, Tensor]:
    """Runs the kernels over the keys at `places`, cut up for about `keys` of each key head. `ranges`: some rule keeps keys."""
    batch, device = call.q.shape[0], call.q.device
    length = call.query_offset + call.q.shape[2] - call.key_offset
    return decode(
        call.q,
        places,
        rules,
        _lengths(batch, length, device),
        cut(keys, batch, device, per_processor=2.0 if ranges else LISTS_A_PROCESSOR),
        scale=call.scale,
        starts=local_starts(call),
        lists=lists,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        window=call.mask.window,
        key_valid=call.mask.key_valid,
        ranges=ranges,
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
    return list(_visits(patterns if isinstance(patterns, tuple) else tuple(patterns), rounded(length), length, group))


def _visits(patterns: tuple[Pattern, ...], step: int, length: int, group: int) -> tuple[int, ...]:
    each = _reads(patterns, step)
    return tuple(min(length, max(each[at : at + group])) for at in range(0, len(each), group))


@lru_cache(maxsize=256)
def _reads(patterns: tuple[Pattern, ...], length: int) -> tuple[int, ...]:
    """Keys that a row of each head reads in a text of about `length` tokens."""
    known = {pattern: _read(pattern, length) for pattern in dict.fromkeys(patterns)}
    return tuple(known[pattern] for pattern in patterns)


def _read(pattern: Pattern, length: int) -> int:
    if isinstance(pattern, Lines):
        return min(length, len(pattern.columns) + len(pattern.diagonals) + 1)
    if isinstance(pattern, Blocks):
        return min(length, len(pattern.row(length // pattern.block)) * pattern.block)
    if isinstance(pattern, Power):
        return min(length, pattern.sink + pattern.window + (length // pattern.block).bit_length() * pattern.block)
    return int(pattern.cached(length))


def rules_and_lists(call: AttentionCall, patterns: tuple[Pattern, ...], single: bool = False) -> tuple[Tensor, KeyLists | None]:
    """What `sparse_decode_host.decode` reads, for static patterns; in places of the call's own keys. The same tensors come back as long as
    they say the same: patterns that go by tiles are listed anew once a tile, and not once a step. `single`: lists of keys, not of blocks.
    """
    length = call.query_offset + call.q.shape[2]
    device = call.q.device
    distinct = _distinct(patterns)
    spans = any(isinstance(one, Span) for one in distinct)
    if call.first_token is None:
        rules = _rules(patterns, length if spans else 1 << 30, -call.key_offset, device)
    else:
        rules = _rules(tuple(Dense() if isinstance(one, Span) else one for one in patterns), 1 << 30, 0, device).repeat(
            call.q.shape[0], 1, 1
        )
        start = (call.first_token - call.key_offset).to(device=device, dtype=torch.int32)
        counted = torch.tensor([isinstance(one, Chosen) for one in patterns], device=device)
        rules[:, :, 2] += torch.where(counted, start[:, None], 0)
        for head, one in enumerate(patterns):
            if isinstance(one, Span):
                seen = (length - call.first_token.to(device)).double()
                window = (one.alpha + one.beta * seen).floor().clamp(min=one.floor).minimum(seen).clamp(min=1)
                rules[:, head] = torch.stack([torch.full_like(window, one.sink), window, torch.full_like(window, NEVER)], -1).to(
                    torch.int32
                )
    if all(_is_range(one) for one in distinct):
        return rules, None
    starts = (0,) if call.first_token is None else tuple(int(one) for one in call.first_token.tolist())
    offsets = tuple(start - call.key_offset for start in starts)
    rows = tuple(length - start - 1 for start in starts)
    unit = 1 if single or any(offsets) else _unit(patterns)
    marks = tuple(_marks(patterns, row) for row in rows)
    return rules, _made_lists(patterns, marks, offsets, unit, call.group, call.q.shape[0], device)


def _distinct(patterns: Sequence[Pattern]) -> Sequence[Pattern]:
    """Each pattern once; an executor's `Heads` know that."""
    known: Sequence[Pattern] | None = getattr(patterns, "distinct", None)
    return tuple(dict.fromkeys(patterns)) if known is None else known


def _is_range(pattern: Pattern) -> bool:
    return isinstance(pattern, Dense | Streaming | Span) or (isinstance(pattern, Chosen) and not pattern.columns)


@lru_cache(maxsize=256)
def _unit(patterns: tuple[Pattern, ...]) -> int:
    """Keys of an entry that serves all listed patterns: a power of two that divides their tiles."""
    unit = 128
    for one in dict.fromkeys(patterns):
        if not _is_range(one):
            unit = math.gcd(unit, one.block) if isinstance(one, Strided | Power | Blocks) else 1
    return unit


def _marks(patterns: tuple[Pattern, ...], row: int) -> tuple[int, ...]:
    """What the listed keys of a row depend on: the tiles it lies in, or itself."""
    return tuple(row // size if size else row for size in _sizes(patterns))


@lru_cache(maxsize=256)
def _sizes(patterns: tuple[Pattern, ...]) -> tuple[int, ...]:
    """The distinct tile sizes of the listed patterns; 0 where one goes by single rows."""
    found = dict.fromkeys(one for one in patterns if not _is_range(one))
    return tuple(dict.fromkeys(one.block if isinstance(one, Strided | Power | Blocks) else 0 for one in found))


@lru_cache(maxsize=64)
def _made_lists(
    patterns: tuple[Pattern, ...],
    marks: tuple[tuple[int, ...], ...],
    offsets: tuple[int, ...],
    unit: int,
    group: int,
    batch: int,
    device: torch.device,
) -> KeyLists:
    """KeyLists for rows at the `marks`: in order of tiles, keys behind the row among them, which the kernel leaves out."""
    sizes = _sizes(patterns)
    parts = []
    for mark, offset in zip(marks, offsets, strict=True):
        row = max(place * size + size - 1 if size else place for place, size in zip(mark, sizes, strict=True))
        exact = dict(zip(sizes, mark, strict=True))
        parts += [_entries(patterns[at : at + group], exact, row, unit, offset) for at in range(0, len(patterns), group)]
    return _stacked(parts, len(marks), batch, device, unit)


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
        elif isinstance(one, Strided | Power):
            rows.append((one.sink, min(one.window, NEVER), NEVER))
        else:
            rows.append((0, 0, NEVER))
    return torch.tensor([rows], dtype=torch.int32).to(device)


def _entries(patterns: tuple[Pattern, ...], marks: dict[int, int], row: int, unit: int, offset: int) -> tuple[Tensor, Tensor]:
    """(entries, bits) int32 of what a group sees beside its ranges, in units of `unit` keys; `marks`: the tile of each size that the newest
    row lies in, and under 0 that row itself; `row`: the last one of these tiles; `offset`: place of position 0.
    """
    bits = torch.zeros(row // unit + 1, dtype=torch.int32)
    for head, pattern in enumerate(patterns):
        if not _is_range(pattern):
            bits[_seen(pattern, marks, unit)] |= 1 << head
    found = bits.nonzero().flatten()
    found = found[found * unit + offset >= 0]
    return (found + offset // unit).to(torch.int32), bits[found]


def _seen(pattern: Pattern, marks: dict[int, int], unit: int) -> Tensor:
    """Units, each once, in which a pattern sees keys beside its range."""
    if isinstance(pattern, Strided | Power | Blocks):
        tile = marks[pattern.block]
        if isinstance(pattern, Strided):
            tiles = torch.arange(pattern.offset, tile + 1, pattern.stride)
        elif isinstance(pattern, Blocks):
            tiles = torch.tensor(pattern.row(tile), dtype=torch.int64)
        else:
            tiles = torch.tensor([tile - (1 << i) for i in range(tile.bit_length()) if tile >= 1 << i], dtype=torch.int64)
        each = pattern.block // unit
        return (tiles[:, None] * each + torch.arange(each)).flatten()
    row = marks[0]
    if isinstance(pattern, Chosen):
        return torch.tensor([one for one in pattern.columns if one < min(pattern.since, row + 1)], dtype=torch.int64)
    if isinstance(pattern, Lines):
        columns = torch.tensor(pattern.columns, dtype=torch.int64)
        back = row - torch.tensor(sorted({0, *pattern.diagonals}), dtype=torch.int64)
        return torch.cat([columns[columns <= row], back[back >= 0]]).unique()
    keys = pattern.reach(row, row)
    return keys[pattern.visible(torch.tensor([row]), keys)[0]]


def _stacked(parts: list[tuple[Tensor, Tensor]], starts: int, batch: int, device: torch.device, unit: int) -> KeyLists:
    """KeyLists of parts in the order (sequence, key head); one sequence stands for all where there is one."""
    room = max(1, *(len(entries) for entries, _ in parts))
    padded = [torch.stack([torch.nn.functional.pad(one, (0, room - len(one))) for one in column]) for column in zip(*parts, strict=True)]
    counts = torch.tensor([len(entries) for entries, _ in parts], dtype=torch.int32)
    shaped = [x.reshape(starts, -1, *x.shape[1:]) for x in (*padded, counts)]
    entries, bits, count = (x.expand(batch, *x.shape[1:]).contiguous().to(device) for x in shaped)
    return KeyLists(entries, bits, count, unit)

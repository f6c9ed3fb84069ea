"""Launching the decode kernels: where keys lie, what heads see, how the work is cut up.

`decode` takes device tensors only and never looks at them, so it can be captured in a CUDA graph: what may change from step to step
(lengths, rules, lists, keys) is read by the kernel, what may not (shapes, the cutting of the work) is fixed when the graph is captured.
The cutting decides how fast a step is, never what it gives, up to the order of float32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import PlanError, refusal
from headscope.kernels.triton_host import cdiv, padded

if TYPE_CHECKING:
    from torch import Tensor

NEVER = 1 << 30
"""A position no text reaches: `since` of a head that keeps no tail, `window` of a head that keeps all."""
MAX_ROWS = 64
"""Rows of a program: query heads of a group times query rows."""

LISTS_A_PROCESSOR = 3.0
"""Programs a processor where lists say all that is read: the registers that ranges would take are free then."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the keys and values of a step lie: `k`, `v` the tensors that hold them, [..., D] and [..., Dv].

    `base_k`, `base_v` [B, Hkv] int64: elements from the tensor's start to a head's place 0; `stride_*`: elements from one key, and one
    value of a key, to the next. `table` [Hkv, 3] int32 (fixed, ring, shift): a key at position p lies at place p + shift; where `ring` is
    above 0, at p + shift for the first `fixed` of the text and behind them around a ring of that many. With `fixed` -1 the list of a head
    names places instead of positions.
    """

    k: Tensor
    v: Tensor
    base_k: Tensor
    base_v: Tensor
    stride_k: tuple[int, int]
    stride_v: tuple[int, int]
    table: Tensor
    ring: bool = False
    aligned: bool = False
    """Every base is a multiple of 16 elements."""
    held: tuple[Tensor, ...] = ()
    """Whatever else the bases point into; it must not be freed meanwhile."""

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Places:
        """Of a plain cache: k [B, Hkv, N, D], v [B, Hkv, N, Dv] with any strides; position p lies at index p."""
        batch, heads = k.shape[:2]
        base_k, base_v = (_bases(x.device, batch, heads, x.stride(0), x.stride(1)) for x in (k, v))
        aligned = all(step % 16 == 0 for x in (k, v) for step in x.stride()[:2])
        return cls(
            k, v, base_k, base_v, (k.stride(2), k.stride(3)), (v.stride(2), v.stride(3)), _plain_table(k.device, heads), False, aligned
        )

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.base_k.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return self.base_k.shape[1]


@dataclass(frozen=True, eq=False)
class KeyLists:
    """Listed keys of each key head: `entries` [B, Hkv, C] int32, the numbers of blocks of `block` keys (1: keys themselves), in any order
    and each once; `bits` [B, Hkv, C] int32: bit h is set when query head h of the group keeps the entry; `counts` [B, Hkv] int32: how many
    entries are there. A block is a power of two of at most 128 keys, counted from position 0.
    """

    entries: Tensor
    bits: Tensor
    counts: Tensor
    block: int = 1


@dataclass(frozen=True, eq=False)
class DecodeWork:
    """How the keys are cut up: `table` [P, 3] int32 (key head, part, parts) of every program, `spans` [Hkv, 2] int32 (first, parts)."""

    table: Tensor
    spans: Tensor

    @property
    def parts(self) -> int:
        """Programs of one sequence."""
        return self.table.shape[0]


def cut(keys: Sequence[int], batch: int, device: torch.device, *, per_processor: float = 2.0, least: int = 128) -> DecodeWork:
    """Parts for key heads with about `keys` keys each: as many as fill the device's processors `per_processor` times over the batch, of at
    least `least` keys.
    """
    return _cut(tuple(rounded(max(1, int(count))) for count in keys), batch, device, per_processor, least)


def rounded(count: int) -> int:
    """Up to an eighth of a power of two: a text that grows is not to be cut anew at every step."""
    step = max(1, 1 << max(0, count.bit_length() - 4))
    return cdiv(count, step) * step


@lru_cache(maxsize=512)
def _cut(keys: tuple[int, ...], batch: int, device: torch.device, per_processor: float, least: int) -> DecodeWork:
    chunk = _chunk(keys, max(len(keys), int(_processors(device) * per_processor / batch)), least)
    parts = [cdiv(count, chunk) for count in keys]
    table = [(head, part, count) for head, count in enumerate(parts) for part in range(count)]
    spans, first = [], 0
    for count in parts:
        spans.append((first, count))
        first += count
    return DecodeWork(
        torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True),
        torch.tensor(spans, dtype=torch.int32).to(device, non_blocking=True),
    )


def _chunk(keys: tuple[int, ...], slots: int, least: int) -> int:
    """The fewest keys a part for which all parts run at once: one part more than there is room for would double the time."""
    low, high = least, max(least, *keys)
    while low < high:
        middle = (low + high) // 2
        if sum(cdiv(count, middle) for count in keys) <= slots:
            high = middle
        else:
            low = middle + 1
    return low


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


@lru_cache(maxsize=256)
def _bases(device: torch.device, batch: int, heads: int, step_b: int, step_h: int) -> Tensor:
    """[B, H] int64 element offsets of every head of a strided tensor."""
    b, h = torch.arange(batch, device=device), torch.arange(heads, device=device)
    return (b[:, None] * step_b + h[None, :] * step_h).to(torch.int64).contiguous()


@lru_cache(maxsize=64)
def _plain_table(device: torch.device, heads: int) -> Tensor:
    return torch.zeros(heads, 3, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, dtype=dtype, device=device)


def decode(
    q: Tensor,
    places: Places,
    rules: Tensor,
    lengths: Tensor,
    work: DecodeWork,
    *,
    scale: float,
    starts: Tensor | None = None,
    lists: KeyLists | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    key_valid: Tensor | None = None,
    ranges: bool = True,
    launch: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [B, n, Hq, Dv] in q's dtype, lse [B, Hq, n] float32) of the last n rows of each sequence; q [B, Hq, n, D].

    `rules` [B or 1, Hq, 3] int32 (sink, window, since): a head sees the first `sink` keys of the text, the last `window` of each row, its
    own included, and every key at a position from `since` on; `lists` adds to them. `lengths` [B] int32: keys of each sequence, the n new
    ones included; `starts` [B] int32: position of its first real token. `window`: of the model itself, |t - s| < window for all heads.
    `key_valid` [B, N] bool by position hides keys. `ranges=False` says that no rule keeps anything, which saves registers. `launch`:
    (keys of a tile, warps, stages). Raises PlanError for shapes the kernel does not take.
    """
    from headscope.kernels.sparse_decode import decode_parts, join_parts
    from headscope.kernels.triton_common import INTERPRETED, LOG2E

    batch, heads, rows, width = q.shape
    value_width = places.v.shape[-1]
    group = heads // places.kv_heads
    if group * rows > MAX_ROWS or group > 31 or batch != places.batch or heads % places.kv_heads:
        raise refusal(
            PlanError,
            f"q {list(q.shape)} with {places.kv_heads} key heads of {places.batch} sequences",
            f"a decode step is at most {MAX_ROWS} rows a key head",
            "run it as a prefill",
        )
    block = 1 if lists is None else lists.block
    if block > 128 or block & (block - 1):
        raise refusal(PlanError, f"lists of blocks of {block}", "a block is a power of two of at most 128 keys", "use such a block")
    tile, warps, stages = launch or launch_for(width, places.k.element_size(), lists is not None)
    device, tall = q.device, padded(group * rows)
    out = torch.empty(batch, rows, heads, value_width, dtype=q.dtype, device=device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=device)
    o = torch.empty(batch, work.parts, tall, value_width, dtype=torch.float32, device=device)
    l = torch.empty(batch, work.parts, tall, dtype=torch.float32, device=device)  # noqa: E741
    none = _nothing(device, torch.int32)
    starts = _starts(device, batch) if starts is None else starts
    cap = softcap or 0.0
    chained = not INTERPRETED and _chains(device)
    pointers = (
        q, places.k, places.v, o, l, places.base_k, places.base_v, places.table, rules, lengths, starts, work.table,
        none if lists is None else lists.entries, none if lists is None else lists.bits, none if lists is None else lists.counts,
        none if key_valid is None else key_valid.view(torch.uint8),
    )  # fmt: skip
    numbers = (
        *q.stride(), *places.stride_k, *places.stride_v, 0 if rules.shape[0] == 1 else rules.stride(0),
        0 if lists is None else lists.entries.shape[2], 0 if key_valid is None else key_valid.stride(0),
        rows, places.kv_heads, NEVER if window is None else window,
    )  # fmt: skip
    factors = (scale * LOG2E, 2 * scale / cap * LOG2E if cap else 0.0, cap * LOG2E)
    flags = (
        group, tall, width, padded(width), value_width, padded(value_width), tile, block, lists is not None, ranges, places.ring,
        key_valid is not None, places.aligned, softcap is not None, INTERPRETED, chained,
    )  # fmt: skip
    launch_kernel(decode_parts, (work.parts, batch, 1), pointers, numbers, factors, flags, warps, stages, False)
    wide = min(padded(value_width), 32)
    launch_kernel(
        join_parts,
        (batch * heads * rows, cdiv(value_width, wide), 1),
        (o, l, out, lse, work.spans, none if sink_logits is None else sink_logits),
        (work.parts, rows, heads, *out.stride()[:3]),
        (),
        (group, tall, value_width, wide, 64, sink_logits is not None, chained),
        4,
        1,
        chained,
    )
    return out, lse


@lru_cache(maxsize=8)
def _chains(device: torch.device) -> bool:
    """Whether a kernel can be brought up while the one before it still runs (programmatic dependent launch)."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


_compiled: dict[tuple[Any, ...], Any] = {}


def launch_kernel(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    factors: tuple[float, ...],
    flags: tuple[Any, ...],
    warps: int,
    stages: int,
    chained: bool,
) -> None:
    """Launches a Triton kernel whose parameters stand in this order. What Triton would work out at every launch (which of the compiled
    variants fits these arguments) is remembered: it takes longer than a decode step does on the device.
    """
    from headscope.kernels.triton_common import INTERPRETED

    if INTERPRETED:
        kernel[grid](*pointers, *numbers, *factors, *flags, num_warps=warps, num_stages=stages)
        return
    kinds = tuple((x.dtype, x.data_ptr() % 16 == 0) for x in pointers)
    key = (id(kernel), pointers[0].device, kinds, tuple(1 if n == 1 else n % 16 == 0 for n in numbers), flags, warps, stages)
    known = _compiled.get(key)
    if known is None:
        more = {"launch_pdl": True} if chained else {}
        _compiled[key] = kernel[grid](*pointers, *numbers, *factors, *flags, num_warps=warps, num_stages=stages, **more)
    else:
        known[grid](*pointers, *numbers, *factors, *flags)


@lru_cache(maxsize=32)
def _starts(device: torch.device, batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int32, device=device)


def launch_for(width: int, size: int, listed: bool) -> tuple[int, int, int]:
    """(keys of a tile, warps, stages): about 64 KiB of keys and values in flight a program, two programs a processor; with lists, whose
    numbers are read first, smaller tiles and more stages.
    """
    row = padded(width) * size
    if listed and row <= 256:
        return 32, 4, 5
    if row <= 128:
        return 128, 4, 3
    if row <= 256:
        return 64, 4, 3
    return (32, 4, 3) if row <= 512 else (16, 4, 2)

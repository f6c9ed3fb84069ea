"""What the launchers of the Triton kernels share on the host: operands, strides, positions, counts. No kernel, no launch."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded(n: int) -> int:
    """The next power of two, at least 16: what a tile's width must be."""
    return max(16, 1 << (n - 1).bit_length())


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can hold them: 16-byte aligned base and strides, contiguous rows, no broadcast, two bytes an element."""
    for x in tensors:
        size = x.element_size()
        if x.stride(3) != 1 or x.data_ptr() % 16 or size != 2 or x.shape[3] * size % 16:
            return False
        if any(n > 1 and (step <= 0 or step * size % 16) for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)):
            return False
    return True


def operand(x: Tensor, rows: int, described: bool) -> object:
    """A tensor [B, H, N, D] as the kernels take it: itself, or a descriptor that loads `rows` rows of one head at once."""
    if not described:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    # the stride of a dimension of one element is never used, but the hardware wants it aligned
    strides = [x.shape[3] * 8 if n == 1 else step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, padded(x.shape[3])])


def broadcast_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of [B or 1, H or 1, Nq, Nk], zero where one entry serves all."""
    return (0, 0, 0, 0) if x is None else tuple(0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))


def by_position(x: Tensor | None, start: int, count: int, fill: int, device: torch.device) -> Tensor:
    """Columns start .. start + count of a tensor [N] or [B, N] by absolute position, `fill` beyond its end; [B or 1, count]."""
    if x is None:
        return torch.full((1, count), fill, device=device)
    x = torch.atleast_2d(x.to(device))[:, start : start + count]
    return torch.nn.functional.pad(x, (0, count - x.shape[1]), value=fill).contiguous()


@lru_cache(maxsize=8)
def zero(device: torch.device) -> Tensor:
    """[1, 1] int64 zero on a device."""
    return torch.zeros(1, 1, dtype=torch.int64, device=device)


def pooled(cells: Tensor, ratio: int, largest: bool) -> Tensor:
    """Map cells [B, H, nq, nk] joined `ratio` by `ratio` into larger blocks: their sum, or the largest."""
    if ratio == 1:
        return cells
    q_blocks, k_blocks = cdiv(cells.shape[2], ratio), cdiv(cells.shape[3], ratio)
    cells = torch.nn.functional.pad(cells, (0, k_blocks * ratio - cells.shape[3], 0, q_blocks * ratio - cells.shape[2]))
    cells = cells.view(*cells.shape[:2], q_blocks, ratio, k_blocks, ratio)
    return cells.amax((3, 5)) if largest else cells.sum((3, 5))


def diagonal_range(call: AttentionCall) -> tuple[int, int]:
    """First distance t - s of `diagonal_sum`, and how many there are."""
    keys = call.k.shape[2]
    last = call.query_offset + call.q.shape[2] - 1 - call.key_offset
    start = 0 if call.mask.causal else call.query_offset - (call.key_offset + keys - 1)
    return start, max(last - start + 1, 1)


def row_counts(call: AttentionCall, request: StatisticsRequest, counted: Tensor) -> dict[str, Tensor]:
    """How many counting rows [B or 1, Nq] stand behind every column, [B, Nk] int64, by prefix sums. Those of plain masks are kept, since
    every layer of a model asks for the same ones."""
    mask = call.mask
    tensors = (mask.key_valid, mask.query_valid, mask.query_segments, mask.key_segments, mask.allowed, mask.bias, request.rows)
    if any(one is not None for one in tensors):
        return _row_counts(call, request, counted)
    key = (
        mask.causal, mask.window, call.q.shape[0], call.q.shape[2], call.k.shape[2], call.query_offset, call.key_offset, call.q.device,
        request.needs("column_sum", "sink_importance"), request.fai_band if request.needs("fai") else None,
    )  # fmt: skip
    if key not in _plain_counts:
        if len(_plain_counts) >= 8:
            _plain_counts.clear()
        _plain_counts[key] = _row_counts(call, request, counted)
    return dict(_plain_counts[key])


_plain_counts: dict[tuple[object, ...], dict[str, Tensor]] = {}


def _row_counts(call: AttentionCall, request: StatisticsRequest, counted: Tensor) -> dict[str, Tensor]:
    rows, keys, batch = call.q.shape[2], call.k.shape[2], call.q.shape[0]
    before = torch.nn.functional.pad(counted.to(torch.int64).cumsum(1), (1, 0))
    position = torch.arange(call.key_offset, call.key_offset + keys, device=counted.device)

    def up_to(t: Tensor) -> Tensor:
        """Counting rows at absolute positions below t."""
        return before[:, (t - call.query_offset).clamp(0, rows)]

    total = before[:, -1:]
    counts = {}
    if request.needs("column_sum", "sink_importance"):
        counts["row_count"] = total - up_to(position) if call.mask.causal else total.expand(-1, keys)
    if request.needs("fai"):
        lo, hi = request.fai_band
        counts["fai_count"] = (total if hi is None else up_to(position + hi + 1)) - up_to(position + lo)
    for name, value in counts.items():
        value = value.expand(batch, -1)
        if call.mask.key_valid is not None:
            value = torch.where(call.mask.key_valid.to(torch.bool), value, 0)
        counts[name] = value.contiguous()
    return counts

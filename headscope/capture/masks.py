"""Mask formats: from whatever an attention implementation was handed to what a query may see.

The same padding reaches eager attention as an additive matrix, sdpa as a boolean one, flash attention as a two-dimensional mask, flex
attention as a BlockMask, and any of them as None, where None means "causal" to one and "everything" to another. `MaskFacts` says it in O(N)
where that is the whole truth: a matrix is compared, block of rows by block of rows, with causality, window, padding and packed sequences,
and only a matrix that says something else is kept. The comparison is made once per matrix; all layers of a forward pass share it.

The silent failure this avoids: a mask taken for what it is usually called instead of for what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from headscope.call import MaskFacts
from headscope.errors import CaptureError, refusal

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_CELLS = 1 << 22
"""Cells of a mask that are looked at together."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a call lies and what may explain its mask.

    `batch`, `rows`, `keys`: B, Nq, Nk (after unused keys of a static cache were cut off). `query_offset`, `key_offset`: absolute.
    `causal`: what the host says about itself. `windows`: widths worth trying, each for the causal reading (t - s < w).
    `padding` [B, end] bool by absolute position, or None where the model was given none; `known` the same from earlier calls.
    `unpadded`: positions before it are known to be real, where no such mask is.
    `segments` [B, Nq] packed sequence numbers, for calls whose queries and keys are the same tokens.
    """

    batch: int
    rows: int
    keys: int
    query_offset: int
    key_offset: int
    causal: bool
    cross: bool = False
    windows: tuple[int, ...] = ()
    padding: Tensor | None = None
    known: Tensor | None = None
    segments: Tensor | None = None
    device: torch.device | str = "cpu"
    unpadded: int = 0

    @property
    def end(self) -> int:
        """Absolute position after the last key."""
        return self.key_offset + self.keys


class DenseMask:
    """A mask that can be asked for any block of its rows: [B or 1, H or 1, n, Nk] bool, True = visible."""

    def __init__(self, shape: tuple[int, int, int, int], read: Callable[[int, int], Tensor], bias: Tensor | None = None) -> None:
        self.shape = shape
        self.read = read
        self.bias = bias

    def blocks(self) -> list[tuple[int, int]]:
        """Row ranges of at most BLOCK_CELLS cells."""
        batch, heads, rows, keys = self.shape
        step = max(1, BLOCK_CELLS // max(1, batch * heads * keys))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def whole(self) -> Tensor:
        """All of it."""
        return torch.cat([self.read(*block) for block in self.blocks()], 2)


def from_tensor(mask: Tensor, rows: int, keys: int) -> DenseMask:
    """A 4-D (or 3-D) boolean or additive mask. What it adds beside masking becomes the bias."""
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if mask.dim() == 2:
        mask = mask[None, None]
    if mask.dim() != 4 or mask.shape[2] not in (1, rows) or (mask.shape[3] < keys and mask.shape[3] != 1):
        raise refusal(
            CaptureError,
            f"an attention mask of shape {list(mask.shape)} for {rows} queries and {keys} keys",
            "it has none of the forms known: [B, 1, Nq, Nk], [B, H, Nq, Nk] or [B, Nk]",
            "pass the model a [B, N] padding mask or a 4-D mask",
        )
    mask = mask[..., :keys].expand(-1, -1, rows, keys)
    shape = (mask.shape[0], mask.shape[1], rows, keys)
    if mask.dtype == torch.bool:
        return DenseMask(shape, lambda low, high: mask[:, :, low:high])
    if not mask.is_floating_point():
        return DenseMask(shape, lambda low, high: mask[:, :, low:high] != 0)
    floor = torch.finfo(mask.dtype).min / 2

    def visible(low: int, high: int) -> Tensor:
        return mask[:, :, low:high] > floor

    dense = DenseMask(shape, visible)
    if any(bool((mask[:, :, low:high].masked_fill(~visible(low, high), 0) != 0).any()) for low, high in dense.blocks()):
        dense.bias = mask.masked_fill(~(mask > floor), 0)
    return dense


def from_block_mask(mask: Any, rows: int, keys: int, device: torch.device | str) -> DenseMask:
    """A flex attention BlockMask, evaluated from its own mask function."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.shape[:2]

    def read(low: int, high: int) -> Tensor:
        def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            out: Tensor = mask.mask_mod(b, h, q + low, k)
            return out

        return create_mask(shifted, batch, heads, high - low, keys, device=device)

    return DenseMask((batch, heads, rows, keys), read)


def plain(place: Place, causal: bool, window: int | None = None, key_valid: Tensor | None = None) -> MaskFacts:
    """Facts of a call that has no mask matrix; `key_valid` [B, Nk] only where the kernel itself was told."""
    rows_valid = place.padding
    if rows_valid is None and key_valid is not None:
        rows_valid = torch.ones(place.batch, place.end, dtype=torch.bool, device=place.device)
        rows_valid[:, place.key_offset :] = key_valid
    facts = _facts(place, None, rows_valid, causal=causal, window=window)
    return replace(facts, key_valid=_or_none(key_valid))


def recognise(mask: DenseMask, place: Place) -> MaskFacts:
    """Facts equal to a mask matrix; the matrix itself only when no facts are."""
    seen = _seen_keys(mask) if place.padding is None else None
    # The windows come before "no window": a single decoded row cannot tell keys out of its window from padded ones.
    windows: list[int | None] = [*dict.fromkeys(place.windows), None]
    if mask.shape[1] == 1:
        for causal, window, packed in product((place.causal, not place.causal), windows, (False, True)):
            if packed and (place.segments is None or place.cross):
                continue
            valid, rows_valid = _validity(seen, place, window)
            facts = _facts(place, valid, rows_valid, causal=causal, window=window)
            if packed:
                facts = replace(facts, query_segments=place.segments, key_segments=place.segments)
            if _equal(mask, facts, place):
                return replace(facts, bias=mask.bias)
    valid, rows_valid = _validity(seen, place, None)
    allowed = mask.whole()
    causal = _never(mask, place, lambda t, s: s > t)
    base = _facts(place, valid, rows_valid, causal=causal, window=None)
    if base.key_valid is not None and bool((allowed & ~base.key_valid[:, None, None, :]).any()):
        base = replace(base, key_valid=None)
    return replace(base, allowed=allowed, bias=mask.bias)


def visible(facts: MaskFacts, t: Tensor, s: Tensor, low: int = 0) -> Tensor:
    """[B or 1, H or 1, n, Nk] bool: what the facts let the queries at absolute positions t (rows `low` on) see of the keys at s."""
    distance = t[:, None] - s[None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if facts.causal:
        seen &= distance >= 0
    if facts.window is not None:
        seen &= (distance if facts.causal else distance.abs()) < facts.window
    out = seen[None, None]
    if facts.key_valid is not None:
        out = out & facts.key_valid[:, None, None, :]
    if facts.query_segments is not None and facts.key_segments is not None:
        out = out & (facts.query_segments[:, None, low : low + len(t), None] == facts.key_segments[:, None, None, :])
    if facts.allowed is not None:
        out = out & facts.allowed[:, :, low : low + len(t)]
    return out


def _seen_keys(mask: DenseMask) -> Tensor:
    """[B, Nk] bool: some row of some head sees the key."""
    parts = [mask.read(low, high).any(2).any(1) for low, high in mask.blocks()]
    return torch.stack(parts).any(0)


def _validity(seen: Tensor | None, place: Place, window: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Which keys, and which rows, are real tokens: two [B, end] bool masks by absolute position, None where all are.

    The model's own padding mask answers both. Without one (a mask made beforehand, as generate() does for static caches) a key that no
    row sees is taken for padding; a row only if it lies in the padding at either end, for a key hidden in the middle may be somebody's
    experiment, and its row still attends.
    """
    if seen is None:
        return place.padding, place.padding
    valid = torch.ones(place.batch, place.end, dtype=torch.bool, device=place.device)
    first = place.key_offset  # keys that even the first row's window cannot reach may be unseen and yet real
    if window is not None and not place.cross:
        first = max(first, place.query_offset - window + 1)
    valid[:, first:] = seen[:, first - place.key_offset :]
    if place.known is not None and place.known.shape[0] == place.batch:
        length = min(place.known.shape[1], place.query_offset)
        valid[:, :length] = place.known[:, :length]
    elif place.unpadded:  # a key that this step's rows do not see (chunked attention) was seen as a real one before
        valid[:, : min(place.unpadded, place.query_offset)] = True
    if bool(valid.all()):
        return None, None
    count = valid.int()
    inner = (count.cumsum(1) > 0) & (count.flip(1).cumsum(1).flip(1) > 0)
    return valid, inner


def _facts(place: Place, keys: Tensor | None, rows: Tensor | None, *, causal: bool, window: int | None) -> MaskFacts:
    """Facts from two [B, end] masks by absolute position: keys hidden from every query, and rows that are real tokens."""
    key_valid = None if keys is None else keys[:, place.key_offset : place.end]
    query_valid = None
    if rows is not None and not place.cross and rows.shape[1] >= place.query_offset + place.rows:
        query_valid = rows[:, place.query_offset : place.query_offset + place.rows]
    return MaskFacts(causal=causal, window=window, key_valid=_or_none(key_valid), query_valid=_or_none(query_valid))


def _or_none(valid: Tensor | None) -> Tensor | None:
    return None if valid is None or bool(valid.all()) else valid.contiguous()


def _positions(place: Place) -> tuple[Tensor, Tensor]:
    t = torch.arange(place.rows, device=place.device) + place.query_offset
    s = torch.arange(place.keys, device=place.device) + place.key_offset
    return t, s


def _equal(mask: DenseMask, facts: MaskFacts, place: Place) -> bool:
    """True when the facts let every row see what the matrix does. Padded rows that see all or nothing prove nothing and may differ."""
    t, s = _positions(place)
    probe = [(row, row + 1) for row in sorted({0, place.rows // 3, place.rows - 1})]
    for low, high in (*probe, *mask.blocks()):
        seen = mask.read(low, high)
        same = (seen == visible(facts, t[low:high], s, low)).all(3).all(1)
        if facts.query_valid is not None:
            idle = seen.all(3).all(1) | ~seen.any(3).any(1)
            same = same | (idle & ~facts.query_valid[:, low:high])
        if not bool(same.all()):
            return False
    return True


def _never(mask: DenseMask, place: Place, condition: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """True when no visible cell meets a condition on (t, s)."""
    t, s = _positions(place)
    return not any(bool((mask.read(low, high) & condition(t[low:high, None], s[None, :])).any()) for low, high in mask.blocks())

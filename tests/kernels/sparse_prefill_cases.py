"""Random attention calls and sparse patterns for the prefill kernels, and the comparison with dense float64 under the same mask."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.sparse_naive import naive_sparse_attention
from headscope.plans import Blocks, Dense, Lines, Pattern, Power, Streaming, Strided


@dataclass(frozen=True)
class Variant:
    """Everything about a call that a kernel is compiled for, drawn from `number`; shapes, lengths and values vary within it."""

    number: int
    longest: int
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    plain: bool = False
    """No padding, softcap, packed text or cropped cache: what the Hopper kernel takes."""

    def draw(self) -> random.Random:
        """The source of the variant's own choices."""
        return random.Random(self.number)


def make_call(variant: Variant, shape: int, device: str = "cpu") -> AttentionCall:
    """A whole sequence, a chunk behind a cache, a single row; grouped heads; sometimes padded, packed, windowed, capped, with sinks."""
    own, rng = variant.draw(), random.Random(variant.number * 1000 + shape)
    gen = torch.Generator().manual_seed(variant.number * 1000 + shape)
    width, dtype = own.choice(variant.widths), own.choice(variant.dtypes)
    values = width if variant.plain or own.random() < 0.7 else 32
    special = 1.0 if variant.plain else own.random()
    cropped = not variant.plain and own.random() < 0.2
    windowed, sinks, capped = own.random() < 0.35, own.random() < 0.3, not variant.plain and own.random() < 0.2
    batch, kv_heads, group = rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 2, 3, 4))
    keys = rng.randint(1, variant.longest)
    rows = rng.choice((keys, keys, rng.randint(1, keys), 1))

    def tensor(heads: int, tokens: int, wide: int) -> torch.Tensor:
        if rng.random() < 0.5:
            x = torch.randn(batch, tokens, heads, wide, generator=gen).transpose(1, 2)
        else:
            x = torch.randn(batch, heads, tokens, wide, generator=gen)
        return x.to(dtype).to(device)

    q, k, v = tensor(kv_heads * group, rows, width) * rng.choice((1, 3)), tensor(kv_heads, keys, width), tensor(kv_heads, keys, values)
    first = valid = segments = None
    if special < 0.3:  # padding on the left; its keys hold anything
        first = torch.tensor([rng.randint(0, keys - 1) for _ in range(batch)])
        valid = torch.arange(keys)[None] >= first[:, None]
        if rng.random() < 0.4:
            valid &= torch.rand(batch, keys, generator=gen) > 0.1
        valid, first = valid.to(device), first.to(device)
        v = v.masked_fill(~valid[:, None, :, None], math.nan)
    elif special < 0.45:
        segments = torch.randint(0, 4, (batch, keys), generator=gen).sort(1).values.to(device)
    offset = rng.randint(1, 300) if cropped else 0
    mask = MaskFacts(
        True,
        window=rng.choice((20, 200)) if windowed else None,
        key_valid=valid,
        key_segments=segments,
        query_segments=None if segments is None else segments[:, keys - rows :],
    )
    return AttentionCall(
        "attention",
        0,
        q,
        k,
        v,
        width**-0.5,
        mask,
        softcap=3.0 if capped else None,
        sink_logits=torch.randn(kv_heads * group, generator=gen).to(device) if sinks else None,
        query_offset=offset + keys - rows,
        key_offset=offset,
        first_token=None if first is None else first + offset,
    )


def make_pattern(rng: random.Random, length: int, kinds: tuple[str, ...]) -> Pattern:
    """A static pattern of one of the kinds, at odd sizes and at the edges of tiles."""
    kind = rng.choice(kinds)
    sink, window = rng.choice((0, 4, 128, 130, 300)), rng.choice((1, 16, 127, 128, 129, 256, 300))
    block = rng.choice((16, 32, 64, 128, 256))
    if kind == "dense":
        return Dense()
    if kind == "streaming":
        return Streaming(sink, window)
    if kind == "strided":
        return Strided(window, rng.choice((2, 3)), 1, block, sink)
    if kind == "power":
        return Power(window, block, sink)
    if kind in ("blocks", "tiles"):
        block = block if kind == "blocks" else 128
        tiles = rng.randint(1, length // block + 2)
        return Blocks(tuple(tuple(sorted(rng.sample(range(row + 1), rng.randint(0, row + 1)))) for row in range(tiles)), block)
    most = length + 50
    columns = sorted(rng.sample(range(most), min(most, rng.choice((0, 3, 150)))))
    diagonals = list(range(300)) if rng.random() < 0.3 else sorted(rng.sample(range(most), min(most, rng.choice((1, 5, 200)))))
    return Lines(tuple(columns), tuple(diagonals))


KINDS = (("dense", "streaming", "tiles"), ("dense", "streaming", "strided", "power", "blocks"), ("lines", "strided", "blocks", "streaming"))
"""What the patterns of a variant are chosen from: tiles only, cells, cells and single columns."""


def make_patterns(variant: Variant, shape: int, call: AttentionCall) -> list[Pattern]:
    """One per query head; some of them shared."""
    rng = random.Random(variant.number * 1000 + shape)
    kinds = KINDS[variant.number % len(KINDS)]
    length = call.query_offset + call.q.shape[2]
    some = [make_pattern(rng, length, kinds) for _ in range(max(1, call.q.shape[1] - 1))]
    return [rng.choice(some) for _ in range(call.q.shape[1])]


def compare(output: torch.Tensor, lse: torch.Tensor, call: AttentionCall, patterns: list[Pattern]) -> None:
    """Against dense float64. bfloat16 and float16 round the weights and the output once each: their share of the output's size is a
    multiple of the dtype's step; sums are float32.
    """
    exact, total = naive_sparse_attention(call, patterns)
    empty = total == -math.inf
    assert bool((lse.isinf() == empty).all()), "rows that see nothing"
    assert not bool(output.isnan().any())
    assert bool((output.transpose(1, 2)[empty] == 0).all())
    error = (lse.double() - total).masked_fill(empty, 0.0).abs()
    assert float(error.max()) < 2e-5 * (1 + float(total.masked_fill(empty, 0.0).abs().max()))
    step = torch.finfo(call.q.dtype).eps if call.q.dtype != torch.float32 else 4e-6
    difference = (output.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert float(difference) < step, f"relative error {float(difference):.2e}, step {step:.2e}"
    assert call.v is not None
    largest = float(call.v.nan_to_num(nan=0.0).abs().max())
    assert float((output.double() - exact).abs().max()) < 2 * step * largest

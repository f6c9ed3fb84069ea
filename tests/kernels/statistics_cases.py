"""Random attention calls for the kernel tests, and the comparison of two results.

Errors are taken entry by entry, relative to the expected entry: the kernels are held to 1e-5 (float32) not only where a statistic is
large. Two exceptions: the lse, a logarithm that may lie next to zero, is compared absolutely, which is relative for the weights; and an
entropy below 1e-6 has no more digits in the float64 twin, which takes logarithms of weights next to 1 (test_planted_weights has a small
one).
"""

from __future__ import annotations

from random import Random

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels import naive_weights
from headscope.statistics.definitions import DEFINITIONS
from headscope.statistics.partial import PartialStatistics
from headscope.statistics.request import StatisticsRequest

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
TINY = 1e-25
"""Weights below this are as good as zero: the float32 kernel does not tell them apart from exp(-70) of the row's largest."""


def make_call(
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 2,
    rows: int = 100,
    keys: int | None = None,
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    amplitude: float = 2.0,
    seed: int = 0,
    causal: bool = True,
    query_offset: int | None = None,
    key_offset: int = 0,
    with_values: bool = False,
    mask: dict[str, object] | None = None,
    **facts: object,
) -> AttentionCall:
    """A call of random q and k in the layout that hosts give ([B, N, H, D] transposed). Queries end where keys end unless placed."""
    generator = torch.Generator().manual_seed(seed)
    keys = rows if keys is None else keys

    def random(heads: int, count: int, factor: float) -> torch.Tensor:
        return (torch.randn(batch, count, heads, width, generator=generator, dtype=torch.float64) * factor).to(dtype).transpose(1, 2)

    q, k = random(kv_heads * group, rows, amplitude), random(kv_heads, keys, 1.0)
    v = random(kv_heads, keys, 1.0) if with_values else None
    offset = key_offset + keys - rows if query_offset is None else query_offset
    settings = MaskFacts(causal, **(mask or {}))
    return AttentionCall("m", 0, q, k, v, width**-0.5, settings, query_offset=offset, key_offset=key_offset, **facts)


def random_case(seed: int, dtype: torch.dtype) -> tuple[AttentionCall, StatisticsRequest]:
    """A call and a request with every fact and parameter drawn at random."""
    rng = Random(seed)
    torch.manual_seed(seed)
    maybe = rng.random
    group, kv_heads, batch = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3])
    keys = rng.choice([1, 2, 17, 63, 64, 100, 129, 200, 300])
    key_offset = query_offset = 0
    mode = rng.choice(["prefill", "chunk", "decode", "cross"])
    rows = keys
    if mode == "decode":
        rows, key_offset = 1, rng.choice([0, 0, 40, 131])
        query_offset = key_offset + keys - 1
    elif mode == "chunk":
        rows, key_offset = rng.randint(1, keys), rng.choice([0, 0, 7, 130])
        query_offset = key_offset + keys - rows
    elif mode == "cross":
        rows, query_offset = rng.choice([1, 5, 70, 150]), rng.choice([0, 3])
    heads = group * kv_heads
    mask: dict[str, object] = {"window": rng.choice([1, 5, 33, 128, 200]) if maybe() < 0.3 else None}
    first_token = None
    if maybe() < 0.3:
        pads = [rng.randint(0, keys - 1) for _ in range(batch)]
        s = torch.arange(keys)
        how = rng.choice(["left", "right", "holes"])
        valid = (
            torch.stack([s >= pad if how == "left" else s < keys - pad for pad in pads])
            if how != "holes"
            else torch.rand(batch, keys) > 0.3
        )
        mask["key_valid"] = valid
        first_token = torch.tensor([key_offset + pad for pad in pads])
        if maybe() < 0.7:
            mask["query_valid"] = valid[:, (torch.arange(rows) + query_offset - key_offset).clamp(0, keys - 1)]
    if maybe() < 0.2:
        mask["key_segments"] = torch.randint(0, 4, (batch, keys)).sort(-1)[0]
        mask["query_segments"] = torch.randint(0, 4, (batch, rows)).sort(-1)[0]
    if maybe() < 0.2:
        mask["allowed"] = torch.rand(rng.choice([1, batch]), rng.choice([1, heads]), rows, keys) > 0.4
    if maybe() < 0.2:
        bias = torch.randn(rng.choice([1, batch]), rng.choice([1, heads]), rows, keys).to(dtype)
        if maybe() < 0.5:
            bias = bias.masked_fill(torch.rand(bias.shape) < 0.3, rng.choice([float("-inf"), torch.finfo(torch.bfloat16).min]))
        mask["bias"] = bias
    call = make_call(
        batch,
        kv_heads,
        group,
        rows,
        keys,
        rng.choice([16, 20, 64, 80]),
        dtype=dtype,
        amplitude=rng.choice([0.2, 1, 3]),
        seed=seed,
        causal=maybe() < 0.7,
        query_offset=query_offset,
        key_offset=key_offset,
        mask=mask,
        softcap=rng.choice([None, None, 5.0, 30.0]),
        sink_logits=torch.randn(heads).to(dtype) * 3 if maybe() < 0.2 else None,
        first_token=first_token,
    )
    return call, random_request(rng, batch, max(query_offset + rows, key_offset + keys))


def random_request(rng: Random, batch: int, end: int) -> StatisticsRequest:
    """A request over all statistics or a few, for sequences of length `end`."""

    def one_or_all(values: torch.Tensor) -> torch.Tensor:
        return values if rng.random() < 0.5 else values[0]

    labels = one_or_all(torch.randint(-1, 4, (batch, max(end - rng.choice([0, 1]), 1))))
    pairs, low = rng.randint(1, 20), rng.choice([0, 1, 10, 40])
    return StatisticsRequest(
        names=tuple(DEFINITIONS) if rng.random() < 0.7 else tuple(rng.sample(list(DEFINITIONS), 3)),
        sink_tokens=rng.choice([1, 4, 50]),
        local_window=rng.choice([1, 2, 64, 300]),
        waad_window=rng.choice([1, 10, 100]),
        fai_band=(low, rng.choice([None, low, low + 5, 90, 400])),
        block=rng.choice([16, 32, 64, 128, 256]),
        labels=labels if bool((labels >= 0).any()) else torch.zeros_like(labels),
        segments=one_or_all(torch.randint(-1, 5, (batch, end)).sort(-1)[0]),
        pairs={
            "shared": (torch.randint(-1, end + 2, (pairs,)), torch.randint(-1, end + 2, (pairs,))),
            "own": (torch.randint(-1, end, (batch, pairs)), torch.randint(-1, end, (batch, pairs))),
        },
        rows=one_or_all(torch.rand(batch, end) > 0.4) if rng.random() < 0.3 else None,
    )


def every(end: int, **parameters: object) -> StatisticsRequest:
    """A request for all statistics, with plain labels, segments and pairs over `end` positions."""
    t = torch.arange(end)
    given = {
        "labels": t % 3,
        "segments": t * 4 // max(end, 1),
        "pairs": {"self": (t, t), "first": (t, torch.zeros_like(t))},
        **parameters,
    }
    return StatisticsRequest(names=tuple(DEFINITIONS), **given)


def close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float, context: object = "") -> None:
    """Asserts equal NaNs and an error of at most `tolerance`, entry by entry."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape, (name, got.shape, expected.shape, context)
    assert torch.equal(got.isnan(), expected.isnan()), (name, "NaN in other places", context)
    scale = expected.abs() + {"entropy": 1e-6, "lse": 1.0}.get(name, TINY)
    error = ((got - expected).abs() / scale).nan_to_num(0.0)
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= tolerance, f"{name}: relative error {worst:.1e} > {tolerance:.0e} in {context}"


def same(got: PartialStatistics, expected: PartialStatistics, call: AttentionCall, tolerance: float, context: object = "") -> None:
    """Asserts that two results hold the same statistics with the same values; an argmax may be any key of the largest weight to
    rounding."""
    assert (got.query_offset, got.key_offset) == (expected.query_offset, expected.key_offset)
    for kind in ("rows", "columns", "counts", "maps", "pairs"):
        mine, theirs = getattr(got, kind), getattr(expected, kind)
        assert set(mine) == set(theirs), (kind, context)
        for name, value in theirs.items():
            if kind == "counts":
                assert torch.equal(mine[name], value), (name, context)
            elif name == "argmax":
                same_argmax(mine[name], value, call, tolerance, context)
            else:
                close(name, mine[name], value, tolerance, context)
    assert (got.diagonals is None) == (expected.diagonals is None)
    if got.diagonals is not None and expected.diagonals is not None:
        assert got.diagonal_start == expected.diagonal_start, context
        close("diagonal_sum", got.diagonals, expected.diagonals, tolerance, context)


def same_argmax(got: torch.Tensor, expected: torch.Tensor, call: AttentionCall, tolerance: float, context: object = "") -> None:
    """Asserts that the weights at two sets of positions agree, and that -1 stands in the same places."""
    assert got.dtype == torch.int64
    live = expected >= 0
    assert torch.equal(got >= 0, live), ("argmax", context)
    weights = naive_weights(call)
    at = [weights.gather(-1, (x - call.key_offset).clamp(0, weights.shape[-1] - 1)[..., None])[..., 0][live] for x in (got, expected)]
    torch.testing.assert_close(*at, rtol=max(tolerance, 1e-6), atol=0.0)

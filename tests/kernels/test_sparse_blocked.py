"""Blocked sparse attention against its naive twin: random patterns, shapes, masks, offsets; dense patterns equal dense attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import CaptureError, PlanError
from headscope.kernels.gather import attention_rows
from headscope.kernels.sparse_blocked import blocked_sparse_attention
from headscope.kernels.sparse_naive import naive_sparse_attention
from headscope.plans import Blocks, Dense, Lines, Pattern, Power, Span, Streaming, Strided, VerticalSlash

PATTERNS: tuple[Pattern, ...] = (
    Dense(),
    Streaming(4, 16),
    Streaming(0, 1),
    Streaming(3, 8, compensate=True),
    Strided(8, 3, 1, 16),
    Power(8, 16, 2),
    Lines((0, 7, 30), (0, 1, 2, 33)),
    Blocks(((0,), (), (0, 1), (2,)), 16),
)


@st.composite
def calls(draw: st.DrawFn) -> AttentionCall:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 3]))
    keys = draw(st.integers(1, 300))
    rows = draw(st.sampled_from([keys, 1, max(1, keys // 3)]))
    q = torch.randn(batch, kv_heads * group, rows, 8, generator=generator, dtype=torch.float64) * 2
    k = torch.randn(batch, kv_heads, keys, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, 5, generator=generator, dtype=torch.float64)
    first = valid = None
    if draw(st.booleans()):
        first = torch.tensor([draw(st.integers(0, keys - 1)) for _ in range(batch)])
        valid = torch.arange(keys)[None] >= first[:, None]
        k = k.masked_fill(~valid[:, None, :, None], float("nan") if draw(st.booleans()) else 7.0)
        v = v.masked_fill(~valid[:, None, :, None], float("nan"))
        k = k.nan_to_num(nan=0.0)
    mask = MaskFacts(causal=True, window=draw(st.sampled_from([None, 20])), key_valid=valid)
    return AttentionCall(
        "m",
        0,
        q,
        k,
        v,
        0.35,
        mask,
        softcap=draw(st.sampled_from([None, 3.0])),
        sink_logits=torch.randn(kv_heads * group, generator=generator) if draw(st.booleans()) else None,
        query_offset=keys - rows,
        first_token=first,
    )


@settings(max_examples=120, deadline=None)
@given(calls(), st.data())
def test_equals_the_naive_twin(call: AttentionCall, data: st.DataObject) -> None:
    usable = PATTERNS if call.mask.window is None else tuple(p for p in PATTERNS if not getattr(p, "compensate", False))
    patterns = [data.draw(st.sampled_from(usable)) for _ in range(call.q.shape[1])]
    output, lse = blocked_sparse_attention(call, patterns)
    expected, total = naive_sparse_attention(call, patterns)
    assert torch.allclose(output, expected, atol=1e-11, rtol=1e-10)
    assert torch.allclose(lse, total, atol=1e-11, rtol=1e-10)
    assert not output.isnan().any()


@settings(max_examples=30, deadline=None)
@given(calls())
def test_a_plan_that_keeps_everything_is_dense_attention(call: AttentionCall) -> None:
    whole = attention_rows(call, torch.arange(call.q.shape[2])).nan_to_num(nan=0.0).transpose(1, 2)
    for pattern in (Dense(), Streaming(0, 400), Span(1.0, 1.0, 0), Blocks(tuple(tuple(range(row + 1)) for row in range(20)), 16)):
        output, _ = blocked_sparse_attention(call, [pattern] * call.q.shape[1])
        assert torch.allclose(output, whole, atol=1e-11, rtol=1e-10)


def test_chosen_heads_and_dtypes() -> None:
    q, k, v = (torch.randn(1, heads, 200, 16, dtype=torch.float32) for heads in (4, 2, 2))
    call = AttentionCall("m", 0, q, k, v, 0.25, MaskFacts(causal=True))
    every, _ = blocked_sparse_attention(call, [Streaming(4, 16)] * 4)
    some, lse = blocked_sparse_attention(call, [Streaming(4, 16)] * 2, [3, 1])
    assert torch.allclose(some, every[:, :, [3, 1]], atol=1e-6)
    assert lse.shape == (1, 2, 200)
    half = AttentionCall("m", 0, q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.25, MaskFacts(causal=True))
    output, _ = blocked_sparse_attention(half, [Streaming(4, 16)] * 4)
    assert output.dtype == torch.bfloat16
    assert (output.float() - every).abs().max() < 0.05


def test_refusals() -> None:
    q = torch.randn(1, 1, 8, 4)
    with pytest.raises(PlanError, match="chosen per input"):
        blocked_sparse_attention(AttentionCall("m", 0, q, q, q, 1.0, MaskFacts(causal=True)), [VerticalSlash(4, 4)])
    with pytest.raises(CaptureError, match="no values"):
        blocked_sparse_attention(AttentionCall("m", 0, q, q, None, 1.0, MaskFacts(causal=True)), [Dense()])

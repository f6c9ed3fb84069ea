"""RazorAttention's compensation token: the paper's formula, written out row by row, against the twin and the blocked kernel."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.sparse_blocked import blocked_sparse_attention
from headscope.kernels.sparse_naive import naive_sparse_attention
from headscope.plans import Pattern, Span, Streaming


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sink: int, window: int) -> torch.Tensor:
    """Attn = [N_d e^{q.k^} v^ + sum over kept n of e^{q.k_n} v_n] / [N_d e^{q.k^} + sum over kept n of e^{q.k_n}], one head [N, D]."""
    rows = []
    for t in range(len(q)):
        kept = [s for s in range(t + 1) if s < sink or t - s < window]
        dropped = [s for s in range(t + 1) if s not in kept]
        top = sum(math.exp(float(q[t] @ k[s]) * scale) * v[s] for s in kept)
        below = sum(math.exp(float(q[t] @ k[s]) * scale) for s in kept)
        if dropped:
            weight = len(dropped) * math.exp(float(q[t] @ k[dropped].mean(0)) * scale)
            top, below = top + weight * v[dropped].mean(0), below + weight
        rows.append(top / below)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("pattern", "sink", "window"),
    [
        (Streaming(2, 6, True), 2, 6),
        (Streaming(0, 1, True), 0, 1),
        (Span(0.0, 0.25, 3, 1, True), 3, 10),
        (Span(0.0, 0.1, 1, 8, True), 1, 8),
    ],
)
def test_the_mean_of_what_was_dropped_counts_as_often_as_there_is_of_it(pattern: Pattern, sink: int, window: int) -> None:
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 8, generator=source, dtype=torch.float64) for heads in (4, 2, 2))
    call = AttentionCall("m", 0, q, k, v, 8**-0.5, MaskFacts(True))
    expected = torch.stack([formula(q[0, h], k[0, h // 2], v[0, h // 2], 8**-0.5, sink, window) for h in range(4)], 1)
    naive, lse = naive_sparse_attention(call, [pattern] * 4)
    torch.testing.assert_close(naive[0], expected)
    blocked, total = blocked_sparse_attention(call, [pattern] * 4)
    torch.testing.assert_close(blocked[0], expected)
    torch.testing.assert_close(total, lse)


def test_a_window_over_everything_compensates_nothing() -> None:
    source = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=source, dtype=torch.float64) for _ in range(3))
    call = AttentionCall("m", 0, q, k, v, 8**-0.5, MaskFacts(True))
    plain, _ = naive_sparse_attention(call, [Streaming(0, 30)] * 2)
    for pattern in (Streaming(0, 30, True), Streaming(20, 10, True)):
        torch.testing.assert_close(blocked_sparse_attention(call, [pattern] * 2)[0], plain)
    equal = k[:, :, :1].expand(-1, -1, 30, -1)  # keys that are all alike: the mean stands for them exactly
    alike = AttentionCall("m", 0, q, equal, v[:, :, :1].expand(-1, -1, 30, -1), 8**-0.5, MaskFacts(True))
    dense, whole = naive_sparse_attention(alike, [Streaming(0, 30)] * 2)
    found, lse = blocked_sparse_attention(alike, [Streaming(1, 3, True)] * 2)
    torch.testing.assert_close(found, dense)
    torch.testing.assert_close(lse, whole)


def test_costs_count_the_extra_key() -> None:
    plain, extra = Streaming(4, 16), Streaming(4, 16, True)
    assert extra.kept(100) - plain.kept(100) == 80
    assert extra.cached(100) == plain.cached(100) + 1
    assert (extra.kept(20), extra.cached(20)) == (plain.kept(20), plain.cached(20))

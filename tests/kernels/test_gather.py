"""Exact windows of A and exact outputs of rows, against the dense twin and against torch's own attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from statistics_cases import make_call

from headscope.errors import CaptureError, StatisticError
from headscope.kernels import attention_rows, gather_weights, measure, naive_weights
from headscope.statistics.request import StatisticsRequest

REAL = torch.stack([torch.arange(90) >= pad for pad in (0, 31)])
FACTS = {
    "causal": {},
    "window_softcap": {"mask": {"window": 20}, "softcap": 4.0},
    "sinks": {"sink_logits": torch.tensor([0.0, 1.0, 2.0, 3.0])},
    "padding": {"batch": 2, "mask": {"key_valid": REAL, "query_valid": REAL}},
    "segments": {"mask": {"query_segments": torch.arange(90)[None] // 40, "key_segments": torch.arange(90)[None] // 40}},
    "bias": {"causal": False, "mask": {"bias": torch.linspace(-2, 2, 8100).view(1, 1, 90, 90)}},
    "allowed": {"causal": False, "mask": {"allowed": (torch.arange(8100).view(1, 1, 90, 90) % 3) > 0}},
    "sliding_cache": {"rows": 10, "keys": 90, "key_offset": 45},
}


@pytest.mark.parametrize("facts", FACTS)
def test_windows_of_weights(facts: str) -> None:
    call = make_call(**{"rows": 90, **FACTS[facts]})
    lse = measure(call, StatisticsRequest(names=("lse",))).rows["lse"]
    expected = naive_weights(call)
    if call.mask.query_valid is not None:
        expected[~call.mask.query_valid[:, None].expand(-1, 4, -1)] = float("nan")
    queries = torch.arange(call.q.shape[2])[::3] + call.query_offset
    keys = torch.tensor([0, 7, 8, 50, 89]) + call.key_offset
    for head in range(4):
        got = gather_weights(call, lse, head, queries, keys)
        want = expected[:, head][:, queries - call.query_offset][:, :, keys - call.key_offset]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("facts", FACTS)
def test_rows_of_output(facts: str) -> None:
    call = make_call(with_values=True, **{"rows": 90, **FACTS[facts]})
    rows = torch.tensor([0, 1, call.q.shape[2] - 1])
    assert call.v is not None
    expected = naive_weights(call) @ call.v.double().repeat_interleave(call.group, 1)
    got = attention_rows(call, rows)
    live = ~got.isnan()
    torch.testing.assert_close(got[live].double(), expected[:, :, rows][live], rtol=1e-5, atol=1e-6)
    assert live.all() == (facts != "padding")


def test_rows_of_output_equal_torch() -> None:
    call = make_call(with_values=True, rows=60)
    whole = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention_rows(call, torch.arange(60)), whole, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    call = make_call(rows=20, key_offset=5)
    lse = measure(call, StatisticsRequest(names=("lse",))).rows["lse"]
    at = torch.tensor([5])
    with pytest.raises(StatisticError, match=r"head 4: the call has heads 0\.\.3"):
        gather_weights(call, lse, 4, at, at)
    with pytest.raises(StatisticError, match=r"query positions 4\.\.4: the call holds 5\.\.24"):
        gather_weights(call, lse, 0, torch.tensor([4]), at)
    with pytest.raises(StatisticError, match=r"key positions 25\.\.25"):
        gather_weights(call, lse, 0, at, torch.tensor([25]))
    with pytest.raises(CaptureError, match="no values"):
        attention_rows(call, torch.tensor([0]))

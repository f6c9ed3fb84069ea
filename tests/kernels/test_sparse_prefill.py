"""The Triton prefill kernel in the interpreter against dense float64, the choice of backends, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.sparse_prefill as sparse_prefill
from headscope.call import AttentionCall, MaskFacts
from headscope.errors import CaptureError, UnavailableError
from headscope.kernels.gather import attention_rows
from headscope.kernels.sparse_dispatch import sparse_attention, sparse_backend, worth_it
from headscope.kernels.sparse_lists import static_lists
from headscope.kernels.sparse_naive import naive_sparse_attention
from headscope.kernels.sparse_prefill import chosen_on_device, prefill, supports
from headscope.kernels.triton_common import INTERPRETED
from headscope.plans import Blocks, Budget, Dense, Lines, Span, Streaming, TopBlocks, VerticalSlash
from headscope.plans.indices import choose

_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("sparse_prefill_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["sparse_prefill_cases"] = cases
_spec.loader.exec_module(cases)

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="with a CUDA device the kernels are compiled: see test_sparse_prefill_gpu")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(sparse_prefill, "POISON", True)


@pytest.mark.parametrize("seed", range(20))
def test_random_calls(seed):
    """Every pattern, GQA ratio, padding with NaN in it, packed text, chunks, crops, windows, softcap, sinks; nothing left unwritten."""
    variant = cases.Variant(seed, 300, (16, 64, 80), DTYPES)
    call = cases.make_call(variant, 0)
    patterns = cases.make_patterns(variant, 0, call)
    assert supports(call, patterns) == ""
    output, lse = prefill(call, patterns, "triton")
    cases.compare(output, lse, call, patterns)


@pytest.mark.parametrize("width", [96, 128, 256])
def test_wide_heads(width):
    q, k = torch.randn(1, 2, 200, width), torch.randn(1, 1, 200, width)
    call = AttentionCall("attention", 0, q, k, torch.randn(1, 1, 200, width), width**-0.5, MaskFacts(True))
    patterns = [Streaming(10, 100), Blocks(((0,), (1,)))]
    cases.compare(*prefill(call, patterns, "triton"), call, patterns)


def test_what_keeps_everything_is_dense_attention():
    q, k, v = (torch.randn(2, heads, 300, 32) for heads in (5, 1, 1))
    call = AttentionCall("attention", 0, q, k, v, 0.2, MaskFacts(True))
    whole = tuple(tuple(range(row + 1)) for row in range(3))
    patterns = [Dense(), Streaming(0, 300), Blocks(whole), Lines((), tuple(range(300))), Lines(tuple(range(300)), (0,))]
    output, _ = prefill(call, patterns, "triton")
    dense = attention_rows(call, torch.arange(300)).transpose(1, 2)
    assert torch.allclose(output, dense, atol=2e-6, rtol=2e-6)


def test_compensated_heads():
    q, k, v = (torch.randn(2, heads, 260, 16) for heads in (4, 2, 2))
    first = torch.tensor([0, 37])
    valid = torch.arange(260)[None] >= first[:, None]
    call = AttentionCall("attention", 0, q, k, v, 0.3, MaskFacts(True, key_valid=valid), first_token=first, sink_logits=torch.randn(4))
    patterns = [Streaming(4, 30, compensate=True), Dense(), Span(3, 0.2), Streaming(0, 100, compensate=True)]
    output, lse = prefill(call, patterns, "triton")
    exact, total = naive_sparse_attention(call, patterns)
    assert torch.allclose(output.double(), exact, atol=3e-6)
    assert torch.allclose(lse.double(), total, atol=3e-6)


@pytest.mark.parametrize(("rows", "keys", "window"), [(384, 384, None), (300, 300, 150), (256, 512, None)])
def test_dynamic_patterns_choose_the_keys_of_their_rules(rows, keys, window):
    """On the device, for all heads at once, as `choose` does head by head."""
    gen = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(1, heads, count, 32, generator=gen) for heads, count in ((6, rows), (3, keys), (3, keys)))
    call = AttentionCall("attention", 0, q * 0.5, k, v, 0.25, MaskFacts(True, window=window), query_offset=keys - rows)
    rule = "antidiagonal" if keys % 128 == 0 and rows % 128 == 0 and window is None else "pooled"
    patterns = [
        VerticalSlash(40, 60, sink=5, window=20), TopBlocks(share=0.3), Blocks(((0,), (0,), (1,)), 64), TopBlocks(mass=0.6, rule=rule),
        VerticalSlash(10, 200, last_q=33), Streaming(4, 100),
    ]  # fmt: skip
    assert chosen_on_device(call, patterns) == ""
    output, lse = prefill(call, patterns, "triton")
    chosen = [choose(call, head, pattern) for head, pattern in enumerate(patterns)]
    cases.compare(output, lse, call, chosen)


def test_dynamic_patterns_of_padded_sequences():
    q, k, v = (torch.randn(2, heads, 200, 16) for heads in (2, 1, 1))
    first = torch.tensor([60, 0])
    call = AttentionCall("attention", 0, q, k, v, 0.25, MaskFacts(True, key_valid=torch.arange(200) >= first[:, None]), first_token=first)
    patterns = [VerticalSlash(10, 20, sink=2, window=5), TopBlocks(share=0.5, block=32)]
    output, lse = prefill(call, patterns, "triton")
    expected, total = sparse_attention(call, patterns, backend="blocked")
    assert torch.allclose(output, expected, atol=3e-6)
    assert torch.allclose(lse, total, atol=3e-6)


def test_bits_of_diagonals_and_columns():
    """Word by word what looking up every entry gives, in the order of a tile's lanes: key 8 a + 2 lane + b is bit 2 a + b."""
    lists = static_lists(
        AttentionCall("attention", 0, *(torch.zeros(1, 2, 600, 16),) * 3, 1.0, MaskFacts(True)),
        [Lines(tuple(range(3, 600, 7)), (0, 1, 5, 200, 333)), Lines((5, 6), tuple(range(130)))],
    )
    planes = lists.planes
    key = torch.tensor([[8 * (bit // 2) + 2 * lane + bit % 2 for bit in range(32)] for lane in range(4)])
    assert sorted(key.flatten().tolist()) == list(range(128))

    def bits(words):
        return ((words[..., None] >> torch.arange(32)) & 1).bool()

    for slot in range(2):
        for gap in range(5):
            far = 128 * gap + torch.arange(128)[:, None, None] - key
            expected = lists.diagonals[slot, far.clamp(0, 639)].bool() & (far >= 0) & (far < 640)
            if lists.gaps[slot, gap]:
                assert torch.equal(bits(planes.diagonals[slot, gap]), expected)
            assert torch.equal(bits(planes.marks[slot, gap]), lists.marked[slot, 128 * gap + key].bool())
            column = lists.columns[slot, :128][key].long()
            before = gap - column // 128
            alone = (before >= 0) & (lists.gaps[slot, before.clamp(min=0)] == 0)
            assert torch.equal(bits(planes.columns[slot, gap, 0]), alone)


def test_the_choice_of_backends():
    q = torch.randn(1, 2, 140, 16)
    call = AttentionCall("attention", 0, q, q, q, 0.25, MaskFacts(True))
    patterns = [Streaming(2, 20), Dense()]
    assert sparse_backend(call, patterns) == "blocked"
    assert worth_it(call, patterns) == ""
    outputs = [sparse_attention(call, patterns, backend=name)[0].double() for name in (None, "blocked", "triton", "naive")]
    for other in outputs[:-1]:
        assert torch.allclose(other, outputs[-1], atol=2e-6)
    with pytest.raises(UnavailableError, match="gluon"):
        sparse_attention(call, patterns, backend="gluon")
    with pytest.raises(UnavailableError, match="tritn"):
        sparse_attention(call, patterns, backend="tritn")
    with pytest.raises(UnavailableError, match="chosen"):
        sparse_attention(call, [Budget(4), Dense()], backend="triton")
    with pytest.raises(CaptureError, match="1 patterns for 2 query heads"):
        sparse_attention(call, patterns[:1])
    with pytest.raises(CaptureError, match="no values"):
        sparse_attention(replace(call, v=None), patterns)


@pytest.mark.parametrize(
    ("change", "pattern", "reason"),
    [
        ({"mask": MaskFacts(False)}, Dense(), "not causal"),
        ({"mask": MaskFacts(True, bias=torch.zeros(1, 1, 30, 30))}, Dense(), "a bias"),
        ({}, Blocks(((0,),), 48), "blocks of 48"),
        ({}, Blocks(((0,),), 8), "blocks of 8"),
        ({"q": torch.randn(1, 1, 30, 16).double()}, Dense(), "float64"),
    ],
)
def test_what_the_kernel_does_not_take(change, pattern, reason):
    q = torch.randn(1, 1, 30, 16)
    call = replace(AttentionCall("attention", 0, q, q, q, 0.25, MaskFacts(True)), **change)
    assert reason in supports(call, [pattern])
    with pytest.raises(UnavailableError, match=reason):
        sparse_attention(call, [pattern], backend="triton")

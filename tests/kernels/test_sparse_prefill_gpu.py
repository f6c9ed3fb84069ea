"""The compiled sparse prefill kernels against dense float64: hundreds of random plans, lengths, head ratios, widths; poisoned outputs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.sparse_prefill as sparse_prefill
from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.gather import attention_rows
from headscope.kernels.sparse_dispatch import sparse_attention, sparse_backend, worth_it
from headscope.kernels.sparse_dynamic import mask_lists
from headscope.kernels.sparse_prefill import gluon_supports, prefill, supports
from headscope.plans import Blocks, Dense, Lines, Streaming, TopBlocks, VerticalSlash
from headscope.plans.indices import choose

_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("sparse_prefill_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["sparse_prefill_cases"] = cases
_spec.loader.exec_module(cases)

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = 20
HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the Gluon kernel needs compute capability 9"
)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(sparse_prefill, "POISON", True)


@pytest.mark.parametrize("number", range(15))
def test_random_plans_in_triton(number):
    """15 variants of 20 shapes: GQA ratios, padding with NaN in it, packed text, chunks, crops, windows, softcap, sinks."""
    variant = cases.Variant(number, 700, (64, 80, 96, 128, 256), DTYPES)
    for shape in range(SHAPES):
        call = cases.make_call(variant, shape, "cuda")
        patterns = cases.make_patterns(variant, shape, call)
        assert supports(call, patterns) == ""
        try:
            cases.compare(*prefill(call, patterns, "triton"), call, patterns)
        except AssertionError as error:
            raise AssertionError(f"{variant} shape {shape}: {call!r} {[one.kind for one in patterns]}") from error


@HOPPER
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(("width", "dtype"), [(128, torch.bfloat16), (64, torch.float16)], ids=str)
def test_random_plans_in_gluon(number, width, dtype):
    """12 variants of 20 shapes that the Hopper kernel takes."""
    variant = cases.Variant(100 + number, 1200, (width,), (dtype,), plain=True)
    for shape in range(SHAPES):
        call = cases.make_call(variant, shape, "cuda")
        patterns = cases.make_patterns(variant, shape, call)
        reason = gluon_supports(call, patterns)
        if reason:  # diagonals under the model's own window are the Triton kernel's
            assert call.mask.window is not None
            assert "lines" in {one.kind for one in patterns}
            continue
        try:
            cases.compare(*prefill(call, patterns, "gluon"), call, patterns)
        except AssertionError as error:
            raise AssertionError(f"{variant} shape {shape}: {call!r} {[one.kind for one in patterns]}") from error


@HOPPER
def test_many_lines_of_work_per_program():
    """More lines than processors several times over, of very different lengths: both directions of the turn, both query slots."""
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, h, 3000, 128, generator=gen, device="cuda", dtype=torch.bfloat16) for h in (12, 3, 3))
    call = AttentionCall("attention", 0, q, k, v, 128**-0.5, MaskFacts(True))
    patterns = [Dense(), Streaming(100, 300), Lines((0, 5, 700), tuple(range(0, 3000, 9))), Blocks(((0,), (1,), (0, 2)))] * 3
    cases.compare(*prefill(call, patterns, "gluon"), call, patterns)
    first, second = prefill(call, patterns, "gluon"), prefill(call, patterns, "gluon")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@HOPPER
@pytest.mark.parametrize("offset", [1, 36, 97, 127, 128, 300])
def test_chunks_that_begin_inside_a_tile(offset):
    """The first rows of the first tile belong to an earlier chunk: nobody's output may be written there, and every row's own must be."""
    gen = torch.Generator("cuda").manual_seed(offset)
    q, k, v = (
        torch.randn(2, h, n, 64, generator=gen, device="cuda", dtype=torch.bfloat16)
        for h, n in ((4, 200), (2, 200 + offset), (2, 200 + offset))
    )
    call = AttentionCall("attention", 0, q, k, v, 0.125, MaskFacts(True), query_offset=offset)
    patterns = [Dense(), Streaming(5, 40), Lines((0, 3, 90), tuple(range(0, 500, 7))), Blocks(((0,), (0,), (1,), (0, 2)))]
    output, lse = prefill(call, patterns, "gluon")
    assert output.shape == (2, 200, 4, 64)
    assert output.is_contiguous()
    cases.compare(output, lse, call, patterns)


@HOPPER
def test_what_keeps_everything_is_dense_attention():
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 900, 128, generator=gen, device="cuda", dtype=torch.bfloat16) for h in (4, 1, 1))
    call = AttentionCall("attention", 0, q, k, v, 128**-0.5, MaskFacts(True))
    whole = tuple(tuple(range(row + 1)) for row in range(8))
    patterns = [Dense(), Streaming(0, 900), Blocks(whole), Lines((), tuple(range(900)))]
    assert sparse_backend(call, patterns) == "gluon"
    output, _ = sparse_attention(call, patterns, backend="gluon")
    dense = attention_rows(call, torch.arange(900)).transpose(1, 2)
    assert (output.float() - dense).norm() / dense.norm() < 4e-3
    # the same tiles in the same order are the same numbers
    assert torch.equal(output[:, :, 1:2], prefill(call, [Dense(), Dense(), *patterns[2:]], "gluon")[0][:, :, 1:2])


@pytest.mark.parametrize(("rows", "keys"), [(2048, 2048), (1000, 1000), (512, 1536)])
def test_dynamic_plans_choose_as_their_rules_do(rows, keys):
    gen = torch.Generator("cuda").manual_seed(rows)
    q, k, v = (torch.randn(1, h, n, 64, generator=gen, device="cuda") for h, n in ((4, rows), (2, keys), (2, keys)))
    call = AttentionCall("attention", 0, q, k, v, 0.2, MaskFacts(True), query_offset=keys - rows)
    rule = "antidiagonal" if rows % 128 == 0 and keys % 128 == 0 else "pooled"
    patterns = [VerticalSlash(50, 100, sink=5, window=20), TopBlocks(share=0.3), TopBlocks(mass=0.6, rule=rule), Streaming(4, 100)]
    output, lse = prefill(call, patterns, "triton")
    cases.compare(output, lse, call, [choose(call, head, pattern) for head, pattern in enumerate(patterns)])


def test_choosing_never_waits_for_the_device():
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 2048, 128, generator=gen, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    call = AttentionCall("attention", 0, q, k, v, 0.1, MaskFacts(True))
    patterns = [VerticalSlash(50, 100), TopBlocks(share=0.3), TopBlocks(mass=0.6, rule="antidiagonal"), Streaming(4, 100)]
    first = prefill(call, patterns)[0]  # constants of the plan are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = prefill(call, patterns)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


def test_lists_of_a_mask_are_those_of_the_blocks():
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 1100, 64, generator=gen, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    call = AttentionCall("attention", 0, q, k, v, 0.1, MaskFacts(True))
    kept = torch.rand(4, 9, 9, generator=gen, device="cuda") < 0.4
    patterns = [Blocks(tuple(tuple(t for t in range(row + 1) if bool(kept[head, row, t])) for row in range(9))) for head in range(4)]
    output, lse = sparse_prefill.triton_prefill(call, [], mask_lists(call, kept))
    cases.compare(output, lse, call, patterns)


def test_calls_that_would_be_slower_are_named():
    q, k = (torch.zeros(1, h, 8192, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2))
    call = AttentionCall("attention", 0, q, k, k, 0.1, MaskFacts(True))
    assert worth_it(call, [Streaming(4, 256)] * 8) == ""
    assert worth_it(call, [TopBlocks(share=0.2)] * 8) == ""
    whole = Blocks(tuple(tuple(range(row + 1)) for row in range(64)))
    if sparse_backend(call, [whole] * 8) == "triton":
        assert "100% of the tiles" in worth_it(call, [whole] * 8)
    assert "blocks of 48" in worth_it(call, [Blocks(((0,),), 48)] * 8)

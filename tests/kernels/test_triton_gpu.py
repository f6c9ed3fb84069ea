"""Every Triton statistics kernel on the device against its dense float64 twin: random variants, odd lengths, poisoned buffers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.triton_interior as triton_interior
import headscope.kernels.triton_measure as triton_measure
import headscope.kernels.triton_run as triton_run
from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.naive import naive_weights
from headscope.statistics.request import StatisticsRequest

_spec = importlib.util.spec_from_file_location("triton_cases", Path(__file__).with_name("triton_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["triton_cases"] = cases
_spec.loader.exec_module(cases)

pytestmark = pytest.mark.gpu
SHAPES = 16
WIDTHS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(triton_run, "POISON", True)


@pytest.mark.parametrize("seed", range(20))
def test_random_variants_over_shapes(seed):
    """20 variants of 16 shapes each; no element unwritten, no NaN where the twin has none."""
    variant = cases.random_variant(seed, WIDTHS, DTYPES, longest=330)
    for shape in range(SHAPES):
        call, request = cases.make_case(variant, shape, "cuda")
        assert triton_measure.supports(call, request) == ""
        try:
            cases.compare(triton_measure.measure(cases.poisoned(call), request), call, request, cases.tolerance(variant))
        except AssertionError as error:
            raise AssertionError(f"{variant} shape {shape}: {call!r}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_passive_statistics_of_a_long_call(width, dtype):
    """Several full tiles on every side of the bands, at the launch parameters that production uses."""
    variant = cases.Variant(7, width, dtype, names=cases.NAME_SETS[1], block=128, longest=1000)
    gen = torch.Generator().manual_seed(width)
    q, k = (torch.randn(1, h, 1111, width, generator=gen).to(dtype).cuda() for h in (2, 1))
    call = AttentionCall("attention", 0, q * 2, k, None, width**-0.5, MaskFacts(True))
    request = StatisticsRequest(variant.names)
    got = triton_measure.measure(call, request)
    cases.compare(got, call, request, cases.tolerance(variant))
    if width in (64, 96, 256):
        given = AttentionCall("attention", 0, q * 2, k, None, width**-0.5, MaskFacts(True), facts={"lse": got.rows["lse"]})
        cases.compare(triton_measure.measure(given, request), given, request, cases.tolerance(variant))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_attention_output(width, dtype):
    causal = (WIDTHS.index(width) + DTYPES.index(dtype)) % 2 == 0
    gen = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn(2, h, 333, width, generator=gen).to(dtype).cuda() for h in (4, 2, 2))
    call = AttentionCall("attention", 0, q, k, v, width**-0.5, MaskFacts(causal))
    out, statistics = triton_measure.attention(call, StatisticsRequest(cases.NAME_SETS[1]))
    want = naive_weights(call) @ v.cpu().double().repeat_interleave(2, 1)
    error = ((out.cpu().double() - want).norm() / want.norm()).item()
    assert error < (2e-6 if dtype == torch.float32 else 6e-3)
    cases.compare(statistics, call, StatisticsRequest(cases.NAME_SETS[1]), 1e-4 if dtype != torch.float32 else 1e-5)


@pytest.fixture
def launched(monkeypatch):
    """Which Gluon kernels ran."""
    names = []
    for name in ("launch", "launch_forward", "launch_columns"):
        kernel = getattr(triton_interior, name)
        monkeypatch.setattr(triton_interior, name, lambda *args, kernel=kernel, name=name: (names.append(name), kernel(*args))[1])
    return names


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the Gluon kernels need compute capability 9"
)


@HOPPER
@pytest.mark.parametrize(
    ("rows", "keys", "batch", "width", "dtype", "block", "names", "given"),
    [
        (1400, 1400, 1, 128, torch.bfloat16, 128, cases.NAME_SETS[1], True),
        (2711, 2711, 2, 64, torch.float16, 256, cases.NAME_SETS[1], False),
        (1720, 3000, 1, 80, torch.bfloat16, 128, cases.NAME_SETS[1], True),
        (2049, 2049, 1, 128, torch.bfloat16, 128, ("column_sum", "block_mass"), True),
        (2049, 2049, 2, 128, torch.float16, 128, ("entropy", "argmax", "distance", "sink_mass"), True),
        (1999, 1999, 1, 96, torch.float16, 128, ("waad", "fai", "block_max"), True),
        (2303, 2303, 1, 128, torch.bfloat16, 128, ("local_mass", "distance_sq", "row_max", "block_mass"), True),
    ],
)
def test_interior_and_edges_make_the_whole(launched, rows, keys, batch, width, dtype, block, names, given):
    """Odd and even numbers of tiles, a last row tile of one row, chunks behind a cache, every flag on and off."""
    gen = torch.Generator().manual_seed(rows)
    q = (torch.randn(batch, rows, 4, width, generator=gen) * 2).to(dtype).cuda().transpose(1, 2)
    k = torch.randn(batch, 2, keys, width, generator=gen).to(dtype).cuda()
    call = AttentionCall("attention", 0, q, k, None, width**-0.5, MaskFacts(True), query_offset=keys - rows)
    request = StatisticsRequest(names, block=block)
    if given:
        call = replace(call, facts={"lse": triton_measure.measure(call, StatisticsRequest(("lse",))).rows["lse"]})
    first, second = triton_measure.measure(call, request), triton_measure.measure(call, request)
    assert launched == ["launch", "launch"]
    cases.compare(first, call, request, 1e-4)
    for part in ("rows", "columns", "maps"):
        for name, x in getattr(first, part).items():
            assert torch.equal(x, getattr(second, part)[name]), f"{name}: other bits on the second run"


@HOPPER
@pytest.mark.parametrize(
    ("rows", "keys", "batch", "heads", "width", "dtype", "given"),
    [
        (128, 128, 1, 4, 128, torch.bfloat16, True),
        (333, 333, 2, 4, 64, torch.float16, False),
        (2049, 2049, 1, 4, 128, torch.bfloat16, True),
        (300, 447, 1, 2, 96, torch.bfloat16, True),
        (1000, 3384, 1, 6, 128, torch.float16, False),
        (513, 700, 1, 3, 40, torch.bfloat16, True),
    ],
)
def test_column_sums_alone(launched, monkeypatch, rows, keys, batch, heads, width, dtype, given):
    """One tile and many, odd last tiles, chunks behind a cache that start anywhere in a tile, one key head and several."""
    monkeypatch.setattr(triton_interior, "ALONE", True)
    gen = torch.Generator().manual_seed(rows)
    q = (torch.randn(batch, rows, heads, width, generator=gen) * 2).to(dtype).cuda().transpose(1, 2)
    k = torch.randn(batch, 1 if heads == 3 else 2, keys, width, generator=gen).to(dtype).cuda()
    call = AttentionCall("attention", 0, q, k, None, width**-0.5, MaskFacts(True), query_offset=keys - rows)
    request = StatisticsRequest(("lse", "column_sum"))
    if given:
        call = replace(call, facts={"lse": triton_measure.measure(call, StatisticsRequest(("lse",))).rows["lse"]})
    first, second = triton_measure.measure(call, request), triton_measure.measure(call, request)
    assert launched == ["launch_columns", "launch_columns"]
    cases.compare(first, call, request, 1e-4)
    assert torch.equal(first.columns["column_sum"], second.columns["column_sum"])


@HOPPER
@pytest.mark.parametrize(
    ("rows", "keys", "width", "dtype", "names"),
    [
        (1111, 1111, 128, torch.bfloat16, cases.NAME_SETS[1]),
        (333, 900, 64, torch.float16, cases.NAME_SETS[1]),
        (640, 640, 128, torch.float16, ("lse", "argmax", "sink_mass")),
    ],
)
def test_forward_gives_output_and_rows(launched, rows, keys, width, dtype, names):
    gen = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn(2, heads, n, width, generator=gen).to(dtype).cuda() for heads, n in ((4, rows), (2, keys), (2, keys)))
    call = AttentionCall("attention", 0, q, k, v, width**-0.5, MaskFacts(True), query_offset=keys - rows)
    request = StatisticsRequest(names)
    out, statistics = triton_measure.attention(call, request)
    assert launched[0] == "launch_forward"
    want = naive_weights(call) @ v.cpu().double().repeat_interleave(2, 1)
    assert ((out.cpu().double() - want).norm() / want.norm()).item() < 6e-3
    cases.compare(statistics, call, request, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_window_of_exact_weights(width, dtype):
    gen = torch.Generator().manual_seed(width)
    q, k = (torch.randn(2, h, 200, width, generator=gen).to(dtype).cuda() for h in (4, 2))
    call = AttentionCall("attention", 0, q, k, None, width**-0.5, MaskFacts(True, window=90))
    lse = triton_measure.measure(call, StatisticsRequest(("lse",))).rows["lse"]
    queries, keys = torch.randperm(200, generator=gen)[:77], torch.randperm(200, generator=gen)[:131]
    got = triton_measure.window(call, lse, 3, queries, keys).cpu().double()
    torch.testing.assert_close(got, naive_weights(call)[:, 3][:, queries][..., keys], rtol=1e-4, atol=1e-6)


def test_rows_and_columns_are_the_same_on_every_run():
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, 2000, 128, generator=gen).bfloat16().cuda() for h in (8, 2))
    call = AttentionCall("attention", 0, q, k, None, 128**-0.5, MaskFacts(True))
    request = StatisticsRequest()
    first, second = triton_measure.measure(call, request), triton_measure.measure(call, request)
    for part in ("rows", "columns", "maps"):
        for name, x in getattr(first, part).items():
            assert torch.equal(x, getattr(second, part)[name]), name


def test_more_than_two_to_the_31_cells_are_addressed():
    """Offsets of a [heads, n] map and of a long k must not wrap at 2**31 bytes or elements."""
    n = 65536 + 77
    q, k = (torch.randn(1, h, n, 64, device="cuda", dtype=torch.bfloat16) for h in (640, 1))
    call = AttentionCall("attention", 0, q[:, :, -64:], k, None, 0.125, MaskFacts(True), query_offset=n - 64)
    wide = AttentionCall("attention", 0, q[:, -1:, -64:], k, None, 0.125, MaskFacts(True), query_offset=n - 64)
    request = StatisticsRequest(("lse", "entropy", "argmax"))
    got, want = triton_measure.measure(call, request), triton_measure.measure(wide, request)
    for name in request.names:
        assert torch.equal(got.rows[name][:, -1:].isnan(), want.rows[name].isnan())
        torch.testing.assert_close(got.rows[name][:, -1:], want.rows[name], rtol=1e-4, atol=1e-4)

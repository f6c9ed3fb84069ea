"""The Triton kernels against the dense float64 twin, small: without a CUDA device in Triton's interpreter, with one on the device."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.triton_measure as triton_measure
import headscope.kernels.triton_run as triton_run
from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.naive import naive_lse, naive_weights
from headscope.kernels.triton_launch import Tile, use_tile
from headscope.statistics.definitions import DEFINITIONS
from headscope.statistics.request import StatisticsRequest

_spec = importlib.util.spec_from_file_location("triton_cases", Path(__file__).with_name("triton_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["triton_cases"] = cases
_spec.loader.exec_module(cases)

# rows that see nothing have an lse of +inf, and numpy warns where a GPU computes 0 * inf without a word; those rows are then set to NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles small enough that short sequences have full tiles, partial tiles and edges; every buffer starts as NaN."""
    monkeypatch.setattr(triton_run, "POISON", True)
    with use_tile("rows", Tile(32, 32)), use_tile("columns", Tile(32, 32)), use_tile("out", Tile(32, 32)):
        yield


def check(variant, shape):
    call, request = cases.make_case(variant, shape, DEVICE)
    assert triton_measure.supports(call, request) == ""
    cases.compare(triton_measure.measure(cases.poisoned(call), request), call, request, cases.tolerance(variant))


@pytest.mark.parametrize(
    "variant",
    [
        cases.Variant(1, 32, F32),
        cases.Variant(2, 80, F32, causal=False),
        cases.Variant(3, 32, F32, window=True, softcap=True),
        cases.Variant(4, 32, F32, causal=False, window=True, sinks=True),
        cases.Variant(5, 32, F32, padding="left", given=True),
        cases.Variant(6, 32, F32, padding="holes", restrict=True),
        cases.Variant(7, 32, F32, segments="sorted", causal=False),
        cases.Variant(8, 32, F32, segments="unsorted", sinks=True),
        cases.Variant(9, 32, F32, allowed=True, restrict=True),
        cases.Variant(10, 32, F32, bias=True, softcap=True, block=32),
        cases.Variant(11, 32, F32, given=True, open_band=True, block=64),
        cases.Variant(12, 32, F32, given=True, causal=False, restrict=True, window=True),
        cases.Variant(13, 96, F16, open_band=True),
        cases.Variant(14, 64, BF16, padding="right"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [0, 2], ids=["whole", "cropped"])
def test_equals_the_dense_twin(variant, shape):
    check(replace(variant, longest=80), shape)


@pytest.mark.parametrize("shape", [1, 3], ids=["chunk", "decode"])
@pytest.mark.parametrize("given", [False, True])
def test_chunks_and_decode_steps(shape, given):
    check(cases.Variant(21, 32, F32, given=given, block=64, longest=300 if shape == 3 else 100), shape)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_statistic_alone(name):
    """A flag compiled in alone must not read an accumulator that another flag fills."""
    check(cases.Variant(31, 16, F32, names=(name,), longest=80), 0)


def test_full_tiles_are_reached_with_bands():
    """Long enough that tiles without any mask lie behind the bands of waad, local mass and FAI, on both sides of the diagonal."""
    call, request = cases.make_case(cases.Variant(41, 16, F32, causal=False, longest=200), 0, DEVICE)
    q, k = (torch.randn(1, 2, 190, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE) for _ in range(2))
    call = replace(call, q=q, k=k, v=None)
    request = replace(request, local_window=33, waad_window=9, fai_band=(3, 20), labels=torch.arange(190) % 5, segments=None, pairs={},
                      names=tuple(n for n in DEFINITIONS if n not in {"segment_mass", "pairs"}))  # fmt: skip
    for causal in (True, False):
        one = replace(call, mask=MaskFacts(causal))
        cases.compare(triton_measure.measure(one, request), one, request, 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_output_comes_from_the_same_pass(causal):
    call, _ = cases.make_case(cases.Variant(51, 32, F32, causal=causal, window=True, sinks=True), 0, DEVICE)
    request = StatisticsRequest(("lse", "entropy"))
    out, statistics = triton_measure.attention(call, request)
    want = naive_weights(call) @ call.v.cpu().double().repeat_interleave(call.group, 1)
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.rows["lse"].cpu().double(), naive_lse(call), rtol=1e-5, atol=1e-5)


def test_window_of_exact_weights():
    call, _ = cases.make_case(cases.Variant(61, 32, F32, padding="holes", longest=120), 0, DEVICE)
    queries, keys = torch.tensor([call.q.shape[2] - 1, 0, 5]), torch.arange(1, call.k.shape[2])
    lse = naive_lse(call).to(torch.float32).to(DEVICE)
    got = triton_measure.window(call, lse, 1, queries, keys)
    want = naive_weights(call)[:, 1][:, queries][..., keys]
    live = call.mask.query_valid.cpu()[:, queries] & torch.isfinite(lse.cpu()[:, 1][:, queries])
    torch.testing.assert_close(got.cpu().double()[live], want[live], rtol=2e-5, atol=1e-7)


def test_descriptors_and_pointers_agree():
    """Half precision takes tensor descriptors on Hopper; the same numbers must come from plain pointers, bit for bit in the interpreter."""
    call, request = cases.make_case(cases.Variant(71, 64, F16, names=("lse", "entropy", "column_sum", "block_mass")), 0, DEVICE)
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    plain = triton_measure.measure(call, request)
    with use_tile("rows", Tile(32, 32, descriptors=True)), use_tile("columns", Tile(32, 32, descriptors=True)):
        described = triton_measure.measure(call, request)
    for part in ("rows", "columns", "maps"):
        for name, x in getattr(plain, part).items():
            torch.testing.assert_close(getattr(described, part)[name], x, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_sharp_rows_keep_their_digits():
    """An entropy of 1e-6 next to an lse of 60, and a distance of 1 at position 100: sums of p * s and of positions would lose both."""
    n = 120
    k = torch.nn.functional.one_hot(torch.arange(n) % 64, 64).float()[None, None] * 8
    q = k.roll(1, 2) * 1.0
    call = AttentionCall("attention", 0, q.to(DEVICE), k.to(DEVICE), None, 1.0, MaskFacts(True))
    request = StatisticsRequest(("lse", "entropy", "distance", "distance_sq"))
    cases.compare(triton_measure.measure(call, request), call, request, 1e-5)


def test_first_of_equal_keys_wins():
    k = torch.ones(1, 1, 100, 16)
    call = AttentionCall("attention", 0, torch.ones(1, 2, 100, 16).to(DEVICE), k.to(DEVICE), None, 0.25, MaskFacts(True, window=70))
    got = triton_measure.measure(call, StatisticsRequest(("argmax",))).rows["argmax"].cpu()
    assert torch.equal(got[0, 1], (torch.arange(100) - 69).clamp(min=0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": -1.0}, "scale is -1.0"),
        ({"q": torch.zeros(1, 2, 4, 16, dtype=torch.float64)}, "float64"),
        ({"q": torch.zeros(1, 2, 4, 512), "k": torch.zeros(1, 2, 4, 512)}, "head_dim is 512"),
        ({"q": torch.zeros(1, 2, 0, 16)}, "no query"),
    ],
)
def test_declines_with_a_reason(change, reason):
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    q = torch.zeros(1, 2, 4, 16, device=DEVICE)
    call = replace(AttentionCall("attention", 0, q, q, None, 0.25, MaskFacts(True)), **change)
    assert reason in triton_measure.supports(call, StatisticsRequest(("lse",)))

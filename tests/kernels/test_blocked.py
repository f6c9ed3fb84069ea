"""The blocked kernel against the dense float64 twin, over every fact of a call and every parameter of a request."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from statistics_cases import TOLERANCE, every, make_call, random_case, same

from headscope.call import AttentionCall
from headscope.kernels import blocked, blocked_columns, blocked_distance, blocked_rows, geometry, naive_measure, scoring, strips
from headscope.kernels.blocked import measure_blocked
from headscope.statistics.definitions import DEFINITIONS
from headscope.statistics.request import StatisticsRequest


@contextlib.contextmanager
def small_tiles(entries: int, strip: int, most: int = 4000) -> Iterator[None]:
    """Within the block, tiles and strips so small that short sequences are cut in every way a long one is."""
    before = geometry.ENTRIES, geometry.STRIP_ENTRIES, geometry.MOST_ENTRIES
    geometry.ENTRIES, geometry.STRIP_ENTRIES, geometry.MOST_ENTRIES = entries, strip, most
    try:
        yield
    finally:
        geometry.ENTRIES, geometry.STRIP_ENTRIES, geometry.MOST_ENTRIES = before


def agrees(call: AttentionCall, request: StatisticsRequest) -> None:
    same(measure_blocked(call, request), naive_measure(call, request), call, TOLERANCE[call.q.dtype], (call, request.names))


def valid(pads: list[int], count: int, left: bool) -> torch.Tensor:
    s = torch.arange(count)
    return torch.stack([s >= pad if left else s < count - pad for pad in pads])


LEFT, RIGHT = valid([0, 37], 100, True), valid([0, 37], 100, False)
PACKED = (torch.arange(100) // 34).repeat(2, 1)
CASES = {
    "group_1": {"kv_heads": 3, "group": 1},
    "group_3": {"kv_heads": 1, "group": 3, "width": 64},
    "group_4_wide": {"kv_heads": 2, "group": 4, "width": 80},
    "odd_length": {"rows": 131},
    "three_tiles": {"rows": 300, "kv_heads": 1},
    "one_token": {"rows": 1},
    "decode": {"rows": 1, "keys": 150, "batch": 3},
    "decode_sliding_cache": {"rows": 1, "keys": 64, "key_offset": 211},
    "chunk": {"rows": 50, "keys": 180},
    "chunk_sliding_cache": {"rows": 50, "keys": 113, "key_offset": 77, "mask": {"window": 64}},
    "window_1": {"mask": {"window": 1}},
    "window": {"rows": 200, "mask": {"window": 33}},
    "softcap": {"softcap": 5.0, "amplitude": 6.0},
    "sink_logits": {"sink_logits": torch.tensor([-3.0, 0.0, 4.0, 90.0])},
    "left_padding": {"batch": 2, "mask": {"key_valid": LEFT, "query_valid": LEFT}, "first_token": torch.tensor([0, 37])},
    "right_padding": {"batch": 2, "mask": {"key_valid": RIGHT, "query_valid": RIGHT}},
    "padding_without_query_valid": {"batch": 2, "mask": {"key_valid": LEFT}},
    "no_real_key": {"batch": 2, "mask": {"key_valid": valid([0, 100], 100, True), "query_valid": valid([0, 100], 100, True)}},
    "segments": {"batch": 2, "mask": {"query_segments": PACKED, "key_segments": PACKED}},
    "bidirectional": {"causal": False, "rows": 190},
    "bidirectional_window": {"causal": False, "rows": 190, "mask": {"window": 20}},
    "cross_longer": {"causal": False, "rows": 20, "keys": 170, "query_offset": 0},
    "cross_shorter": {"causal": False, "rows": 170, "keys": 20, "query_offset": 0},
    "peaked": {"amplitude": 10.0},
    "flat": {"amplitude": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_every_statistic(case: str, dtype: torch.dtype) -> None:
    call = make_call(dtype=dtype, **CASES[case])
    end = max(call.query_offset + call.q.shape[2], call.key_offset + call.k.shape[2])
    agrees(call, every(end, block=32, local_window=20))


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("offset", [0, 37])
def test_blocks_and_offsets(block: int, offset: int) -> None:
    agrees(make_call(rows=200, keys=200 + offset, key_offset=3), every(203 + offset, block=block))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 500])
def test_local_and_waad_windows(window: int) -> None:
    names = ("local_mass", "waad", "distance")
    agrees(make_call(rows=180), StatisticsRequest(names=names, local_window=window, waad_window=window))
    agrees(make_call(rows=180), StatisticsRequest(names=("waad",), waad_window=window))
    agrees(make_call(rows=180, causal=False), StatisticsRequest(names=names, local_window=window, waad_window=window))


@pytest.mark.parametrize("band", [(0, 0), (0, None), (10, 50), (3, 200), (130, 140), (50, None), (300, None)])
def test_fai_bands(band: tuple[int, int | None]) -> None:
    for causal in (True, False):
        agrees(make_call(rows=260, kv_heads=1, causal=causal), StatisticsRequest(names=("fai",), fai_band=band))


def test_one_head_per_strip() -> None:
    with small_tiles(1, 1):
        agrees(make_call(rows=150, kv_heads=2, group=3), every(150))


def test_chosen_rows() -> None:
    rows = torch.arange(150) % 3 == 0
    agrees(make_call(rows=150), every(150, rows=rows))
    agrees(make_call(batch=2, rows=150), every(150, rows=torch.stack([rows, ~rows])))
    none = measure_blocked(make_call(rows=150), every(150, rows=torch.zeros(150, dtype=torch.bool)))
    assert float(none.columns["column_sum"].abs().max()) == 0.0
    assert int(none.counts["row_count"].max()) == 0
    assert not none.rows["entropy"].isnan().any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_explicit_masks_broadcast(shape: tuple[int, int]) -> None:
    allowed = torch.rand(*shape, 90, 90, generator=torch.Generator().manual_seed(1)) > 0.5
    bias = torch.randn(*shape, 90, 90, generator=torch.Generator().manual_seed(2))
    for causal in (True, False):
        agrees(make_call(batch=2, rows=90, causal=causal, mask={"allowed": allowed}), every(90))
        agrees(make_call(batch=2, rows=90, causal=causal, mask={"bias": bias}), every(90))
        hiding = bias.masked_fill(~allowed, torch.finfo(torch.float32).min)
        agrees(make_call(batch=2, rows=90, causal=causal, mask={"bias": hiding}), every(90))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31 - 1), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), cut=st.booleans()
)
def test_random_calls(seed: int, dtype: torch.dtype, cut: bool) -> None:
    call, request = random_case(seed, dtype)
    with small_tiles(1000, 100) if cut else contextlib.nullcontext():
        agrees(call, request)


def test_dtypes_of_the_result() -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        out = measure_blocked(make_call(rows=40, dtype=dtype), every(40))
        assert out.rows.pop("argmax").dtype == torch.int64
        tensors = [*out.rows.values(), *out.columns.values(), *out.maps.values(), *out.pairs.values(), out.diagonals]
        assert all(value.dtype == expected for value in tensors if value is not None)
        assert all(value.dtype == torch.int64 for value in out.counts.values())


@pytest.mark.parametrize("name", DEFINITIONS)
def test_only_what_is_asked_for(name: str) -> None:
    call = make_call(rows=70)
    out = measure_blocked(call, every(70))
    alone = every(70)
    object.__setattr__(alone, "names", (name,))
    got = measure_blocked(call, alone)
    kinds = [set(got.rows), set(got.columns), set(got.maps), set(got.pairs)]
    owner = {"sink_importance": "column_sum", "fai": "fai_sum", "diagonal_sum": None, "pairs": None}.get(name, name)
    assert set().union(*kinds) == ({"self", "first"} if name == "pairs" else {owner} - {None})
    assert (got.diagonals is not None) == (name == "diagonal_sum")
    assert set(got.counts) == {"fai": {"fai_count"}, "column_sum": {"row_count"}, "sink_importance": {"row_count"}}.get(name, set())
    for kind in ("rows", "columns", "maps", "pairs"):
        for key, value in getattr(got, kind).items():
            torch.testing.assert_close(value, getattr(out, kind)[key], rtol=1e-6, atol=1e-30, equal_nan=True)


def test_inputs_are_not_changed_and_layout_does_not_matter() -> None:
    call = make_call(batch=2, rows=90, mask={"key_valid": valid([0, 20], 90, True), "query_valid": valid([0, 20], 90, True)})
    assert not call.q.is_contiguous()
    tensors = [call.q, call.k, call.mask.key_valid, call.mask.query_valid]
    before = [tensor.clone() for tensor in tensors if tensor is not None]
    request = every(90)
    first = measure_blocked(call, request)
    assert all(torch.equal(old, new) for old, new in zip(before, [t for t in tensors if t is not None], strict=True))
    widely = torch.zeros(2, 4, 90, 48)
    widely[..., ::3] = call.q
    strided = AttentionCall("m", 0, widely[..., ::3], call.k.transpose(2, 3).contiguous().transpose(2, 3), None, call.scale, call.mask)
    assert strided.q.stride(-1) == 3
    assert strided.k.stride(-1) == 90
    same(measure_blocked(strided, request), first, call, 1e-6)


def test_padding_may_hold_anything() -> None:
    """Padding is often uninitialised memory: NaN there must stay there."""
    real = valid([0, 30], 100, True)
    call = make_call(batch=2, mask={"key_valid": real, "query_valid": real})
    clean = measure_blocked(call, every(100))
    q, k = call.q.clone(), call.k.clone()
    q[1, :, :30] = float("nan")
    k[1, :, :30] = float("inf")
    k[1, :, :10] = float("nan")
    dirty = measure_blocked(AttentionCall("m", 0, q, k, None, call.scale, call.mask), every(100))
    same(dirty, clean, call, 1e-6)
    assert dirty.rows["entropy"][1, :, :30].isnan().all()
    assert (dirty.rows["argmax"][1, :, :30] == -1).all()
    assert not dirty.rows["entropy"][1, :, 30:].isnan().any()
    assert not any(value.isnan().any() for value in (*dirty.columns.values(), *dirty.maps.values()))
    assert float(dirty.columns["column_sum"][1, :, :30].abs().max()) == 0.0


def test_far_scores_underflow_to_nothing() -> None:
    """Scores hundreds of nats apart: exponentials underflow, and neither NaN nor a wrong digit comes of it."""
    for dtype in (torch.float32, torch.float64):
        call = make_call(rows=80, amplitude=400.0, dtype=dtype)
        out, expected = measure_blocked(call, every(80)), naive_measure(call, every(80))
        for name in ("distance", "local_mass", "sink_mass", "row_max"):
            torch.testing.assert_close(
                out.rows[name].double(), expected.rows[name], rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6
            )
        assert not out.columns["column_sum"].isnan().any()


def test_threads_give_the_same() -> None:
    """A call dealt out to threads: same statistics, and torch's own settings as they were."""
    call, request = make_call(rows=500, kv_heads=2, group=2, width=16), every(500, block=64)
    threads, few = torch.get_num_threads(), blocked.FEW_ENTRIES
    one = measure_blocked(call, request)
    try:
        torch.set_num_threads(2)
        blocked.FEW_ENTRIES = 1
        two = measure_blocked(call, request)
        again = measure_blocked(call, request)
        assert torch.get_num_threads() == 2
    finally:
        blocked.FEW_ENTRIES = few
        torch.set_num_threads(threads)
    same(two, one, call, 1e-6)
    assert all(torch.equal(two.columns[name], again.columns[name]) for name in two.columns)


def test_memory_grows_with_the_length_not_its_square() -> None:
    """Largest tensor that is allocated, seen by a dispatch mode: 4 times the length must not need 16 times the memory."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    self.numbers = max(self.numbers, value.untyped_storage().nbytes())
            return out

    sizes = []
    for rows in (512, 2048):
        with small_tiles(1 << 14, 1 << 12, 1 << 14), Largest() as largest:
            measure_blocked(make_call(rows=rows, kv_heads=1, group=2, width=16), StatisticsRequest(block=256))
        sizes.append(largest.numbers)
    assert sizes[1] <= 6 * sizes[0]
    assert sizes[1] < 2048 * 2048


def test_the_same_without_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner functions as plain Python, as where TorchScript is gone, give the same numbers."""
    call, request = make_call(rows=200, softcap=5.0, mask={"window": 150}), every(200, block=64)
    scripted = measure_blocked(call, request)
    for module in (blocked_columns, blocked_distance, blocked_rows, scoring):
        for name in ("weigh_strips", "split_normaliser", "sum_columns", "log_peaks", "sum_edge", "take_band", "block_moments"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(strips, name).__wrapped__)
    same(measure_blocked(call, request), scripted, call, 1e-6)


def test_torchscript_is_used() -> None:
    measure_blocked(make_call(rows=20), every(20))
    assert isinstance(strips._scripted(strips.sum_edge.__wrapped__), torch.jit.ScriptFunction)

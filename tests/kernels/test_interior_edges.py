"""A call cut into its interior and its edges: what the two sweeps leave out is what the one-pass kernel takes, no more and no less.

The kernel itself needs Hopper; here a dense twin stands in for it, so that the cut, the launches and the joining run in the interpreter.
"""

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

import headscope.kernels.triton_interior as triton_interior
import headscope.kernels.triton_measure as triton_measure
import headscope.kernels.triton_run as triton_run
from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.naive import naive_lse, naive_weights
from headscope.kernels.triton_common import INTERPRETED
from headscope.kernels.triton_launch import Tile, use_tile
from headscope.statistics.request import StatisticsRequest

_spec = importlib.util.spec_from_file_location("triton_cases", Path(__file__).with_name("triton_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["triton_cases"] = cases
_spec.loader.exec_module(cases)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.skipif(not INTERPRETED, reason="on a device the kernel itself runs, in test_triton_gpu.py"),
]
taken: list[torch.Tensor] = []


def twin(run, near, raw, slots, rows, made, reference):
    """What `interior_kernel` adds, from the dense matrix: key tile j for the rows of program g where
    128 (j + 1) <= 256 g + ahead - near + 1."""
    call = run.call
    a = naive_weights(call)
    t = torch.arange(run.rows)[:, None]
    tile = torch.arange(run.keys)[None, :] // 128
    inside = 128 * (tile + 1) <= t // 256 * 256 + call.query_offset - call.key_offset - near + 1
    taken.append(inside)
    a = torch.where(inside, a, 0.0)
    distance = (call.query_offset + t - call.key_offset - torch.arange(run.keys)[None, :]).double()
    if raw is not None:
        logs = torch.where(a > 0, a.log2(), 0.0)
        sums = {"entropy": (a * logs).sum(-1), "distance": (a * distance).sum(-1), "distance_sq": (a * distance**2).sum(-1)}
        sums["waad"] = a.sum(-1) * run.request.waad_window
        for name, value in sums.items():
            if name in slots:
                raw[slots[name]] += value.float()
        top = torch.where(inside, logs.masked_fill(a == 0, -1e30), -1e30).amax(-1).float()
        if "win" in slots:
            first = torch.where(inside, a, -1.0).argmax(-1) // 128
            raw[slots["win"]] = torch.where((top >= raw[1]) & (top > -1e30), first.float(), raw[slots["win"]])
        raw[1] = torch.maximum(raw[1], top)
    cells = torch.nn.functional.pad(a, (0, -run.keys % 128, 0, -run.rows % 128))
    cells = cells.reshape(*a.shape[:2], -(-run.rows // 128), 128, -(-run.keys // 128), 128)
    for name, value in (("column_sum", a.sum(2)), ("block_mass", cells.sum((3, 5)))):
        if name in made:
            made[name] += value.float()
    if "block_max" in made:
        made["block_max"].copy_(torch.maximum(made["block_max"], cells.amax((3, 5)).float()))


@pytest.fixture(autouse=True)
def with_interior(monkeypatch):
    monkeypatch.setattr(triton_run, "POISON", True)
    monkeypatch.setattr(triton_interior, "INTERPRETED", False)
    monkeypatch.setattr(triton_interior, "hopper", lambda device: True)
    monkeypatch.setattr(triton_interior, "LEAST", 128)
    monkeypatch.setattr(triton_interior, "ALONE", False)
    monkeypatch.setattr(triton_interior, "launch", twin)
    taken.clear()
    with use_tile("rows", Tile(64, 128)), use_tile("columns", Tile(128, 128)):
        yield


def call_of(rows: int, keys: int, given: bool, batch: int = 1) -> AttentionCall:
    gen = torch.Generator().manual_seed(rows)
    q, k = (torch.randn(batch, heads, n, 64, generator=gen).half() for heads, n in ((2, rows), (1, keys)))
    call = AttentionCall("attention", 0, q * 2, k, None, 0.125, MaskFacts(True), query_offset=keys - rows)
    return replace(call, facts={"lse": naive_lse(call).float()}) if given else call


@pytest.mark.parametrize(
    ("rows", "keys", "given", "names"),
    [
        (700, 700, True, cases.NAME_SETS[1]),
        (300, 812, False, cases.NAME_SETS[1]),
        (513, 513, True, ("column_sum",)),
        (600, 600, True, ("entropy", "argmax", "sink_mass", "block_mass")),
    ],
)
def test_edges_and_interior_make_the_whole(rows, keys, given, names):
    call, request = call_of(rows, keys, given), StatisticsRequest(names, block=128)
    cases.compare(triton_measure.measure(call, request), call, request, 1e-4)
    assert len(taken) == 1
    assert 0.2 < taken[0].float().mean() < 0.9


@pytest.mark.parametrize(
    "change",
    [
        {"names": cases.NAME_SETS[3]},
        {"names": ("column_sum",), "rows": torch.arange(700) % 3 > 0},
        {"names": ("fai",), "fai_band": (3, None)},
        {"names": ("block_mass",), "block": 64},
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_the_sweeps(change):
    request = StatisticsRequest(**{"labels": torch.zeros(700, dtype=torch.int64), **change})
    run = triton_measure._Run(call_of(700, 700, True), request)
    assert triton_interior.plan(run) is None
    assert triton_interior.plan(triton_measure._Run(call_of(700, 700, True), StatisticsRequest())) is not None


@pytest.mark.parametrize(
    ("change", "alone"),
    [
        ({"names": ("lse", "column_sum")}, True),
        ({"names": ("column_sum",)}, True),
        ({"names": ("lse", "column_sum", "sink_logit_mass")}, True),
        ({"names": ("column_sum", "entropy")}, False),
        ({"names": ("column_sum", "fai")}, False),
        ({"names": ("column_sum", "diagonal_sum")}, False),
        ({"names": ("column_sum",), "rows": torch.arange(700) % 3 > 0}, False),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_column_sums_alone_have_a_sweep_of_their_own(change, alone, given, monkeypatch):
    """Where it runs it is the only one, besides the rows' where the lse is not given; with anything else asked for it does not run."""
    ran = []

    def columns(run, lse):
        ran.append(1)
        a = torch.exp(torch.log(naive_weights(run.call)) + (naive_lse(run.call) - lse.double())[..., None])  # with the lse it is given
        return a.sum(2).float()

    monkeypatch.setattr(triton_interior, "ALONE", True)
    monkeypatch.setattr(triton_interior, "launch_columns", columns)
    if alone:
        monkeypatch.setattr(triton_measure._Run, "sweep_columns", None)
    call, request = call_of(700, 700, given), StatisticsRequest(**change)
    cases.compare(triton_measure.measure(call, request), call, request, 1e-4)
    assert ran == [1] * alone

"""The fold kernels against their dense float64 twins: in Triton's interpreter without a CUDA device, with one on the device."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.triton_run as triton_run
from headscope.interventions import p_site
from headscope.interventions.fold import Fold
from headscope.kernels import shifted as twins
from headscope.kernels import triton_partial
from headscope.kernels.dispatch import use_backend
from headscope.kernels.naive import naive_lse
from headscope.kernels.partial import select_heads

from .dense_edits import Dense, close
from .edit_cases import calls, in_dtype, make_call

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = [(name, call) for name, call in calls(rows=70) if name != "no groups"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel forgets to write is NaN."""
    monkeypatch.setattr(triton_run, "POISON", True)


def there(call, dtype=torch.float32):
    return in_dtype(call, dtype, DEVICE)


def codes_of(call, heads, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 4, (call.q.shape[0], heads, call.k.shape[2]), generator=draw, dtype=torch.int8)
    return codes * (torch.rand(codes.shape, generator=draw) < 0.2)


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
def test_masses_and_shifted_equal_their_twins(name, call):
    call, exact = there(call)
    heads = call.q.shape[1]
    codes = codes_of(exact, heads, 3)
    lse = naive_lse(exact).float().to(DEVICE)
    keys = triton_partial.listed(codes.to(DEVICE))
    for place, row in enumerate(codes.flatten(0, 1)):
        assert keys.keys[place, : int(keys.number[place])].tolist() == row.nonzero().flatten().tolist()
    found = triton_partial.masses(call, lse, codes.to(DEVICE), 2, keys).cpu().double()
    counts = Dense(exact).counts.transpose(1, 2)
    want = twins.naive_masses(exact, codes, 2)
    assert float((found - want)[:, counts].abs().max()) < 2e-6
    draw = torch.Generator().manual_seed(5)
    base, f_1, f_2 = torch.randn(3, *lse.shape, generator=draw)
    base = torch.where(torch.rand(base.shape, generator=draw) < 0.2, torch.nan, base)
    z = Dense(exact).output
    for weak in (torch.zeros_like(counts), torch.rand(base.shape, generator=draw) < 0.05):
        index = torch.arange(heads)
        got = triton_partial.shifted(
            call, lse, z.float().to(DEVICE), index.to(DEVICE), base.to(DEVICE), (f_1.to(DEVICE), f_2.to(DEVICE)), weak.to(DEVICE),
            codes.to(DEVICE), keys,
        )  # fmt: skip
        want = twins.naive_shifted(exact, z.float(), index, base, (f_1, f_2), codes)
        error = (got.cpu().double() - want)[counts.transpose(1, 2)]
        assert float(error.abs().max()) < 1e-5, name
        kept = base.isnan().transpose(1, 2)
        assert torch.equal(got.cpu()[kept], z.float()[kept])


@pytest.mark.parametrize("others", [False, True])
def test_factors_by_their_formulas(others):
    draw = torch.Generator().manual_seed(0)
    m_s, m_t = torch.rand(2, 2, 3, 700, generator=draw)
    m_s[0, 0, :5], m_t[0, 0, 5:9], m_s[1, 2, 3] = 0.0, 0.0, torch.nan
    gate, rows = torch.rand(2, 3, 700, generator=draw) < 0.7, torch.rand(2, 700, generator=draw) < 0.7
    given = [one.to(DEVICE) for one in (m_s, m_t, gate, rows)]
    for some_gate, some_rows in ((None, None), (given[2], given[3]), (given[2], given[3][:1])):
        base, kept, grown = (one.cpu() for one in triton_partial.factors(*given[:2], 0.3, some_gate, some_rows, others))
        counts = (m_t >= 1e-12) & (m_s > 0) & (True if some_gate is None else gate)
        edited = counts if some_rows is None else counts & rows[: len(some_rows), None]
        gain = torch.where(counts, 1 + 0.7 * m_s / m_t, 1.0)
        torch.testing.assert_close(grown, gain)
        torch.testing.assert_close(kept, torch.where(counts, 0.3, 1.0))
        want = torch.where(edited, gain if others else torch.ones_like(gain), torch.nan)
        torch.testing.assert_close(base, want, equal_nan=True)


@pytest.mark.parametrize("target", ["others", "spare", "named"])
@pytest.mark.parametrize("heads", [[4], [0, 1, 2, 3, 4, 5], [5, 0]], ids=str)
def test_redistribute_runs_on_them(target, heads, monkeypatch):
    call, exact = there(make_call(3, rows=70, softcap=2.0, sink_logits=torch.randn(6, dtype=torch.float64)))
    source = torch.rand(70, generator=torch.Generator().manual_seed(2)) < 0.2
    given = (torch.rand(70, generator=torch.Generator().manual_seed(4)) < 0.3) & ~source
    rows = (torch.rand(2, 70, generator=torch.Generator().manual_seed(6)) < 0.7).to(DEVICE)
    ran = []
    real = triton_partial.shifted
    monkeypatch.setattr(triton_partial, "shifted", lambda *args: ran.append(1) or real(*args))
    z = Dense(exact).output
    options = {"others": {}, "spare": {"spare": given.to(DEVICE)}, "named": {"target": given.to(DEVICE)}}[target]
    with use_backend("triton"):
        got = p_site.redistribute(call, z.float().to(DEVICE), heads, source.to(DEVICE), keep=0.3, rows=rows, **options)
    assert ran
    want = ~source & ~given if target == "spare" else given if target == "named" else None
    close(got.cpu(), Dense(exact).redistribute(heads, source, want, 0.3, rows.cpu()), 2e-5)
    others = [head for head in range(6) if head not in heads]
    assert torch.equal(got[:, :, others].cpu(), z.float()[:, :, others])


def test_rows_that_keep_little_are_summed_directly():
    """A sink with nearly all of a row: what is left is not the difference of two rounded numbers."""
    call, exact = there(make_call(1, rows=70, batch=1))
    q, k = call.q.clone(), call.k.clone()
    k[:, :, 1] = 0.0
    k[:, :, 1, 0], q[..., 0] = 9.0, 4.0
    call, exact = replace(call, q=q, k=k), replace(exact, q=q.cpu().double(), k=k.cpu().double())
    z = Dense(exact).output.bfloat16().float()  # an output rounded as a model in bfloat16 has it
    source = torch.zeros(70, dtype=torch.bool)
    source[1] = True
    with use_backend("triton"):
        got = p_site.redistribute(call, z.to(DEVICE), [0, 3], source.to(DEVICE), keep=0.4, limit=0.25)
    want = Dense(exact).redistribute([0, 3], source, None, 0.4)
    left = 1 - Dense(exact).a[:, [0, 3], 2:, 1]
    assert 1e-9 < float(left.min()) < float(left.median()) < 1e-2, "the sink has nearly all of these rows"
    edited = (Dense(exact).a[:, [0, 3], :, 1] > 0).transpose(1, 2)  # from the row of the sink on
    error = (got.cpu().double() - want.output)[:, :, [0, 3]][edited]
    assert float(error.abs().max()) < 1e-4


def test_a_host_lse_of_all_heads_serves_some():
    """The host's kernel hands out the lse of every head; a fold of two heads takes theirs."""
    call, exact = there(make_call(2, rows=70))
    whole = replace(call, facts={"lse": naive_lse(exact).float().to(DEVICE)})
    assert torch.equal(select_heads(whole, [4, 1]).facts["lse"], whole.facts["lse"][:, [4, 1]])
    with use_backend("triton"):
        got = Fold.of(whole).lse([4, 1])
    assert float((got.cpu().double() - naive_lse(exact)[:, [4, 1]]).abs().max()) < 1e-5

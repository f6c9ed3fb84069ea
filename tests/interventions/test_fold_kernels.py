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
from headscope import interventions as hi
from headscope.interventions import p_site
from headscope.interventions.fold import Fold
from headscope.kernels import shifted as twins
from headscope.kernels import triton_keys, triton_partial
from headscope.kernels.dispatch import use_backend
from headscope.kernels.naive import naive_lse
from headscope.kernels.partial import exact_attention, select_heads

from .dense_edits import Dense, close
from .edit_cases import calls, in_dtype, make_call
from .method_cases import applied, bound, drawn, seeing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = dict(calls(rows=70))
CALLS = [(name, call) for name, call in ALL.items() if name != "no groups"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel forgets to write is NaN."""
    monkeypatch.setattr(triton_run, "POISON", True)


def there(call, dtype=torch.float32):
    return in_dtype(call, dtype, DEVICE)


def codes_of(call, heads, seed):
    """int8 [B, heads, Nk]: source 1, second set 2, watched 5, most keys in none."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.tensor([1, 2, 5, 2])[torch.randint(0, 4, (call.q.shape[0], heads, call.k.shape[2]), generator=draw)].to(torch.int8)
    return codes * (torch.rand(codes.shape, generator=draw) < 0.4)


def check_lists(keys):
    """The lists of a KeyLists, by their definition."""
    for bit in range(keys.sets):
        for place, row in enumerate((keys.codes.flatten(0, 1).long() >> bit & 1).cpu()):
            assert keys.upto[bit, place].tolist() == row.cumsum(0).tolist()
            assert keys.columns[bit, place, : int(row.sum())].tolist() == row.nonzero().flatten().tolist()


GATES = {
    "all": lambda shape: None,
    "table": lambda shape: torch.rand(shape, generator=torch.Generator().manual_seed(8)) < 0.6,
    "share of the target": lambda shape: twins.Gate(0.2, 0.5),
    "share of the watched": lambda shape: twins.Gate(0.1, 0.3, True, torch.tensor([0.05] * shape[0])),
}


@pytest.mark.parametrize("place", range(len(CALLS)), ids=[name for name, _ in CALLS])
def test_redistributed_equals_its_twin(place):
    """Two in turn of: all keys but a few as the target, the same with some left alone, a given target; over the calls under gates of all
    kinds, with few rows summed directly, and all."""
    name, call = CALLS[place]
    call, exact = there(call)
    heads, z, lse = call.q.shape[1], Dense(exact).output.float(), naive_lse(exact).float().to(DEVICE)
    counts, index = Dense(exact).counts, torch.arange(heads)
    some = torch.rand(len(z), z.shape[1], generator=torch.Generator().manual_seed(6)) < 0.7
    edited = 0
    kinds = [(True, 1), (True, 2), (False, 2)]
    for at, (others, sets) in enumerate([kinds[place % 3], kinds[(place + 1) % 3]]):
        codes = codes_of(exact, heads, 3)
        codes = codes & 5 if sets == 1 else codes
        keys = triton_keys.listed(codes.to(DEVICE), sets)
        check_lists(keys)
        gate = list(GATES.values())[(place + at) % len(GATES)](lse.shape)
        limit, rows = (0.05, 2.0)[(place + at) % 2], (None, some, some[:1])[(place // 2 + at) % 3]
        got, kept, grown = triton_partial.redistributed(
            call, lse, z.to(DEVICE), index.to(DEVICE), keys, keep=0.3, others=others, limit=limit,
            gate=gate.to(DEVICE) if isinstance(gate, torch.Tensor) else gate, rows=None if rows is None else rows.to(DEVICE),
        )  # fmt: skip
        want, changes = twins.naive_redistributed(exact, codes, 0.3, others, gate, rows)
        edited += int(changes.sum())
        changes = changes.transpose(1, 2)
        error = (got.cpu().double() - want)[changes & counts]
        assert not len(error) or float(error.abs().max()) < 2e-5, (name, others, sets)
        assert torch.equal(got.cpu()[~changes], z[~changes])
        assert bool(((kept == 1.0) | (kept == torch.tensor(0.3))).all())
        assert torch.equal((kept != 1.0).cpu(), (grown > 1.0).cpu())
    assert edited > 5


def test_sinks_and_their_lists():
    """Means over the rows that count, at a threshold, the first key apart; in a window of positions."""
    draw = torch.Generator().manual_seed(0)
    sums, counts = torch.rand(2, 3, 1300, generator=draw), torch.randint(0, 40, (2, 1300), generator=draw)
    limit = 0.05
    for offset, size, apart in ((0, 1300, False), (0, 1300, True), (1100, 200, True)):
        keys = triton_keys.sinks_listed(sums.to(DEVICE), counts.to(DEVICE), limit, offset, size, 0, apart)
        want = sums / counts.clamp_min(1)[:, None] > limit
        want[:, :, 0] = False
        assert torch.equal(keys.codes.cpu() & 1 != 0, want[:, :, offset : offset + size])
        second = torch.zeros(2, 3, size, dtype=torch.bool)
        second[:, :, 0] = apart and offset == 0
        assert torch.equal(keys.codes.cpu() & 2 != 0, second)
        assert keys.sets == 1 + apart
        check_lists(keys)


def test_massive_tokens():
    from headscope.probes.visual_sinks import sink_phi

    hidden = torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(1))
    hidden[0, 3, 7], hidden[1, 20, 9], hidden[0, 5] = 30.0, -20.0, 0.0
    for part in (hidden, hidden[:, 5:]):
        found = triton_keys.massive(part.to(DEVICE), torch.tensor([7, 9]).to(DEVICE), 2.0)
        assert found.dtype == torch.bool
        assert torch.equal(found.cpu(), sink_phi(part.double(), (7, 9)) >= 2.0)
        assert 2 <= int(found.sum()) < found.numel()


@pytest.mark.parametrize("target", ["others", "spare", "named"])
@pytest.mark.parametrize("heads", [[4], [0, 1, 2, 3, 4, 5], [5, 0]], ids=str)
def test_redistribute_runs_on_them(target, heads, monkeypatch):
    call, exact = there(make_call(3, rows=70, softcap=2.0, sink_logits=torch.randn(6, dtype=torch.float64)))
    source = torch.rand(70, generator=torch.Generator().manual_seed(2)) < 0.2
    given = (torch.rand(70, generator=torch.Generator().manual_seed(4)) < 0.3) & ~source
    rows = (torch.rand(2, 70, generator=torch.Generator().manual_seed(6)) < 0.7).to(DEVICE)
    ran = []
    real = triton_partial.redistributed
    monkeypatch.setattr(triton_partial, "redistributed", lambda *args, **options: ran.append(1) or real(*args, **options))
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


HEADS = [(0, 4), (0, 0), (0, 3)]


def in_steps(call, at=60, drop=0):
    """A prefill, and the rows behind it one by one with the keys of all before, but for the first `drop`."""
    steps = [replace(call, q=call.q[:, :, :at], k=call.k[:, :, :at], v=call.v[:, :, :at])]
    for row in range(at, at + 2):
        k, v = (x[:, :, drop : row + 1] for x in (call.k, call.v))
        steps.append(replace(call, q=call.q[:, :, row : row + 1], k=k, v=v, query_offset=row, key_offset=drop))
    return steps


RUNS = {
    "act": (hi.ACT(HEADS, alpha=2.0), in_steps(ALL["causal"])),
    "act, the first one apart": (hi.ACT(HEADS, alpha=2.0, target="others_not_first"), in_steps(ALL["soft cap"])),
    "act, all heads": (hi.ACT([(0, head) for head in range(6)], threshold=0.05), [ALL["sinks"]]),
    "act, keys that are gone": (
        hi.ACT(HEADS, threshold=0.04, target="others_not_first"),
        in_steps(make_call(7, rows=70, window=20), drop=40),
    ),
    "act, padding": (hi.ACT(HEADS, alpha=2.0), [ALL["left padding"]]),
    "act, given keys": (hi.ACT(HEADS, alpha=2.0, target=slice(12, 40)), [ALL["causal"]]),
    "var": (hi.VAR(HEADS, rho=0.1, min_visual=0.05), [seeing("causal")]),
    "var, padding": (hi.VAR(HEADS, rho=0.1, min_visual=0.05), [seeing("left padding")]),
    "var, official": (hi.VAR(HEADS, rho=0.3, min_visual=0.05, variant="official"), [seeing("sinks")]),
}


@pytest.mark.parametrize("name", RUNS)
def test_methods_by_the_kernels(name, monkeypatch):
    """ACT with its running sums and VAR with its sinks from hidden states, prefill and decode, in float32 against plain float64."""
    edit, steps = RUNS[name]
    hidden = (drawn(2, 70, 16, seed=9) * 1.2).float()
    pairs = [there(call) for call in steps]
    fast, exact = (bound(edit, pairs[0][0], part) for part in (hidden.to(DEVICE), hidden.double()))
    ran = []
    real = triton_partial.redistributed
    monkeypatch.setattr(triton_partial, "redistributed", lambda *args, **options: ran.append(1) or real(*args, **options))
    for call, twin in pairs:
        with use_backend("triton"):
            got = applied(fast, call).cpu().double()
        want, plain = applied(exact, twin), exact_attention(twin)
        keep = Dense(twin).counts.any(-1)
        assert float((want - plain)[keep].abs().max()) > 1e-3
        assert float((got - want)[keep].abs().max()) < 1e-5
    assert len(ran) == len(steps)
    if name.startswith("act"):
        sums = [one.bound.state["m"].sums.cpu().double() for one in (fast, exact)]
        assert float((sums[0] - sums[1]).abs().max()) < 1e-4

"""Partial attention and edits of scores equal the dense matrix in float64, on calls of every kind; nothing changed is the very object."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import p_site, s_site
from headscope.interventions.fold import Fold
from headscope.kernels.naive import naive_lse
from headscope.kernels.partial import exact_attention, naive_partial, partial_attention, row_lse, select_heads

from .dense_edits import Dense, close
from .edit_cases import make_call
from .primitive_cases import CALLS, every_call, fresh, heads_of, on_rows, outside, ran, rows_of, some_keys

# ---- partial attention --------------------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("some", [False, True], ids=["all keys", "some keys"])
def test_partial_attention_equals_its_dense_twin(call, some):
    keys = torch.tensor([0, 2, 5]) if some else None
    lse = row_lse(call)
    counts = ~lse.isnan()
    assert lse.dtype == torch.float64
    torch.testing.assert_close(lse[counts], naive_lse(call)[counts], rtol=0, atol=1e-10)
    mass, total = partial_attention(call, lse, keys)
    want_mass, want = naive_partial(call, keys)
    torch.testing.assert_close(mass[counts], want_mass[counts], rtol=0, atol=1e-10)
    torch.testing.assert_close(total[counts], want[counts], rtol=0, atol=1e-10)
    if not some:
        torch.testing.assert_close(exact_attention(call).transpose(1, 2)[counts], want[counts], rtol=0, atol=1e-10)


@every_call
def test_a_selection_of_heads_and_rows_is_that_part_of_the_call(call):
    heads, dense = heads_of(call), Dense(call)
    for chosen in (heads, list(range(call.group))):
        got = Dense(select_heads(call, chosen))
        assert torch.equal(got.a, dense.a[:, chosen])
    span = slice(call.q.shape[2] // 2, call.q.shape[2])
    assert torch.equal(Dense(select_heads(call, heads, span)).a, dense.a[:, heads, span])


def test_whole_groups_are_views():
    call = make_call()
    part = select_heads(call, [3, 4, 5])
    assert part.k.data_ptr() == call.k[:, 1].data_ptr()
    assert part.k.shape[1] == 1
    assert select_heads(call, list(range(6))) is call


def test_blocks_of_rows_do_not_matter(monkeypatch):
    call = make_call(rows=40)
    lse = row_lse(call)
    whole = partial_attention(call, lse)
    monkeypatch.setattr("headscope.kernels.partial.ENTRIES", 1)
    torch.testing.assert_close(partial_attention(call, lse)[1], whole[1], rtol=0, atol=1e-12)
    some = partial_attention(call, lse, rows=torch.tensor([3, 17]))
    torch.testing.assert_close(some[1], whole[1][:, :, [3, 17]], rtol=0, atol=1e-12)


# ---- S site -------------------------------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("form", ["key", "sequence and key", "head and key"])
def test_key_bias(call, form):
    heads = heads_of(call)
    batch, keys = call.q.shape[0], call.k.shape[2]
    shape = {"key": (keys,), "sequence and key": (batch, keys), "head and key": (batch, len(heads), keys)}[form]
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias[..., 3:4] = 4.0
    dense = Dense(call)
    full = torch.zeros(batch, call.q.shape[1], 1, keys, dtype=torch.float64)
    full[:, heads] = (bias if form == "head and key" else bias.expand(batch, keys)[:, None])[:, :, None]
    edited = s_site.key_bias(call, heads, bias)
    close(ran(edited), dense.add(heads, full))
    assert edited.mask.bias is not None
    if call.mask.bias is None:
        assert edited.mask.bias.stride(2) == 0 or call.q.shape[2] == 1
    part = select_heads(edited, heads).mask.bias
    assert call.mask.bias is not None or part.shape[2] == 1 or part.stride(2) == 0
    twice = s_site.key_bias(edited, heads, bias)
    close(ran(twice), dense.add(heads, full))
    assert s_site.key_bias(call, heads, torch.zeros_like(bias)) is call


@every_call
def test_a_bias_of_minus_infinity_hides_keys(call):
    heads, keys = heads_of(call), some_keys(call)
    bias = torch.where(keys, -math.inf, 0.0).double()
    dense = Dense(call)
    full = torch.zeros(*call.q.shape[:2], 1, call.k.shape[2], dtype=torch.float64)
    full[:, heads] = bias[:, None, None]
    dense.add(heads, full)
    dense.visible = dense.visible & (dense.scores > -math.inf)
    close(ran(s_site.key_bias(call, heads, bias)), dense)


@every_call
@on_rows
@pytest.mark.parametrize("bias", [1.3, -2.0, -60.0, "rows"])
def test_set_bias(call, restricted, bias):
    heads, keys, rows = heads_of(call), some_keys(call), rows_of(call, restricted)
    call, dense = fresh(call)
    output = dense.output
    if bias == "rows":
        bias = torch.randn(call.q.shape[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = s_site.set_bias(call, output, heads, keys, bias, rows)
    add = bias[None, None, :, None] if isinstance(bias, torch.Tensor) else torch.tensor(bias, dtype=torch.float64)
    close(got, dense.add(heads, torch.where(dense.members(keys), add, 0.0), rows))
    outside(call, got, output, heads, rows)
    torch.testing.assert_close(
        Fold.of(call).lse(heads)[dense.counts.transpose(1, 2)[:, heads]],
        lse_of(dense)[:, heads][dense.counts.transpose(1, 2)[:, heads]],
        rtol=0,
        atol=1e-9,
    )
    assert s_site.set_bias(call, output, heads, keys, 0.0) is output


def lse_of(dense):
    parts = dense.scores if dense.sinks is None else torch.cat([dense.scores, dense.sinks], -1)
    return torch.logsumexp(parts, -1)


@every_call
@on_rows
def test_set_mass_gives_the_keys_that_share(call, restricted):
    heads, keys, rows = heads_of(call), some_keys(call), rows_of(call, restricted)
    call, dense = fresh(call)
    members = dense.members(keys)
    m = (dense.a * members).sum(-1, keepdim=True)
    possible = (m > 0) & (m < 1 - 1e-15)
    bias = torch.where(possible, math.log(0.3 / 0.7) + torch.log1p(-m) - m.log(), 0.0)
    got = s_site.set_mass(call, dense.output, heads, keys, 0.3, rows)
    dense.add(heads, torch.where(members, bias, 0.0), rows)
    close(got, dense, 1e-9)
    share = (dense.a * members).sum(-1, keepdim=True)[dense.where(heads, rows) & possible & dense.counts.transpose(1, 2)[..., None]]
    torch.testing.assert_close(share, torch.full_like(share, 0.3), rtol=0, atol=1e-9)


@every_call
@on_rows
@pytest.mark.parametrize("factor", [0.9, -0.7, 5.0])
def test_abs_boost(call, restricted, factor):
    heads, keys, rows = heads_of(call), some_keys(call), rows_of(call, restricted)
    call, dense = fresh(call)
    output = dense.output
    got = s_site.abs_boost(call, output, heads, keys, factor, rows)
    close(got, dense.boost(heads, keys, factor, rows))
    outside(call, got, output, heads, rows)
    assert s_site.abs_boost(call, output, heads, keys, 0.0) is output


def test_a_boost_of_1_takes_negative_scores_to_0():
    call = make_call(batch=1, heads=1, kv_heads=1)
    keys = torch.ones(13, dtype=torch.bool)
    dense = Dense(call).boost([0], keys, 1.0)
    assert float(dense.scores[dense.visible].min()) == 0.0
    close(s_site.abs_boost(call, Dense(call).output, [0], keys, 1.0), dense)


@every_call
@on_rows
@pytest.mark.parametrize("tau", [0.5, 3.0])
@pytest.mark.parametrize("every", [False, True], ids=["some heads", "every head"])
def test_temperature(call, restricted, tau, every):
    heads = list(range(call.q.shape[1])) if every else heads_of(call)
    rows = rows_of(call, restricted)
    call, dense = fresh(call)
    output = dense.output
    before = s_site.temperature_before(call, heads, tau, rows)
    if before is None:
        assert call.softcap is not None or call.mask.bias is not None or call.sink_logits is not None
        got = s_site.temperature_after(call, output, heads, tau, rows)
        outside(call, got, output, heads, rows)
    else:
        got = ran(before)
    close(got, dense.cool(heads, tau, rows))
    assert s_site.temperature_before(call, heads, 1.0, rows) is call
    assert s_site.temperature_after(call, output, heads, 1.0, rows) is output


@every_call
@on_rows
def test_queries_of_zero_are_uniform_attention(call, restricted):
    if call.mask.bias is not None or call.sink_logits is not None:
        call = replace(call, mask=replace(call.mask, bias=None), sink_logits=None)
    heads, rows = heads_of(call), rows_of(call, restricted)
    close(ran(s_site.query_replace(call, heads, "zero", rows)), Dense(call).mix(heads, "uniform", 1.0, rows))


@pytest.mark.parametrize("name", ["bidirectional", "right padding", "two-sided window", "cross"])
def test_the_mean_query_is_attention_of_the_mean_query(name):
    call = dict(CALLS)[name]
    heads = heads_of(call)
    close(ran(s_site.query_replace(call, heads, "mean")), Dense(call).mix(heads, "query_mean", 1.0))
    close(p_site.mix(call, Dense(call).output, heads, "query_mean", 0.3), Dense(call).mix(heads, "query_mean", 0.3))


def test_the_mean_query_is_refused_where_it_would_see_the_future():
    call = make_call()
    with pytest.raises(InterventionError, match="later tokens"):
        s_site.query_replace(call, [0], "mean")
    with pytest.raises(InterventionError, match="causal"):
        s_site.query_replace(call, [0], "blur", True, 1.0)


def test_blurred_queries_by_hand():
    """3 x 4 tokens, sigma 1/3: a kernel of three taps, by loops with reflected borders."""
    call = make_call(causal=False, rows=16, heads=2, kv_heads=2)
    sigma = 1 / 3
    taps = torch.tensor([math.exp(-(d**2) / (2 * sigma**2)) for d in (-1, 0, 1)], dtype=torch.float64)
    taps /= taps.sum()
    q = call.q.unflatten(2, (4, 4))
    want = torch.zeros_like(q)
    mirror = {-1: 1, 4: 2}
    for y in range(4):
        for x in range(4):
            for i, dy in enumerate((-1, 0, 1)):
                for j, dx in enumerate((-1, 0, 1)):
                    want[:, :, y, x] += taps[i] * taps[j] * q[:, :, mirror.get(y + dy, y + dy), mirror.get(x + dx, x + dx)]
    got = s_site.query_replace(call, [1], "blur", True, sigma)
    torch.testing.assert_close(got.q[:, 1], want.flatten(2, 3)[:, 1], rtol=0, atol=1e-12)
    assert torch.equal(got.q[:, 0], call.q[:, 0])
    assert s_site.query_replace(call, [1], "blur", True, 0.0) is call
    wide = s_site.query_replace(call, [1], "blur", True, sigma, (2, 8))
    tall = s_site.query_replace(call, [1], "blur", True, sigma, (8, 2))
    assert float((wide.q - tall.q).abs().max()) > 1e-2
    with pytest.raises(InterventionError, match=r"no grid of 3 x 5"):
        s_site.query_replace(call, [1], "blur", True, sigma, (3, 5))
    with pytest.raises(InterventionError, match="wider than the image"):
        s_site.query_replace(call, [1], "blur", True, 4.0)

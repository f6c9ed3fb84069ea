"""Every primitive equals the explicit edit of the dense matrix in float64, on calls of every kind; nothing changed is the very object."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import p_site, s_site, z_site
from headscope.interventions.fold import Fold
from headscope.interventions.patterns import PATTERNS
from headscope.kernels.naive import naive_lse
from headscope.kernels.partial import exact_attention, naive_partial, partial_attention, row_lse, select_heads

from .dense_edits import Dense, close
from .edit_cases import calls, make_call

CALLS = calls()
every_call = pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
on_rows = pytest.mark.parametrize("restricted", [False, True], ids=["all rows", "some rows"])


def heads_of(call):
    """Some heads, of more than one group where there is one, not in order."""
    return [call.q.shape[1] - 1, 0] if call.q.shape[1] > 3 else [1]


def rows_of(call, restricted):
    if not restricted:
        return True
    rows = torch.rand(call.q.shape[0], call.q.shape[2], generator=torch.Generator().manual_seed(3)) < 0.5
    rows[:, -1] = True
    return rows


def some_keys(call, seed=5, share=0.4):
    """A key set per sequence; the first key is in it."""
    keys = torch.rand(call.q.shape[0], call.k.shape[2], generator=torch.Generator().manual_seed(seed)) < share
    keys[:, 0] = True
    keys[:, 1] = False
    return keys


def fresh(call):
    return replace(call, facts=dict(call.facts)), Dense(call)


def outside(call, got, output, heads, rows):
    """Heads and rows that were not named are the same to the bit."""
    other = [head for head in range(call.q.shape[1]) if head not in heads]
    assert torch.equal(got[:, :, other], output[:, :, other])
    if rows is not True:
        assert torch.equal(got[~rows.expand(got.shape[:2])], output[~rows.expand(got.shape[:2])])


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


def ran(call):
    return exact_attention(call)


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


# ---- P site -------------------------------------------------------------------------------------------------------------------


@every_call
@on_rows
@pytest.mark.parametrize("keep", [0.4, 0.0, 1.5])
@pytest.mark.parametrize("to", ["others", "a set"])
def test_redistribute(call, restricted, keep, to):
    heads, source, rows = heads_of(call), some_keys(call), rows_of(call, restricted)
    target = None if to == "others" else some_keys(call, seed=9) & ~source
    call, dense = fresh(call)
    output = dense.output
    before = dense.a.sum(-1)
    got = p_site.redistribute(call, output, heads, source, target, keep=keep, rows=rows)
    dense.redistribute(heads, source, target, keep, rows)
    close(got, dense)
    outside(call, got, output, heads, rows)
    torch.testing.assert_close(dense.a.sum(-1), before, rtol=0, atol=1e-12)
    assert p_site.redistribute(call, output, heads, source, target, keep=1.0) is output
    assert p_site.redistribute(call, output, heads, torch.zeros_like(source), target, keep=0.4) is output


def test_redistribute_per_head_and_gated():
    call = make_call()
    source = torch.rand(2, 2, 13, generator=torch.Generator().manual_seed(1)) < 0.3
    gate = torch.rand(2, 2, 13, generator=torch.Generator().manual_seed(2)) < 0.5
    dense = Dense(call)
    got = p_site.redistribute(call, dense.output, [1, 4], source, keep=0.4, gate=gate)
    want = Dense(call)
    for index, head in enumerate((1, 4)):
        for b in range(2):
            one = Dense(call).redistribute([head], source[:, index], None, 0.4)
            want.a[b, head] = torch.where(gate[b, index, :, None], one.a[b, head], want.a[b, head])
    close(got, want)


def test_act_by_hand():
    """A = (.5, .3, .2), sink {1} kept at .4: .18 is freed, 5/7 of it to key 0 and 2/7 to key 2."""
    got = by_hand([0.5, 0.3, 0.2], [1], None, 0.4)
    assert got == pytest.approx([0.62857142857, 0.12, 0.25142857143])


def test_var_by_hand():
    """(BOS .4 | image .2 .1 .1 | text .2), sinks {BOS, first image token}, .6 of them to the other image tokens."""
    assert by_hand([0.4, 0.2, 0.1, 0.1, 0.2], [0, 1], [2, 3], 0.4) == pytest.approx([0.16, 0.08, 0.28, 0.28, 0.2])


def by_hand(row, source, target, keep):
    """The weights that a row becomes, read off through values that are the unit vectors."""
    count = len(row)
    scores = torch.tensor(row, dtype=torch.float64).log()
    call = make_call(batch=1, heads=1, kv_heads=1, rows=1, keys=count, width=count, v_width=count, causal=False)
    call = replace(
        call, q=scores[None, None, None], k=torch.eye(count).double()[None, None], v=torch.eye(count).double()[None, None], scale=1.0
    )

    def mask(of):
        return None if of is None else torch.isin(torch.arange(count), torch.tensor(of))

    return p_site.redistribute(call, Dense(call).output, [0], mask(source), mask(target), keep=keep)[0, 0, 0].tolist()


def test_scaled_columns_are_not_a_constant_bias():
    """What ACT is often written as: the bias ln beta keeps beta / (beta m + 1 - m) of the mass, not beta."""
    call = make_call(batch=1)
    source = torch.zeros(13, dtype=torch.bool)
    source[0] = True
    dense = Dense(call)
    moved = p_site.redistribute(call, dense.output, [0], source, keep=0.4)
    biased = ran(s_site.key_bias(call, [0], torch.where(source, math.log(0.4), 0.0).double()))
    assert float((moved - biased)[:, 1:, 0].abs().max()) > 0.02
    m = dense.a[..., :1]
    row_bias = torch.log(0.4 * (1 - m) / (1 - 0.4 * m))[..., 0]
    exact = s_site.set_bias(replace(call, facts={}), dense.output, [0], source, row_bias[:, :1].nan_to_num(neginf=0.0))
    torch.testing.assert_close(exact[:, 1:, 0], moved[:, 1:, 0], rtol=0, atol=1e-10)


@every_call
@on_rows
@pytest.mark.parametrize("pattern", ["identity", "uniform", "argmax"])
@pytest.mark.parametrize("u", [0.25, 1.0])
def test_mix(call, restricted, pattern, u):
    heads, rows = heads_of(call), rows_of(call, restricted)
    call, dense = fresh(call)
    output = dense.output
    if pattern == "identity" and call.is_cross:
        with pytest.raises(InterventionError, match="not among its keys"):
            p_site.mix(call, output, heads, pattern, u, rows)
        return
    got = p_site.mix(call, output, heads, pattern, u, rows)
    close(got, dense.mix(heads, pattern, u, rows))
    outside(call, got, output, heads, rows)
    assert p_site.mix(call, output, heads, pattern, 0.0, rows) is output


def test_identity_all_the_way_is_v_itself():
    call = make_call()
    got = p_site.mix(call, Dense(call).output, [1, 5], "identity", 1.0)
    assert torch.equal(got[:, :, 1], call.v[:, 0])
    assert torch.equal(got[:, :, 5], call.v[:, 1])


def test_unknown_pattern():
    call = make_call()
    with pytest.raises(InterventionError, match="did you mean identity"):
        p_site.mix(call, Dense(call).output, [0], "identty", 0.5)
    assert sorted(PATTERNS) == ["argmax", "identity", "query_mean", "uniform"]


@every_call
def test_set_rows(call):
    heads, first = heads_of(call), call.key_offset
    valid = call.mask.key_valid
    keys = [first + call.k.shape[2] - 4, first + call.k.shape[2] - 6] if valid is None or call.q.shape[2] == 1 else [first + 4, first + 6]
    t = torch.arange(call.q.shape[2]) + call.query_offset
    rows = (t >= max(keys))[None] if call.mask.causal else True
    call, dense = fresh(call)
    output = dense.output
    got = p_site.set_rows(call, output, heads, torch.tensor(keys), torch.tensor([0.25, 0.75]), rows)
    close(got, dense.set_rows(heads, keys, [0.25, 0.75], rows))
    outside(call, got, output, heads, rows)


def test_rows_cannot_be_set_to_what_they_do_not_see():
    call, padded = make_call(), dict(CALLS)["left padding"]
    for one, keys, words in ((call, [13], r"positions 0\.\.12"), (call, [5], "comes later"), (padded, [2], "padding")):
        rows = torch.zeros(1, 13, dtype=torch.bool)
        rows[0, 4] = True
        with pytest.raises(InterventionError, match=words):
            p_site.set_rows(one, Dense(one).output, [0], torch.tensor(keys), torch.ones(1), rows)


@every_call
@on_rows
def test_row_rescale(call, restricted):
    heads, rows = heads_of(call), rows_of(call, restricted)
    rho = torch.rand(call.q.shape[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for factor in (0.3, rho):
        one, dense = fresh(call)
        output = dense.output
        got = p_site.row_rescale(one, output, heads, factor, rows)
        close(got, dense.rescale(heads, factor, rows))
        outside(one, got, output, heads, rows)
    assert p_site.row_rescale(one, output, heads, 1.0) is output


def test_rescaling_sparse_attention_by_the_normalisers_is_its_part_of_the_full_one():
    """Re-ttention: rho = exp(lse_sparse - lse_full) turns a window's output into what the window contributes."""
    call = make_call()
    sparse = replace(call, mask=replace(call.mask, window=4))
    rho = torch.exp(row_lse(sparse) - row_lse(call))[:, [1]]
    got = p_site.row_rescale(sparse, Dense(sparse).output, [1], rho)
    a = Dense(call).a * Dense(sparse).visible
    torch.testing.assert_close(got[:, :, 1], (a @ Dense(call).v)[:, 1], rtol=0, atol=1e-12)


# ---- stacked ------------------------------------------------------------------------------------------------------------------


@every_call
@on_rows
def test_edits_of_weights_meet_what_the_earlier_ones_left(call, restricted):
    """Boost, then set bias, then two redistributions over sets that overlap, then a mix, on heads that overlap in part."""
    rows = rows_of(call, restricted)
    first, second = heads_of(call), [heads_of(call)[0]]
    one, two, three = some_keys(call), some_keys(call, seed=7), some_keys(call, seed=8, share=0.3)
    call, dense = fresh(call)
    out = dense.output
    out = s_site.abs_boost(call, out, first, one, 0.6, rows)
    dense.boost(first, one, 0.6, rows)
    out = s_site.set_bias(call, out, second, two, -0.8)
    dense.add(second, -0.8 * dense.members(two).double())
    out = p_site.redistribute(call, out, first, two, keep=0.4, rows=rows)
    dense.redistribute(first, two, None, 0.4, rows)
    out = p_site.redistribute(call, out, second, three, keep=0.5)
    dense.redistribute(second, three, None, 0.5)
    close(out, dense, 1e-9)
    out = p_site.mix(call, out, second, "uniform", 0.3, rows)
    close(out, dense.mix(second, "uniform", 0.3, rows), 1e-9)
    with pytest.raises(InterventionError, match="after mix"):
        p_site.redistribute(call, out, second, three, keep=0.5)


def test_redistribution_after_a_key_bias_and_a_temperature():
    call = make_call()
    bias = torch.randn(13, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    source = some_keys(call)
    edited = s_site.key_bias(s_site.temperature_before(call, [1, 4], 2.0), [1, 4], bias)
    got = p_site.redistribute(edited, ran(edited), [1, 4], source, keep=0.4)
    dense = Dense(call).cool([1, 4], 2.0).add([1, 4], bias)
    close(got, dense.redistribute([1, 4], source, None, 0.4))


def test_the_largest_weight_after_an_edit_of_weights_is_not_looked_up():
    call = make_call()
    out = p_site.redistribute(call, Dense(call).output, [0], some_keys(call), keep=0.4)
    with pytest.raises(InterventionError, match="largest weight"):
        p_site.mix(call, out, [0], "argmax", 0.5)


# ---- rounding -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_keep_little_are_summed_directly(dtype):
    """A sink that holds all but e^-8 of every row, taken away: what is left is a small difference of large numbers in z."""
    call = make_call(batch=1, heads=2, kv_heads=1, rows=40, dtype=torch.float64)
    k, q = call.k.clone(), call.q.clone()
    q[..., 0] = 4.0
    k[:, :, 0] = 0.0
    k[:, :, 0, 0] = 8.0 * call.q.shape[-1] ** 0.5 / 4.0
    k[:, :, 1:, 0] = 0.0
    call = replace(call, q=q.to(dtype), k=k.to(dtype), v=call.v.to(dtype))
    source = torch.zeros(40, dtype=torch.bool)
    source[0] = True
    exact = Dense(call).redistribute([0, 1], source, None, 0.1)
    host = Dense(call).output.to(dtype)
    got = p_site.redistribute(replace(call, facts={}), host, [0, 1], source, keep=0.1).double()
    naive = p_site.redistribute(replace(call, facts={}), host, [0, 1], source, keep=0.1, limit=0.0).double()
    size = exact.output[:, 1:].norm(dim=-1).mean()
    error = (got - exact.output)[:, 1:].norm(dim=-1).max() / size
    worst = (naive - exact.output)[:, 1:].norm(dim=-1).max() / size
    assert float(error) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert float(worst) > 10 * float(error)


def test_gradients_do_not_pass_a_fold():
    call = make_call()
    output = Dense(call).output.requires_grad_()
    with pytest.raises(InterventionError, match="no gradients"):
        p_site.redistribute(call, output, [0], some_keys(call), keep=0.4)


# ---- Z site -------------------------------------------------------------------------------------------------------------------


@on_rows
def test_outputs_by_their_formulas(restricted):
    call = dict(CALLS)["left padding"]
    heads, rows = heads_of(call), rows_of(call, restricted)
    z = Dense(call).output
    c = torch.randn(2, 13, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = torch.tensor([0.2, 0.7])
    each = one.double()[None, None, :, None]
    own = z[:, :, heads]
    for got, want in (
        (z_site.scale(call, z, heads, 2.0, rows), 2 * own),
        (z_site.scale(call, z, heads, one, rows), each * own),
        (z_site.zero(call, z, heads, rows), 0 * own),
        (z_site.replace(call, z, heads, c, rows), c),
        (z_site.replace(call, z, heads, c[:1, :1], rows), c[:1, :1].expand_as(own)),
        (z_site.patch(call, z, heads, c, rows), c),
        (z_site.lerp(call, z, heads, c, 0.3, rows), 0.7 * own + 0.3 * c),
        (z_site.lerp(call, z, heads, c, one, rows), (1 - each) * own + each * c),
        (z_site.add(call, z, heads, c, 0.5, rows), own + 0.5 * c),
    ):
        full = z.clone()
        full[:, :, heads] = want if rows is True else torch.where(rows[:, :, None, None], want, own)
        torch.testing.assert_close(got, full, rtol=0, atol=1e-15)
        outside(call, got, z, heads, rows)
    assert z_site.scale(call, z, heads, 1.0) is z
    assert z_site.lerp(call, z, heads, c, 0.0) is z
    assert z_site.add(call, z, heads, c, 0.0) is z
    assert z_site.noise(call, z, heads, 0.0, 3) is z


def test_noise_is_added_by_place_and_size():
    call = make_call(rows=400, v_width=32)
    z = Dense(call).output
    plain = z_site.noise(call, z, [0, 3], 0.5, seed=1) - z
    assert float(plain[:, :, [1, 2, 4, 5]].abs().max()) == 0.0
    assert float(plain[:, :, [0, 3]].std()) == pytest.approx(0.5, rel=0.02)
    relative = z_site.noise(call, z, [0, 3], 0.5, seed=1, relative=True) - z
    ratio = relative[:, :, 0].pow(2).mean(-1).sqrt() / z[:, :, 0].pow(2).mean(-1).sqrt()
    assert float(ratio.mean()) == pytest.approx(0.5, rel=0.05)


def test_outputs_carry_gradients():
    call = make_call()
    z, c = Dense(call).output.requires_grad_(), torch.randn(1, 1, 2, 5, dtype=torch.float64)
    alpha = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    z_site.lerp(call, z, [0, 3], c, alpha).sum().backward()
    want = (c - z.detach()[:, :, [0, 3]]).sum((0, 1, 3))
    torch.testing.assert_close(alpha.grad, want)
    assert z.grad is not None

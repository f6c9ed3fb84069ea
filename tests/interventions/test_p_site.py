"""Edits of weights equal the explicit edit of the dense matrix in float64, alone and after others; nothing changed is the very object."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import p_site, s_site
from headscope.interventions.patterns import PATTERNS
from headscope.kernels.partial import row_lse

from .dense_edits import Dense, close
from .edit_cases import make_call
from .primitive_cases import CALLS, every_call, fresh, heads_of, on_rows, outside, ran, rows_of, some_keys

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

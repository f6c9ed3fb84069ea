"""SoftplusReweighting against the whole matrix, a row worked by hand, and its limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import KeyBias, Redistribute, SoftplusReweighting, from_json, record_heads
from headscope.interventions.head_edit import Bound
from headscope.scope import Scope

from ..core.tiny_models import gpt_oss, ids, llama, make, mistral, padding
from .dense_edits import Dense, close
from .edit_cases import calls, make_call

STAGES = ("reweight", "softplus", "both")
SCORES = ("cosine", "model")


def edited(edit, call, output, rows=True):
    heads = [one for _, one in edit.heads]
    bound = replace(edit, _bound=Bound({call.module: heads}, {call.module: list(range(len(heads)))}))
    return bound.edit_output(replace(call, facts=dict(call.facts)), output, heads, rows)


def dense_of(call, edit, rows=True):
    """The definition, entry by entry of the matrix."""
    dense = Dense(call)
    a = dense.a.clone()
    first = torch.zeros(call.q.shape[0], dtype=torch.int64) if call.first_token is None else call.first_token
    for b in range(a.shape[0]):
        for h in [one for _, one in edit.heads]:
            for i in range(a.shape[2]):
                seen = dense.visible.expand_as(dense.scores)[b, h, i]
                if not bool(seen.any()) or (rows is not True and not bool(rows[b, i])):
                    continue
                n = int(seen.sum())
                row = a[b, h, i]
                if edit.stage != "reweight":
                    c = math.log(call.q.shape[-1]) * math.log(n)
                    base = dense.scores[b, h, i]
                    if edit.scores == "cosine":
                        q, k = call.q[b, h, i].double(), call.k[b, h // (call.q.shape[1] // call.k.shape[1])].double()
                        base = (k @ q) / (q.norm() * k.norm(dim=-1))
                    plus = torch.where(seen, torch.log1p(torch.exp((c * base).masked_fill(~seen, 0.0))), 0.0)
                    row = plus / plus.sum()
                if edit.stage != "softplus":
                    o = 0.0 if i + call.query_offset - int(first[b]) < edit.spared else edit.offset
                    w = (n * row - o).clamp_min(0.0) ** edit.power
                    if float(w.sum()) == 0.0:
                        continue
                    row = torch.where(seen, w / w.sum(), 0.0)
                a[b, h, i] = row
    dense.a = a
    return dense


@pytest.mark.parametrize(("stage", "scores"), [("reweight", "cosine"), *((stage, scores) for stage in STAGES[1:] for scores in SCORES)])
@pytest.mark.parametrize("case", calls(), ids=lambda case: case[0])
def test_every_call_is_the_definition(case, stage, scores):
    _, call = case
    edit = SoftplusReweighting([(0, call.q.shape[1] - 1), (0, 0)], stage, power=2.5, offset=0.5, scores=scores)
    output = Dense(call).output
    if stage != "reweight" and call.sink_logits is not None:
        with pytest.raises(InterventionError, match="sink logits"):
            edited(edit, call, output)
        return
    close(edited(edit, call, output), dense_of(call, edit))


def test_rows_are_restricted_and_other_heads_stay():
    call = make_call(3)
    rows = torch.rand(2, 13, generator=torch.Generator().manual_seed(1)) < 0.5
    edit, output = SoftplusReweighting([(0, 2)]), Dense(call).output
    got = edited(edit, call, output, rows)
    close(got, dense_of(call, edit, rows))
    assert torch.equal(got[:, :, [0, 1, 3, 4, 5]], output[:, :, [0, 1, 3, 4, 5]])


def test_a_row_by_hand():
    """Weights .5, .3, .2 of three keys, o = 1, p = 2: 3A - 1 = .5, -.1, -.4, so the first key has all; with o = 0: .25, .09, .04 of .38."""
    call = make_call(0, batch=1, heads=1, kv_heads=1, rows=1, keys=3, causal=False, query_offset=0)
    q = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    q[..., 0] = 8**0.5
    k = torch.zeros(1, 1, 3, 8, dtype=torch.float64)
    k[0, 0, :, 0] = torch.tensor([0.5, 0.3, 0.2]).double().log()
    v = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    v[0, 0, :, :3] = torch.eye(3, dtype=torch.float64)
    call = replace(call, q=q, k=k, v=v)
    output = Dense(call).output
    assert output[0, 0, 0, :3].tolist() == pytest.approx([0.5, 0.3, 0.2])
    sharp = edited(SoftplusReweighting([(0, 0)], power=2.0, spared=0), call, output)
    assert sharp[0, 0, 0, :3].tolist() == pytest.approx([1.0, 0.0, 0.0])
    spared = edited(SoftplusReweighting([(0, 0)], power=2.0), call, output)
    assert spared[0, 0, 0, :3].tolist() == pytest.approx([25 / 38, 9 / 38, 4 / 38])


def test_equal_weights_and_long_rows():
    """Nothing beyond an equal share: the row stays. 4,096 keys at power 15 in float32 overflow nothing."""
    call = make_call(1)
    flat = replace(call, q=torch.zeros_like(call.q))
    output = Dense(flat).output
    edit = SoftplusReweighting([(0, 1)], spared=0)
    torch.testing.assert_close(edited(edit, flat, output), output, rtol=0, atol=1e-12)
    long = make_call(2, batch=1, heads=2, kv_heads=1, rows=4, keys=4096, query_offset=4092)
    half = replace(long, q=long.q.float(), k=long.k.float(), v=long.v.float())
    got = edited(SoftplusReweighting([(0, 1)]), half, Dense(long).output.float())
    close(got, dense_of(long, SoftplusReweighting([(0, 1)])), 1e-4)


def test_lssar_by_hand():
    """Two keys at cosines 1 and 0 of width 8, row 4 of a text that sees both: softplus(ln 8 ln 2) and ln 2, their shares, and the power."""
    call = make_call(0, batch=1, heads=1, kv_heads=1, rows=1, keys=2, causal=False, query_offset=4)
    q, k, v = torch.zeros(1, 1, 1, 8).double(), torch.zeros(1, 1, 2, 8).double(), torch.zeros(1, 1, 2, 5).double()
    q[..., 0], k[0, 0, 0, 0], k[0, 0, 1, 1] = 3.0, 0.5, 7.0
    v[0, 0, :, :2] = torch.eye(2)
    call = replace(call, q=q, k=k, v=v)
    first, second = math.log1p(math.exp(math.log(8) * math.log(2))), math.log(2)
    share = first / (first + second)
    got = edited(SoftplusReweighting([(0, 0)], "softplus"), call, Dense(call).output)
    assert got[0, 0, 0, :2].tolist() == pytest.approx([share, 1 - share])
    got = edited(SoftplusReweighting([(0, 0)], "both"), call, Dense(call).output)
    assert got[0, 0, 0, :2].tolist() == pytest.approx([1.0, 0.0]), "the second has less than an equal share"
    powers = [share**15, (1 - share) ** 15]
    got = edited(SoftplusReweighting([(0, 0)], "both", offset=0.0), call, Dense(call).output)
    assert got[0, 0, 0, :2].tolist() == pytest.approx([one / sum(powers) for one in powers])


def test_power_one_without_offset_is_nothing_to_the_bit():
    model, tokens = make(llama), ids(2, 12)
    scope = Scope(model)
    with torch.no_grad():
        plain = model(tokens).logits
        with scope.intervene(SoftplusReweighting("all", power=1.0, offset=0.0)):
            assert torch.equal(model(tokens).logits, plain)
        with scope.intervene(SoftplusReweighting("all")):
            assert not torch.equal(model(tokens).logits, plain)
        assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_with_a_cache_equals_reading_the_whole_text(build, cache):
    model, tokens, mask = make(build).double(), ids(2, 9), padding("left", 2, 9)
    scope, edit = Scope(model), SoftplusReweighting([(0, 1), (1, 3)], "both", power=2.0)
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, cache_implementation=cache)
    whole = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], 1)
    with torch.no_grad(), scope.intervene(edit), record_heads(scope, sites=("z",)) as once:
        model(out.ids[:, :-1], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0))
    for layer in (0, 1):
        torch.testing.assert_close(steps.z(layer)[whole.bool()], once.z(layer)[whole.bool()], rtol=1e-8, atol=1e-8)


def test_refusals_and_json():
    for options, message in (
        ({"stage": "softmax"}, "stage"),
        ({"scores": "sine"}, "scores"),
        ({"power": 0.0}, "positive power"),
        ({"offset": 1.5}, "equal shares"),
        ({"spared": -1}, "counts rows"),
    ):
        with pytest.raises(InterventionError, match=message):
            SoftplusReweighting([(0, 0)], **options)
    tokens = ids(1, 8)
    scope = Scope(make(gpt_oss, "eager"))
    with torch.no_grad(), pytest.raises(InterventionError, match="sink logits"), scope.intervene(SoftplusReweighting([(0, 0)], "both")):
        scope.model(tokens)
    scope = Scope(make(llama))
    first = Redistribute([(0, 0)], [0], keep=0.5, order=1)
    with (
        torch.no_grad(),
        pytest.raises(InterventionError, match="as the model made them"),
        scope.intervene(first, SoftplusReweighting([(0, 0)], order=2)),
    ):
        scope.model(tokens)
    with torch.no_grad(), scope.intervene(KeyBias([(0, 0)], [0], 0.5), SoftplusReweighting([(0, 0)])):
        scope.model(tokens)  # a bias belongs to the scores that it reads
    for edit in (SoftplusReweighting([(0, 0)]), SoftplusReweighting("all", "both", 4.0, 0.5, 0, phase="decode")):
        assert from_json(edit.to_json()) == edit
    assert "beyond 1 equal shares" in SoftplusReweighting([(0, 0)]).explain()

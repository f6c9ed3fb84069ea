"""ACT against its definition on the dense matrix: prefill, chunks, decode steps with running sums, padding, windows, sinks, soft caps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import headscope as hs
from headscope.errors import InterventionError
from headscope.interventions import ACT, KeyBias, Redistribute, from_json, record_heads
from headscope.interventions.head_edit import Bound
from headscope.scope import Scope

from ..core.tiny_models import bert, gemma2, gpt_oss, ids, llama, make, mistral, padding
from .dense_edits import Dense, close
from .edit_cases import Grab, calls

CALLS = [(name, call) for name, call in calls(rows=40) if call.mask.causal and call.query_offset == 0]


def sinks_of(a, real, alpha=None, threshold=None):
    """[B, H, N] by the definition, with loops: a [B, H, N, N], real [B, N]."""
    batch, heads, count, _ = a.shape
    out = torch.zeros(batch, heads, count, dtype=torch.bool)
    for b in range(batch):
        tokens = real[b].nonzero().flatten().tolist()
        for h in range(heads):
            for t in tokens[1:]:
                rows = [i for i in tokens if i >= t]
                mean = float(sum(a[b, h, i, t] for i in rows)) / len(rows)
                out[b, h, t] = mean > (threshold if threshold is not None else alpha / len(tokens))
    return out


def calibrated(dense, heads, sinks, beta, spare=None):
    """The dense matrix with every head's sinks scaled and what is freed given to the others in proportion."""
    a = dense.a.clone()
    for h in heads:
        s = sinks[:, h, None, :]
        t = ~s if spare is None else ~s & ~spare[:, None, :]
        m_s, m_t = (dense.a[:, h] * s).sum(-1, keepdim=True), (dense.a[:, h] * t).sum(-1, keepdim=True)
        new = torch.where(s, dense.a[:, h] * beta, dense.a[:, h])
        new = torch.where(t, dense.a[:, h] * (1 + (1 - beta) * m_s / m_t.clamp_min(1e-12)), new)
        a[:, h] = torch.where(m_t >= 1e-12, new, dense.a[:, h])
    dense.a = a
    return dense


def bound(act, heads):
    return replace(act, _bound=Bound({"m": heads}, {"m": list(range(len(heads)))}))


def real_of(call):
    valid = call.mask.query_valid
    return torch.ones(call.q.shape[0], call.q.shape[2], dtype=torch.bool) if valid is None else valid


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
@pytest.mark.parametrize(
    "options", [{"alpha": 1.5}, {"threshold": 0.06, "beta": 0.1}, {"alpha": 1.2, "target": "others_not_first"}], ids=str
)
def test_a_prefill_is_the_definition(call, options):
    heads = [call.q.shape[1] - 1, 0]
    act = bound(ACT("all", **options), heads)
    call = replace(call, facts={})
    dense = Dense(call)
    real = real_of(call)
    sinks = sinks_of(dense.a * real[:, None, :, None], real, act.alpha, act.threshold)
    assert 0 < int(sinks[:, heads].sum()) < 0.8 * sinks[:, heads].numel()
    output = dense.output
    got = act.after(call, output)
    first = torch.zeros_like(real)
    first[torch.arange(len(real)), real.int().argmax(1)] = True
    sums = dense.a.sum(-1)
    calibrated(dense, heads, sinks, act.beta, first if act.target == "others_not_first" else None)
    close(got, dense)
    torch.testing.assert_close(dense.a.sum(-1), sums, rtol=0, atol=1e-12)
    assert torch.equal(got[:, :, 1], output[:, :, 1])
    assert bound(ACT("all", beta=1.0), heads).after(call, output) is output
    assert bound(ACT("all", alpha=1e6), heads).after(replace(call, facts={}), output) is output


@pytest.mark.parametrize(
    ("build", "impl", "cache"),
    [
        (llama, "sdpa", "dynamic"),
        (llama, "sdpa", "static"),
        (mistral, "sdpa", "dynamic"),
        (gpt_oss, "eager", "dynamic"),
        (gemma2, "eager", "dynamic"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_decode_steps_use_the_sums_of_all_rows_so_far(build, impl, cache):
    """Layer 0, whose queries and keys no edit of layer 0 changes: the oracle has the whole matrix and cuts it off at each step."""
    model, tokens, mask = make(build, impl), ids(2, 24), padding("left", 2, 24)
    exact = build in (llama, mistral)
    scope = Scope(model.double() if exact else model)
    kept = []
    act = ACT([(0, 1), (0, 2)], alpha=1.4)
    with scope.intervene(Grab(kept)), scope.intervene(act), record_heads(scope, "0.1,0.2", sites=("z",)) as record:
        scope.generate(tokens, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, cache_implementation=cache)
    steps = [call for call in kept if call.layer == 0]
    assert len(steps) == 9
    total = 24 + 8
    a = torch.zeros(2, 4, total, total, dtype=torch.float64)
    for call in steps:
        where = slice(call.query_offset, call.query_offset + call.q.shape[2])
        a[:, :, where, call.key_offset : call.key_offset + call.k.shape[2]] = Dense(call).a
    real = torch.cat([mask.bool(), torch.ones(2, 8, dtype=torch.bool)], 1)
    found = 0
    for call in steps:
        start, end = call.query_offset, call.query_offset + call.q.shape[2]
        sinks = sinks_of(a[:, :, :end, :end] * real[:, None, :end, None], real[:, :end], 1.4)
        found += int(sinks[:, 1:3].sum())
        dense = Dense(call)
        calibrated(dense, [1, 2], sinks[:, :, call.key_offset : end], 0.4)
        keep = dense.counts[:, :, 1:3, None]
        error = torch.where(keep, (record.z(0)[:, start:end].double() - dense.output[:, :, 1:3]).abs(), 0.0)
        assert float(error.max()) < (1e-9 if exact else 1e-4)
    assert found > 9


def test_chunks_are_added_up():
    """Two chunks: the first is edited by its own rows' sinks, the second by those of all rows."""
    scope, tokens = Scope(make(llama).double()), ids(1, 30)
    kept = []
    with scope.intervene(Grab(kept)), scope.intervene(ACT("0.1", alpha=1.3)), record_heads(scope, "0.1", ("z",)) as record:
        scope.capture(tokens, chunk=20, statistics=["lse"])
    first, second = (call for call in kept if call.layer == 0)
    a = torch.zeros(1, 4, 30, 30, dtype=torch.float64)
    a[:, :, :20, :20], a[:, :, 20:] = Dense(first).a, Dense(second).a
    real = torch.ones(1, 30, dtype=torch.bool)
    for call, end in ((first, 20), (second, 30)):
        sinks = sinks_of(a[:, :, :end, :end], real[:, :end], 1.3)
        want = calibrated(Dense(call), [1], sinks, 0.4).output[:, :, 1]
        torch.testing.assert_close(record.z(0)[:, call.query_offset : end, 0], want, rtol=1e-9, atol=1e-9)


def test_phases_narrow_the_edit_and_not_the_sums():
    from transformers import DynamicCache

    scope, tokens = Scope(make(llama).double()), ids(1, 28)
    found = {}
    for phase in ("none", "both", "decode"):
        edit = ACT("0.1", alpha=1.4, beta=1.0) if phase == "none" else ACT("0.1", alpha=1.4, phase=phase)
        cache = DynamicCache(config=scope.model.config)
        with scope.intervene(edit), record_heads(scope, "0.1", ("z",)) as record, torch.no_grad():
            for part in tokens.split([24, 1, 1, 1, 1], 1):
                scope.model(part, past_key_values=cache, use_cache=True)
        found[phase] = record.z(0)
    assert torch.equal(found["decode"][:, :24], found["none"][:, :24])
    assert torch.equal(found["decode"][:, 24:], found["both"][:, 24:])
    assert float((found["both"] - found["none"]).abs()[:, :24].max()) > 1e-4
    assert float((found["both"] - found["none"]).abs()[:, 24:].max()) > 1e-4


def test_stacked_with_a_key_bias_it_meets_the_biased_attention():
    scope, tokens = Scope(make(llama).double()), ids(1, 30)
    kept = []
    edits = (ACT("0.1", alpha=1.4), KeyBias("0.1", [7], 2.0))
    with scope.intervene(Grab(kept)), scope.intervene(*edits), record_heads(scope, "0.1", ("z",)) as record, torch.no_grad():
        scope.model(tokens)
    dense = Dense(kept[0]).add([1], (torch.arange(30) == 7).double() * 2.0)
    sinks = sinks_of(dense.a, torch.ones(1, 30, dtype=torch.bool), 1.4)
    assert sinks[0, 1, 7]
    want = calibrated(dense, [1], sinks, 0.4).output[:, :, 1]
    torch.testing.assert_close(record.z(0)[:, :, 0], want, rtol=1e-9, atol=1e-9)


def test_heads_that_gain_are_kept(tmp_path):
    scope = Scope(make(llama))
    items = [ids(1, 18, seed=seed) for seed in range(3)]
    answers = [5, 9, 40]

    def metric(output, index):
        return output[0, -1].log_softmax(-1)[answers[index]]

    where = {"journal": tmp_path / "act", "name": "answer"}
    act, found = ACT.calibrated(scope, items, metric, alpha=1.3, keep=2, **where)
    base = []
    for index, item in enumerate(items):
        with torch.no_grad():
            base.append(float(metric(scope.model(item).logits, index)))
    assert found.baseline == pytest.approx(sum(base) / 3)
    assert len(found.table) == 8
    assert found.facts["blocks_run"] == 3 * (2 + 4 * 2 + 4 * 1)
    for layer, head, value in zip(found.table["layer"], found.table["head"], found.table["value"], strict=True):
        with scope.intervene(ACT([(layer, head)], alpha=1.3)), torch.no_grad():
            want = [float(metric(scope.model(item).logits, index)) for index, item in enumerate(items)]
        assert value == pytest.approx(sum(want) / 3, abs=1e-6)
    best = found.table[found.table["change"] > 0].sort_values("change", ascending=False)
    assert 0 < len(best) < 8
    assert list(act.heads) == [(layer, head) for layer, head in zip(best["layer"][:2], best["head"][:2], strict=True)]
    again, _ = ACT.calibrated(scope, items, metric, alpha=1.3, **where)
    assert _.restored == 9
    assert len(again.heads) == len(best)
    with pytest.raises(InterventionError, match="no head of 8 gains"):
        ACT.calibrated(scope, items, lambda output, index: 1.0, alpha=1.3)


def test_a_sweep_over_its_settings():
    scope = Scope(make(llama))
    found = hs.sweep(
        scope, lambda beta: ACT("all", alpha=1.3, beta=beta), grid={"beta": [1.0, 0.4]}, metric=lambda o: o[0, -1, 5], data=ids(1, 20)
    )
    assert found.table["change"].iloc[0] == 0.0
    assert found.table["change"].iloc[1] != 0.0


def test_what_cannot_be_calibrated():
    for options, words in (
        ({"alpha": 0}, "alpha=0"),
        ({"beta": 1.2}, "beta=1.2"),
        ({"threshold": 1.0}, "threshold"),
        ({"target": "sinks"}, "no set of keys"),
    ):
        with pytest.raises(InterventionError, match=words):
            ACT("0.1", **options)
    with pytest.raises(InterventionError, match="later tokens"), Scope(make(bert)).intervene(ACT("0.1")):
        pytest.fail("the block was entered")
    scope = Scope(make(llama))
    with pytest.raises(InterventionError, match="order=1"), scope.intervene(ACT("0.1"), Redistribute("0.1", [0], 0.4)):
        pytest.fail("the block was entered")
    from transformers import DynamicCache

    cache = DynamicCache(config=scope.model.config)
    with torch.no_grad():
        scope.model(ids(1, 9), past_key_values=cache, use_cache=True)
    block = scope.intervene(ACT("0.1", alpha=1.3))
    with pytest.raises(InterventionError, match="open the block before"), block, torch.no_grad():
        scope.model(ids(1, 1), past_key_values=cache, use_cache=True)
    act = ACT("0.1,1.2", alpha=3, target="others_not_first", phase="prefill")
    assert from_json(act.to_json()) == act
    assert "3/N" in act.explain()

"""RescaledPattern against the dense matrix, key by key and tile by tile; decode steps, limits and refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import RescaledPattern, from_json, record_heads
from headscope.interventions.head_edit import Bound
from headscope.plans import Dense as Everything
from headscope.plans import Lines, SparsePlan, Streaming, Strided, TopBlocks
from headscope.scope import Scope

from ..core.tiny_models import bert, ids, llama, make, padding
from .dense_edits import Dense, close
from .edit_cases import calls

PATTERNS = [Streaming(1, 4), Lines((0, 5), (0, 1)), Strided(2, 3, 1, block=2), Streaming(0, 1)]
NAMES = ("causal", "one group", "left padding", "window", "soft cap", "sinks", "chunk", "decode", "explicit mask")
CALLS = [(name, call) for name, call in calls() if name in NAMES]


def edited(edit, call, output):
    heads = [one for _, one in edit.heads]
    bound = replace(edit, _bound=Bound({call.module: heads}, {call.module: list(range(len(heads)))}))
    return bound.edit_output(replace(call, facts=dict(call.facts)), output, heads, True)


def written_out(call, edit):
    dense = Dense(call)
    a = dense.a.clone()
    shown = dense.visible.expand_as(dense.scores)
    first = [0] * a.shape[0] if call.first_token is None else call.first_token.tolist()
    out = dense.output.clone()
    for b in range(a.shape[0]):
        s = torch.arange(a.shape[3]) + call.key_offset - first[b]
        for h in [one for _, one in edit.heads]:
            for i in range(a.shape[2]):
                t = i + call.query_offset - first[b]
                seen = shown[b, h, i]
                if not bool(seen.any()) or t < 0:
                    continue
                kept = seen & edit.pattern.visible(torch.tensor([t]), s)[0]
                v = dense.v[b, h]
                if edit.ratio == "exact":
                    out[b, i, h] = a[b, h, i].masked_fill(~kept, 0.0) @ v
                    continue
                weight = torch.exp(dense.scores[b, h, i]).masked_fill(~kept, 0.0)
                total = float(weight.sum()) + (0.0 if dense.sinks is None else float(torch.exp(dense.sinks[b, h, i, 0])))
                top = weight @ v
                real = torch.ones_like(seen) if call.mask.key_valid is None else call.mask.key_valid[b]
                for tile in range(0, int(s.max()) + 1, edit.block):
                    inside = (s >= tile) & (s < tile + edit.block) & real
                    n = int((seen & ~kept & (s >= tile) & (s < tile + edit.block)).sum())
                    if not n or tile + edit.block > t:
                        continue
                    score = float(call.q[b, h, i] @ call.k[b, h // call.group, inside].mean(0)) * call.scale
                    score = call.softcap * math.tanh(score / call.softcap) if call.softcap is not None else score
                    total += n * math.exp(score)
                    top = top + n * math.exp(score) * v[inside].mean(0)
                out[b, i, h] = top / total
    return dense, out


@pytest.mark.parametrize("ratio", ["exact", "pooled"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("case", CALLS, ids=lambda case: case[0])
def test_every_call_is_the_definition(case, pattern, ratio):
    _, call = case
    edit = RescaledPattern([(0, call.q.shape[1] - 1), (0, 0)], pattern, ratio, block=3)
    dense, want = written_out(call, edit)
    got = edited(edit, call, dense.output)
    keep = dense.counts[..., None]
    assert float(torch.where(keep, (got - want).abs(), 0.0).max()) < 1e-10


def test_a_pattern_that_drops_nothing_is_full_attention():
    _, call = CALLS[0]
    for ratio in ("exact", "pooled"):
        dense = Dense(call)
        close(edited(RescaledPattern([(0, 1), (0, 4)], Everything(), ratio), call, dense.output), dense, 1e-12)


def test_tiles_of_one_key_are_full_attention():
    """A tile's mean is then the key itself, so nothing is lost but the row's own tile, which the pattern keeps."""
    _, call = CALLS[0]
    dense = Dense(call)
    close(edited(RescaledPattern([(0, 1), (0, 4)], Streaming(1, 2), block=1), call, dense.output), dense, 1e-10)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("ratio", ["exact", "pooled"])
def test_decoding_with_a_cache_equals_reading_the_whole_text(cache, ratio):
    model, tokens, mask = make(llama).double(), ids(2, 9), padding("left", 2, 9)
    scope, edit = Scope(model), RescaledPattern([(0, 1), (1, 3)], Streaming(1, 2), ratio, block=2)
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, cache_implementation=cache)
    whole = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], 1)
    with torch.no_grad(), scope.intervene(edit), record_heads(scope, sites=("z",)) as once:
        model(out.ids[:, :-1], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0))
    for layer in (0, 1):
        torch.testing.assert_close(steps.z(layer)[whole.bool()], once.z(layer)[whole.bool()], rtol=1e-9, atol=1e-9)


def test_means_of_what_is_dropped_are_nearer_to_the_model_than_the_plan_alone(smollm2):
    """A text of 200 tokens under a window of 32: the last hidden logits with tiles are nearer to the full ones than those of the plan."""
    text = "The river had risen in the night and the road along the bank was under water as far as the mill. " * 12
    tokens = smollm2.encode(text)[:, :200]
    pattern = Streaming(1, 32)
    with torch.no_grad():
        full = smollm2.model(tokens).logits[0, 64:].double().log_softmax(-1)

        def apart():
            got = smollm2.model(tokens).logits[0, 64:].double().log_softmax(-1)
            return float((full.exp() * (full - got)).sum(-1).mean())

        with smollm2.intervene(RescaledPattern("all", pattern, block=16)):
            pooled = apart()
        with smollm2.execute(SparsePlan.uniform(smollm2, pattern)):
            alone = apart()
    assert pooled < alone


def test_refusals_and_json(tiny_llama):
    for pattern, message in (
        (TopBlocks(share=0.5), "chosen per input"),
        (Streaming(1, 2, compensate=True), "puts a mean"),
        ({"kind": "nothing"}, "pattern"),
        ("streaming", "a pattern is"),
    ):
        with pytest.raises(InterventionError, match=message):
            RescaledPattern([(0, 0)], pattern)
    with pytest.raises(InterventionError, match="ratio"):
        RescaledPattern([(0, 0)], Streaming(1, 2), "full")
    with pytest.raises(InterventionError, match="counts keys"):
        RescaledPattern([(0, 0)], Streaming(1, 2), block=0)
    with pytest.raises(InterventionError, match="of causal attention"):
        RescaledPattern([(0, 0)], Streaming(1, 2)).bind(Scope(make(bert)))
    late = next(call for name, call in calls() if name == "decode in a window")
    with pytest.raises(InterventionError, match="begins at position 24"):
        edited(RescaledPattern([(0, 0)], Streaming(1, 2)), late, Dense(late).output)
    edit = RescaledPattern([(0, 1)], Strided(16, 4, 1, block=32), "exact", order=1)
    assert from_json(edit.to_json()) == edit
    assert from_json(edit.to_json()).pattern == Strided(16, 4, 1, block=32)
    assert "full attention gives the kept keys" in edit.explain()

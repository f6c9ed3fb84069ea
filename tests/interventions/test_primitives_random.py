"""The primitives over random shapes, groups and masks: 60 calls drawn by seed, each edited in every way and compared with dense twins."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from headscope.interventions import p_site, s_site
from headscope.kernels.partial import exact_attention

from .dense_edits import Dense, close
from .edit_cases import make_call


def drawn(seed):
    """A random call: batch 1 to 3, up to 4 key heads with groups of 1 to 4, prefill, chunk or one decode row, and masks by chance."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, group = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4)
    heads = kv_heads * group
    causal = rng.random() < 0.7
    rows = rng.choice([1, rng.randint(2, 30)])
    past = rng.choice([0, rng.randint(1, 20)]) if causal else 0
    keys = rows + past
    facts = {"query_offset": past} if past else {}
    if rng.random() < 0.4 and keys > 4:
        valid = torch.ones(batch, keys, dtype=torch.bool)
        for b in range(1, batch):
            valid[b, : rng.randint(0, min(4, past + rows - 1))] = False
        facts |= {"key_valid": valid, "query_valid": valid[:, past:], "first_token": valid.int().argmax(1)}
    if rng.random() < 0.3:
        facts["window"] = rng.randint(2, 12)
    if rng.random() < 0.3:
        facts["softcap"] = rng.uniform(0.5, 4.0)
    if rng.random() < 0.3:
        facts["sink_logits"] = torch.randn(heads, generator=generator, dtype=torch.float64)
    if rng.random() < 0.15:
        shape = (rng.choice([1, batch]), rng.choice([1, heads]), rows, keys)
        facts["bias"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    if rng.random() < 0.15:
        allowed = torch.rand(batch, 1, rows, keys, generator=generator) < 0.7
        allowed[..., past:] |= torch.eye(rows, dtype=torch.bool)
        facts["allowed"] = allowed
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "rows": rows, "keys": keys}
    call = make_call(seed, width=rng.choice([4, 8, 16]), v_width=rng.choice([3, 8]), causal=causal, **sizes, **facts)
    chosen = rng.sample(range(heads), rng.randint(1, heads))
    edited = True if rng.random() < 0.5 else torch.rand(batch, rows, generator=generator) < 0.6
    source = torch.rand(batch, len(chosen), keys, generator=generator) < 0.35
    return call, chosen, edited, source


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed):
    call, heads, rows, source = drawn(seed)

    def fresh():
        one = replace(call, facts={})
        dense = Dense(one)
        return one, dense, dense.output

    def members(keys):
        out = torch.zeros(call.q.shape[0], call.q.shape[1], 1, call.k.shape[2], dtype=torch.bool)
        out[:, heads] = keys[:, :, None]
        return out

    shared = source.any(1)

    one, dense, out = fresh()
    bias = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * source
    full = torch.zeros(members(source).shape, dtype=torch.float64)
    full[:, heads] = bias[:, :, None]
    close(exact_attention(s_site.key_bias(one, heads, bias)), dense.add(heads, full))

    one, dense, out = fresh()
    got = s_site.set_bias(one, out, heads, source, 0.8, rows)
    close(got, dense.add(heads, members(source).double() * 0.8, rows))
    got = p_site.redistribute(one, got, heads, shared, keep=0.3, rows=rows)
    close(got, dense.redistribute(heads, shared, None, 0.3, rows), 1e-9)

    one, dense, out = fresh()
    close(s_site.abs_boost(one, out, heads, shared, 0.7, rows), dense.boost(heads, shared, 0.7, rows))

    one, dense, out = fresh()
    before = s_site.temperature_before(one, heads, 1.7, rows)
    got = s_site.temperature_after(one, out, heads, 1.7, rows) if before is None else exact_attention(before)
    close(got, dense.cool(heads, 1.7, rows))

    for keep, target in ((0.4, None), (0.0, ~shared & (torch.arange(call.k.shape[2]) % 2 == 0))):
        one, dense, out = fresh()
        got = p_site.redistribute(one, out, heads, shared, target, keep=keep, rows=rows)
        close(got, dense.redistribute(heads, shared, target, keep, rows))

    for pattern in ("identity", "uniform", "argmax"):
        one, dense, out = fresh()
        close(p_site.mix(one, out, heads, pattern, 0.6, rows), dense.mix(heads, pattern, 0.6, rows))
    if not call.mask.causal:
        one, dense, out = fresh()
        close(p_site.mix(one, out, heads, "query_mean", 0.6, rows), dense.mix(heads, "query_mean", 0.6, rows))


def test_the_draw_covers_what_it_should():
    drawn_calls = [drawn(seed)[0] for seed in range(60)]
    for what in (
        lambda call: call.mask.window is not None,
        lambda call: call.softcap is not None,
        lambda call: call.sink_logits is not None,
        lambda call: call.mask.key_valid is not None,
        lambda call: call.mask.bias is not None,
        lambda call: call.mask.allowed is not None,
        lambda call: call.query_offset > 0 and call.q.shape[2] == 1,
        lambda call: call.query_offset > 0 and call.q.shape[2] > 1,
        lambda call: not call.mask.causal,
        lambda call: call.group > 1,
    ):
        assert sum(map(what, drawn_calls)) >= 4

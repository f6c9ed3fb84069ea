"""RectifiedSparse against the method written out block by block over the dense matrix, on SD3, Flux and DiT, and its closed cases."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import RectifiedSparse, from_json, record_heads
from headscope.scope import Scope

from ..core.diffusion_models import IMAGE, MODELS, TEXT, inputs
from .dense_edits import Dense
from .edit_cases import Grab

FIRST = {"sd3": 0, "flux": TEXT, "dit": 0}


def double(kind):
    model, given = MODELS[kind]().double(), inputs(kind)
    return Scope(model), {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def run(scope, edit, given):
    kept = []
    with torch.no_grad(), scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record:
        scope.model(**given)
    return kept, record


def written_out(call, first, edit):
    """[B, N, H, D], head by head and block by block."""
    dense = Dense(call)
    out = dense.output.clone()
    batch, heads, count, _ = call.q.shape
    image = list(range(first, first + IMAGE))
    words = [j for j in range(count) if j not in image]
    blocks = [image[at : at + edit.block] for at in range(0, IMAGE, edit.block)]
    for b in range(batch):
        for h in range(heads):
            q, k, v = call.q[b, h], call.k[b, h], dense.v[b, h]
            for rows in blocks:
                mean = q[rows].mean(0)
                weight = [len(js) * math.exp(float(mean @ k[js].mean(0)) * call.scale) for js in blocks]
                weight.append(sum(math.exp(float(mean @ k[j]) * call.scale) for j in words))
                p = [one / sum(weight) for one in weight]
                order = sorted(range(len(p)), key=lambda at: -p[at])
                total, needed = 0.0, 1
                for at in order:
                    total += p[at]
                    needed += total <= edit.mass
                chosen = [at for at in order[: max(needed, edit.top)] if at < len(blocks)]
                told = []
                if edit.gains:
                    dq = (q[rows] - mean).abs().mean(0)
                    for at, js in enumerate(blocks):
                        kb = k[js].mean(0)
                        wrong = abs(float(dq @ kb)) + abs(float(mean @ (k[js] - kb).abs().mean(0)))
                        if at not in chosen and abs(float(mean @ kb)) > wrong:
                            told.append(at)
                keys = sorted(j for at in chosen for j in blocks[at]) + words
                size = 1 - sum(p[at] for at in told) if edit.gains else sum(p[at] for at in chosen) + p[-1]
                for i in rows:
                    sparse = torch.softmax(dense.scores[b, h, i, keys], -1) @ v[keys] if keys else 0.0
                    out[b, i, h] = size * sparse + sum(p[at] * v[blocks[at]].mean(0) for at in told)
    return out


@pytest.mark.parametrize("kind", ["sd3", "flux", "dit"])
@pytest.mark.parametrize(("mass", "top", "block", "gains"), [(0.3, 1, 4, True), (0.0, 2, 5, True), (0.5, 1, 4, False), (0.2, 1, 3, True)])
def test_every_block_is_the_definition(kind, mass, top, block, gains):
    scope, given = double(kind)
    edit = RectifiedSparse("all", mass, top, block, gains)
    calls, record = run(scope, edit, given)
    done = 0
    for call in calls:
        if ("z", call.module) not in record.passes[0] or call.layer is None:
            continue
        want = written_out(call, FIRST[kind] if call.q.shape[2] > IMAGE else 0, edit)
        got = record.passes[0]["z", call.module]
        assert float((got - want).abs().max()) < 1e-10, call.module
        done += float((want - Dense(call).output).abs().max()) > 1e-3
    assert done, "blocks were left out"


def test_text_rows_other_heads_and_single_blocks_stay_to_the_bit():
    model, given = MODELS["sd3"](), inputs("sd3")
    scope = Scope(model)
    with torch.no_grad():
        plain = model(**given).sample
        with scope.intervene(RectifiedSparse("all", 0.1, block=IMAGE)):
            assert torch.equal(model(**given).sample, plain), "one block, and it is critical"
        with record_heads(scope, sites=("z",)) as before:
            model(**given)
        with scope.intervene(RectifiedSparse([(0, 1)], 0.1, block=4)), record_heads(scope, sites=("z",)) as after:
            model(**given)
        assert torch.equal(model(**given).sample, plain)
    a, b = before.z(0), after.z(0)
    assert torch.equal(a[:, :, [0, 2, 3]], b[:, :, [0, 2, 3]])
    assert torch.equal(a[:, IMAGE:, 1], b[:, IMAGE:, 1])
    assert not torch.equal(a[:, :IMAGE, 1], b[:, :IMAGE, 1])


def test_all_blocks_critical_is_full_attention():
    scope, given = double("dit")
    calls, record = run(scope, RectifiedSparse("all", 1.0, IMAGE, 4), given)
    call = next(one for one in calls if one.layer == 0)
    torch.testing.assert_close(record.passes[0]["z", call.module], Dense(call).output, rtol=0, atol=1e-12)


def test_rows_keep_their_size():
    """With constant values every row of every method is that constant: the weights sum to one."""
    scope, given = double("sd3")
    kept = []
    with torch.no_grad(), scope.intervene(Grab(kept)):
        scope.model(**given)
    from dataclasses import replace

    from headscope.interventions.head_edit import Bound

    call = next(one for one in kept if one.layer == 0)
    call = replace(call, v=torch.ones_like(call.v))
    edit = RectifiedSparse([(0, h) for h in range(4)], 0.2, block=4)
    edit = replace(edit, _bound=Bound({call.module: [0, 1, 2, 3]}, {call.module: [0, 1, 2, 3]}))
    out = edit.edit_output(call, torch.ones(2, IMAGE + TEXT, 4, 8, dtype=torch.float64), [0, 1, 2, 3], True)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-12)


def test_refusals_and_json(tiny_llama):
    for options, message in (({"mass": 1.5}, "share"), ({"top": 0}, "counts"), ({"block": True}, "counts"), ({"gains": 1}, "switch")):
        with pytest.raises(InterventionError, match=message):
            RectifiedSparse("all", **options)
    with pytest.raises(InterventionError, match="RescaledPattern is for text"):
        RectifiedSparse("all").bind(Scope(tiny_llama))
    edit = RectifiedSparse([(0, 1)], 0.3, 2, 64, False, steps=(2, 8))
    assert from_json(edit.to_json()) == edit
    assert "blocks of 64 image tokens that reach 30%" in edit.explain()

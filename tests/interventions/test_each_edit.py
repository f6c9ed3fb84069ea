"""Each edit: JSON there and back, its heads and no others, nothing left behind, nothing to the bit, and the dense matrix on a model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from headscope.interventions import (
    REGISTRY,
    Add,
    BoostScores,
    HeadMask,
    KeyBias,
    Lerp,
    Mix,
    Noise,
    PatchHeads,
    Redistribute,
    ReplaceQueries,
    RescaleRows,
    Scale,
    SetBias,
    SetRows,
    Stack,
    Temperature,
    from_json,
    record_heads,
)
from headscope.scope import Scope

from ..core.tiny_models import gemma2, gpt_oss, ids, llama, make, mistral, padding
from .dense_edits import Dense
from .edit_cases import Grab
from .edit_table import VALUES, H, logits, name_of, one_of_each

# ---- each of them -------------------------------------------------------------------------------------------------------------


def test_every_registered_intervention_is_tried_here():
    assert {edit.name for edit in one_of_each()} <= set(REGISTRY)
    core = {"add", "boost_scores", "head_mask", "key_bias", "lerp", "mix", "noise", "patch_heads", "redistribute", "replace"}
    core |= {"replace_queries", "rescale_rows", "scale", "set_bias", "set_rows", "temperature"}
    assert {edit.name for edit in one_of_each()} == core  # methods made of them have tests of their own


@pytest.mark.parametrize("edit", one_of_each(), ids=name_of)
def test_json_there_and_back(edit, tmp_path):
    text = edit.to_json(tensors=tmp_path / "t.safetensors")
    assert json.loads(text)["version"] == 1
    assert from_json(text, tmp_path) == edit
    stack = Stack((edit, HeadMask([(0, 0)])))
    assert Stack.load(stack.save(tmp_path / "stack.json")) == stack


@pytest.mark.parametrize("edit", one_of_each(), ids=name_of)
def test_it_changes_its_heads_and_no_others_and_leaves_nothing_behind(edit):
    model, tokens, mask = make(llama), ids(2, 13), padding("right", 2, 13)
    scope = Scope(model)
    plain = logits(model, tokens, attention_mask=mask)
    with record_heads(scope, sites=("z",)) as before:
        logits(model, tokens, attention_mask=mask)
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as after:
        changed = logits(model, tokens, attention_mask=mask)
    assert float((changed - plain).abs().max()) > 1e-5
    assert bool(changed[0].isfinite().all())
    assert torch.equal(after.z(0)[:, :, 2:], before.z(0)[:, :, 2:])
    assert torch.equal(logits(model, tokens, attention_mask=mask), plain)


NOTHING = [
    KeyBias(H, [0], 0.0),
    SetBias(H, [0], bias=0.0),
    BoostScores(H, [0], 0.0),
    Temperature(H, 1.0),
    Redistribute(H, [0], 1.0),
    Mix(H, "identity", 0.0),
    RescaleRows(H, 1.0),
    Scale(H, 1.0),
    Lerp(H, VALUES, 0.0),
    Add(H, VALUES, 0.0),
    Noise(H, 0.0),
    HeadMask(H, positions=[400]),
    Redistribute(H, [0], 0.4, phase="decode"),
]


@pytest.mark.parametrize("edit", NOTHING, ids=name_of)
@pytest.mark.parametrize("build", [llama, gpt_oss, gemma2], ids=lambda build: build.__name__)
def test_an_edit_of_nothing_gives_back_the_very_objects(edit, build):
    scope, kept = Scope(make(build)), []
    with scope.intervene(Grab(kept)):
        plain = logits(scope.model, ids(1, 9))
    bound = edit.bind(scope)
    call = kept[1]
    output = torch.randn(1, 9, 4, 8)
    assert bound.before(call) is call
    assert bound.after(call, output) is output
    with scope.intervene(edit):
        assert torch.equal(logits(scope.model, ids(1, 9)), plain)


@pytest.mark.parametrize(("build", "impl"), [(llama, "sdpa"), (llama, "eager"), (mistral, "sdpa"), (gemma2, "eager"), (gpt_oss, "eager")])
@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("edit", [edit for edit in one_of_each() if edit.acts_at() != "Z"], ids=name_of)
def test_on_a_model_it_is_the_edit_of_the_dense_matrix(build, impl, pad, edit):
    """What a module's heads give under an edit, against the call it met, edited densely."""
    model, tokens, mask = make(build, impl), ids(2, 12), padding(pad, 2, 12)
    exact = impl == "sdpa"  # eager attention takes its softmax in float32, and hides with a number that overflows there
    scope = Scope(model.double() if exact else model)
    kept = []
    with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record:
        logits(model, tokens, attention_mask=mask)
    for layer in (0, 1):
        call = next(one for one in kept if one.layer == layer)
        heads = edit.bind(scope).heads_in(call)
        dense = edited_densely(Dense(call), edit, heads)
        if dense is None:
            pytest.fail(f"no dense twin of {edit!r}")
        keep = dense.counts[..., None]
        error = torch.where(keep, (record.z(layer).double() - dense.output).abs(), 0.0)
        assert float(error.max()) < (1e-9 if exact else 1e-4)


def edited_densely(dense, edit, heads):
    """An edit of scores or weights, on the dense matrix, from its fields."""
    call = dense.call
    where = torch.arange(call.k.shape[2]) + call.key_offset
    first = torch.zeros(call.q.shape[0], 1) if call.first_token is None else call.first_token[:, None]

    def members(keys):
        if isinstance(keys, str):
            out = where[None] == first
        elif isinstance(keys, slice):
            out = ((where >= keys.start) & (where < keys.stop))[None]
        else:
            out = torch.isin(where, torch.tensor(keys))[None]
        return out if call.mask.key_valid is None else out & call.mask.key_valid

    rows = True
    if isinstance(edit.positions, slice):
        rows = ((torch.arange(call.q.shape[2]) + call.query_offset) >= edit.positions.start)[None]
    elif isinstance(edit.positions, tuple):
        rows = torch.isin(torch.arange(call.q.shape[2]) + call.query_offset, torch.tensor(edit.positions))[None]
    if isinstance(edit, KeyBias | SetBias) and edit.bias is not None:
        return dense.add(heads, torch.where(dense.members(members(edit.keys)), 1.0, 0.0).double() * edit.bias)
    if isinstance(edit, SetBias):
        keys = dense.members(members(edit.keys))
        m = (dense.a * keys).sum(-1, keepdim=True)
        possible = (m > 1e-300) & (m < 1 - 1e-15)
        bias = torch.where(possible, math.log(edit.mass / (1 - edit.mass)) + torch.log1p(-m) - m.log(), torch.zeros_like(m))
        return dense.add(heads, torch.where(keys, bias, torch.zeros_like(bias)))
    if isinstance(edit, BoostScores):
        return dense.boost(heads, members(edit.keys), edit.factor)
    if isinstance(edit, Temperature):
        return dense.cool(heads, edit.tau)
    if isinstance(edit, ReplaceQueries):
        from dataclasses import replace

        q = call.q.clone()
        q[:, heads] = 0
        return Dense(replace(call, q=q))
    if isinstance(edit, Redistribute):
        target = None if edit.target == "others" else members(edit.target)
        return dense.redistribute(heads, members(edit.keys), target, edit.keep)
    if isinstance(edit, Mix):
        return dense.mix(heads, edit.pattern, edit.u)
    if isinstance(edit, SetRows):
        return dense.set_rows(heads, list(edit.keys), list(edit.weights), rows)
    if isinstance(edit, RescaleRows):
        return dense.rescale(heads, edit.factor)
    if isinstance(edit, PatchHeads):
        from dataclasses import replace

        if edit.at == "q":
            q = call.q.clone()
            for place, (layer, head) in enumerate(edit.heads):
                if layer == call.layer:
                    q[:, head, 5] = edit.values.tensor[place].to(q)
            return Dense(replace(call, q=q))
        v = call.v.clone()
        if call.layer == 0:
            v[:, 0, 2] = edit.values.tensor[0].to(v)
        return Dense(replace(call, v=v))
    return None

"""Stacks: one order whoever wrote them first, conflicts refused, JSON there and back, words, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from headscope.errors import InterventionError, ProbeError
from headscope.interventions import (
    REGISTRY,
    Add,
    BoostScores,
    HeadMask,
    HeadSet,
    KeyBias,
    Lerp,
    Mix,
    Noise,
    PatchHeads,
    Redistribute,
    Replace,
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

from ..core.tiny_models import bert, gemma2, gpt2, gpt_oss, ids, llama, llava, make, mistral, padding
from .dense_edits import Dense
from .edit_cases import Grab

H = [(0, 1), (1, 3), (1, 0)]
VALUES = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def one_of_each() -> list:
    """Every registered intervention, with settings that change something."""
    return [
        KeyBias(H, [0, 2], 0.7),
        SetBias(H, slice(1, 4), bias=-0.5),
        SetBias(H, "first", mass=0.3),
        BoostScores(H, [1, 3], 0.6),
        Temperature(H, 2.0),
        ReplaceQueries(H, "zero"),
        Redistribute(H, "first", 0.4),
        Redistribute(H, [0, 1], 0.4, [2, 3]),
        Mix(H, "identity", 0.5),
        Mix(H, "uniform", 0.5),
        Mix(H, "argmax", 0.5),
        SetRows(H, [5, 6], positions=slice(7, None)),
        RescaleRows(H, 0.7),
        Scale(H, 2.0),
        Scale(H, [0.5, 1.0, 2.0]),
        Replace(H, VALUES),
        Lerp(H, VALUES, 0.3, positions="last_prompt"),
        Lerp(H, VALUES, [0.1, 0.2, 0.3]),
        Add(H, VALUES, 0.5),
        Noise(H, 0.5, seed=3),
        HeadMask(H),
        HeadMask(H, "uniform"),
        HeadMask(H, "noise", seed=2),
        HeadMask(H, "mean", VALUES),
        PatchHeads(H, VALUES),
        PatchHeads(H, VALUES, "q", positions=[5]),
        PatchHeads("0.0,0.1", VALUES[:1], "v", positions=[2]),
    ]


def name_of(edit):
    return f"{edit.name}-{edit.algebra()}" if hasattr(edit, "algebra") else None


def logits(model, tokens, **kw):
    with torch.no_grad():
        out = model(tokens, **kw)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


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


# ---- generation ---------------------------------------------------------------------------------------------------------------

PAIRS = [
    (KeyBias("0.1,1.3", "first", 0.7), Redistribute("0.1,1.3", [2, 3], 0.4)),
    (Temperature("0.1,1.3", 2.0), Mix("0.1,1.2", "uniform", 0.5)),
    (BoostScores("0.1,1.3", [1, 6], 0.6), Redistribute("0.1,1.3", "first", 0.4)),
    (Redistribute("0.1,1.3", "first", 0.2), HeadMask("0.0,1.2", "uniform")),
    (SetBias("0.1,1.3", "first", mass=0.5), Noise("0.1,1.3", 0.3)),
    (Mix("0.1,1.3", "identity", 0.5), Scale("0.1,1.0", 2.0)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(edit.name for edit in pair))
@pytest.mark.parametrize("build", [llama, mistral], ids=lambda build: build.__name__)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_two_edits_in_a_padded_generation_equal_reading_the_whole_text(pair, build, cache):
    model, tokens, mask = make(build).double(), ids(2, 9), padding("left", 2, 9)
    scope = Scope(model)
    with scope.intervene(*pair), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, cache_implementation=cache)
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], 1)
    with scope.intervene(*pair), record_heads(scope, sites=("z",)) as once:
        full = logits(model, out.ids[:, :-1], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0))
    for layer in (0, 1):
        torch.testing.assert_close(steps.z(layer)[whole.bool()], once.z(layer)[whole.bool()], rtol=1e-8, atol=1e-8)
    assert torch.equal(full[:, 8:].argmax(-1), out.new_ids)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(edit.name for edit in pair))
def test_an_exception_in_the_middle_of_a_generation_leaves_the_model_as_it_was(pair):
    from transformers import StoppingCriteria

    class Stop(StoppingCriteria):
        def __call__(self, tokens, scores, **kwargs):
            if tokens.shape[1] == 12:
                raise ZeroDivisionError("in the middle")
            return torch.zeros(len(tokens), dtype=torch.bool)

    model, tokens = make(llama), ids(1, 9)
    scope = Scope(model)
    plain, state = logits(model, tokens), {name: value.clone() for name, value in model.state_dict().items()}
    want = scope.generate(tokens, max_new_tokens=6).ids
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    with pytest.raises(ZeroDivisionError), scope.intervene(*pair):
        scope.generate(tokens, max_new_tokens=8, stopping_criteria=[Stop()])
    assert torch.equal(logits(model, tokens), plain)
    assert torch.equal(scope.generate(tokens, max_new_tokens=6).ids, want)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks


def test_statistics_see_a_key_bias():
    """A bias is part of the call: what is measured is the attention that the bias made."""
    scope = Scope(make(llama))
    scope_double = Scope(scope.model.double())
    with scope_double.intervene(KeyBias("0.1", [0], 30.0)):
        stats = scope_double.capture(ids(1, 9), statistics=["sink_mass"], sink_tokens=1)
    mass = stats["sink_mass"][0][0]
    assert float(mass[1].min()) > 0.999
    assert float(mass[0].min()) < 0.9


def test_only_the_biased_heads_are_computed_anew():
    """The other heads stay the model's own kernel's, to the bit."""
    scope, tokens = Scope(make(llama)), ids(1, 9)
    with record_heads(scope, sites=("z",)) as plain:
        logits(scope.model, tokens)
    with scope.intervene(KeyBias("0.1", [0], 2.0)), record_heads(scope, sites=("z",)) as biased:
        logits(scope.model, tokens)
    assert torch.equal(biased.z(0)[:, :, [0, 2, 3]], plain.z(0)[:, :, [0, 2, 3]])
    assert not torch.equal(biased.z(0)[:, :, 1], plain.z(0)[:, :, 1])


# ---- order and conflicts ------------------------------------------------------------------------------------------------------


def test_the_order_of_writing_does_not_matter_across_sites():
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    edits = (Scale("0.1", 2.0), Redistribute("0.1", [0], 0.4), KeyBias("0.1", [2], 0.5))
    results = []
    for order in itertools.permutations(edits):
        with scope.intervene(*order):
            results.append(logits(scope.model, tokens))
    a, b, c = edits
    with scope.intervene(a), scope.intervene(b), scope.intervene(c):
        results.append(logits(scope.model, tokens))
    assert all(torch.equal(one, results[0]) for one in results)


CONFLICTS = [
    (Redistribute("0.1", [0], 0.4), Redistribute("0.1,1.1", [1], 0.4), "probabilities"),
    (Mix("0.1", "identity", 0.5), Redistribute("0.1", [0], 0.4), "probabilities"),
    (Mix("0.1", "identity", 0.5), Mix("0.1", "uniform", 0.5), "two Mix"),
    (Scale("0.1", 2.0), Add("0.1", VALUES[:1]), "output"),
    (HeadMask("0.1"), Add("0.1", VALUES[:1]), "output"),
    (HeadMask("0.1", "uniform"), HeadMask("0.1", "noise"), "two HeadMask"),
    (Temperature("0.1", 2.0), KeyBias("0.1", [0], 1.0), "scores"),
    (BoostScores("0.1", [0], 1.0), KeyBias("0.1", [0], 1.0), "scores"),
    (PatchHeads("0.1", VALUES[:1], "q"), Temperature("0.1", 2.0), "scores"),
    (HeadMask("0.1", phase="decode"), Add("0.1", VALUES[:1]), "output"),
]


@pytest.mark.filterwarnings("ignore:.*nothing was changed")
@pytest.mark.parametrize(("a", "b", "words"), CONFLICTS, ids=lambda value: getattr(value, "name", None))
def test_edits_whose_order_would_matter_are_refused(a, b, words):
    scope = Scope(make(llama))
    for first, second in ((a, b), (b, a)):
        with pytest.raises(InterventionError, match=rf"{words}.*order=1"), scope.intervene(first, second):
            pytest.fail("the block was entered")
        with scope.intervene(first):
            inner = scope.intervene(second)
            with pytest.raises(InterventionError, match=r"model\.layers\.0\.self_attn\.1"), inner:
                pytest.fail("the block was entered")
        with pytest.raises(InterventionError, match=words):
            Stack((first, second)).check(scope)


COMPATIBLE = [
    (Scale("0.1", 2.0), Scale("0.1", 0.5)),
    (HeadMask("0.1"), HeadMask("0.1")),
    (HeadMask("0.1"), Scale("0.1", 3.0)),
    (HeadMask("0.1", "uniform"), HeadMask("0.1", "uniform")),
    (Add("0.1", VALUES[:1]), Noise("0.1", 0.5)),
    (KeyBias("0.1", [0], 1.0), KeyBias("0.1", [0, 1], -0.5)),
    (KeyBias("0.1", [0], 1.0), SetBias("0.1", [1, 2], bias=0.3)),
    (Temperature("0.1", 2.0), Temperature("0.1", 0.7)),
    (ReplaceQueries("0.1", "zero"), KeyBias("0.1", [0], 1.0)),
    (PatchHeads("0.0,0.1", VALUES[:1], "k", positions=[0]), PatchHeads("0.0,0.1", VALUES[:1], "v", positions=[0])),
    (Redistribute("0.1", [0], 0.4), Redistribute("0.0", [1], 0.4)),
    (HeadMask("0.1", positions=[3]), Add("0.1", VALUES[:1], positions=slice(4, None))),
    (HeadMask("0.1", phase="prefill"), Add("0.1", VALUES[:1], phase="decode")),
]


@pytest.mark.parametrize(("a", "b"), COMPATIBLE, ids=lambda value: value.name)
def test_edits_that_commute_do(a, b):
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    results = []
    for order in ((a, b), (b, a)):
        with scope.intervene(*order):
            results.append(logits(scope.model, tokens))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_an_order_settles_it():
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    results = {}
    for first, second in ((1, 2), (2, 1)):
        edits = (Scale("0.1", 2.0, order=first), Add("0.1", VALUES[:1], order=second))
        with record_heads(scope, "0.1", sites=("z",)) as plain:
            logits(scope.model, tokens)
        for order in (edits, edits[::-1]):
            with scope.intervene(*order), record_heads(scope, "0.1", sites=("z",)) as record:
                logits(scope.model, tokens)
            results.setdefault(first, []).append(record.z(0))
    value = VALUES[0].double()
    for got in results[1]:
        torch.testing.assert_close(got, 2 * plain.z(0) + value)
    for got in results[2]:
        torch.testing.assert_close(got, 2 * (plain.z(0) + value))


def test_redistributions_in_a_given_order_meet_each_other():
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    kept = []
    edits = (Redistribute("0.1", [0], 0.4, order=2), Redistribute("0.1", [0, 1, 2], 0.5, order=1))
    with scope.intervene(Grab(kept)), scope.intervene(*edits), record_heads(scope, "0.1", sites=("z",)) as record:
        logits(scope.model, tokens)
    keys = torch.arange(9)
    dense = Dense(kept[0]).redistribute([1], keys < 3, None, 0.5).redistribute([1], keys < 1, None, 0.4)
    torch.testing.assert_close(record.z(0)[:, :, 0], dense.output[:, :, 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", [gemma2, gpt_oss], ids=lambda build: build.__name__)
def test_a_temperature_on_some_heads_of_a_capped_model_after_a_bias(build):
    scope, tokens = Scope(make(build)), ids(1, 9)
    kept = []
    edits = (KeyBias("0.1", [0], 1.0, order=1), Temperature("0.1", 2.0, order=2))
    with scope.intervene(Grab(kept)), scope.intervene(*edits), record_heads(scope, "0.1", sites=("z",)) as record:
        logits(scope.model, tokens)
    dense = Dense(kept[0]).add([1], (torch.arange(9) == 0).double()).cool([1], 2.0)
    torch.testing.assert_close(record.z(0)[:, :, 0].double(), dense.output[:, :, 1], rtol=1e-4, atol=1e-4)
    swapped = (KeyBias("0.1", [0], 1.0, order=2), Temperature("0.1", 2.0, order=1))
    with pytest.raises(InterventionError, match="bias would be divided"), scope.intervene(*swapped):
        logits(scope.model, tokens)


# ---- token classes ------------------------------------------------------------------------------------------------------------


def test_image_tokens_of_a_vision_language_model_stay_known_in_decoding():
    model = make(llava)
    scope = Scope(model)
    tokens = torch.cat([ids(1, 3, high=80), torch.full((1, 16), 96), ids(1, 5, seed=2, high=80)], 1)
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    kept = []
    edit = KeyBias("0.1", "image", -math.inf)
    with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record, torch.no_grad():
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    steps = [call for call in kept if call.layer == 0]
    assert [call.q.shape[2] for call in steps] == [24, 1, 1, 1]
    at = 0
    for call in steps:
        dense = Dense(call)
        hidden = torch.zeros(call.k.shape[2], dtype=torch.float64)
        hidden[3:19] = -math.inf
        dense.add([1], hidden)
        rows = call.q.shape[2]
        want = dense.output[:, :, 1]
        torch.testing.assert_close(record.z(0)[:, at : at + rows, 1].double(), want.nan_to_num(), rtol=1e-4, atol=1e-4)
        at += rows
    with scope.intervene(HeadMask("0.1", positions="image")), record_heads(scope, sites=("z",)) as record, torch.no_grad():
        model(**inputs)
    assert (~record.z(0)[0, :, 1].any(-1)).nonzero().flatten().tolist() == list(range(3, 19))


def test_a_text_model_has_no_image_tokens():
    scope = Scope(make(llama))
    for edit in (KeyBias("0.1", "image", 1.0), Redistribute("0.1", "image", 0.4), HeadMask("0.1", positions="image")):
        with pytest.raises(InterventionError, match="image tokens"), scope.intervene(edit):
            pytest.fail("the block was entered")


# ---- head sets ----------------------------------------------------------------------------------------------------------------


def test_head_sets(tmp_path):
    import headscope as hs

    scope = Scope(make(llama))
    profile = hs.Scope(scope.model).profile(probes=["sink", "locality"], context=24, data=ids(1, 24))
    best = profile.rank("sink", 2)
    assert list(HeadSet.select(profile, "top 2 distance")) == profile.rank("distance", 2)
    threshold = profile.value(*best[1], "sink")
    assert set(HeadSet.select(profile, f"sink >= {threshold!r}")) == set(best)
    assert len(HeadSet.select(profile, f"sink < {threshold!r}")) == 6
    assert set(HeadSet.select(profile, "local")) == set(profile.top("local", 99))
    a, b = HeadSet.of("0.1,1.3"), HeadSet.of([(1, 3), (0, 0)])
    assert (list(a | b), list(a & b), list(a - b)) == ([(0, 1), (1, 3), (0, 0)], [(1, 3)], [(0, 1)])
    assert HeadMask(a).heads == ((0, 1), (1, 3))
    assert a[0] == (0, 1)
    assert list(a[1:]) == [(1, 3)]
    control = HeadSet.random(scope, 3, 0, without=a)
    assert len(control) == 3
    assert not set(control) & set(a)
    assert list(control) == list(HeadSet.random(scope, 3, 0, without=a)) != list(HeadSet.random(scope, 3, 1, without=a))
    for text, words in (("distance", "every head has a value"), ("sink > 2", "no head"), ("best ones", "no way")):
        with pytest.raises(InterventionError, match=words):
            HeadSet.select(profile, text)
    with pytest.raises(ProbeError, match="unknown"):
        HeadSet.select(profile, "top 3 nothing")
    with pytest.raises(InterventionError, match="8 to draw"):
        HeadSet.random(scope, 9, 0)
    with pytest.raises(InterventionError, match="no head is named"):
        HeadMask(a & HeadSet.of("0.0"))
    with pytest.raises(InterventionError, match=r"HeadSet\.select"):
        HeadMask("top 5 induction")


# ---- words and bad input ------------------------------------------------------------------------------------------------------


def test_what_will_be_done_in_words():
    stack = Stack(
        (HeadMask("18.6", phase="decode"), Redistribute("18.6,17.3", "first", 0.4, positions="last_prompt"), KeyBias("all", [0, 5], -1))
    )
    lines = stack.explain().splitlines()
    assert lines[0].startswith("1. add -1 to the scores of the keys at 0, 5, all heads; cost: exact attention")
    assert lines[1].startswith(
        "2. keep 40% of the attention on the keys of the first token and give the rest to the other keys, heads 18.6, 17.3, at "
    )
    assert "last prompt token; cost: " in lines[1]
    assert lines[2].startswith("3. replace the head's output by zero, head 18.6, in decode only; cost: a copy")
    for edit in one_of_each():
        assert edit.explain().count("cost: ") == 1
        assert type(edit).__name__ not in edit.what()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"intervention": "head_mask", "version": 2, "heads": "0.1"}', "newer headscope.*version 1"),
        ('{"version": 7, "interventions": []}', "newer headscope"),
        ('{"intervention": "head_mask", "version": "x", "heads": "0.1"}', "version 'x'"),
        ('{"interventions": []}', "nothing"),
        ('{"interventions": [{"intervention": "mixx", "heads": "0.1"}]}', "did you mean mix"),
        ('[{"intervention": "mix", "heads": "0.1", "v": 1}]', "field of mix"),
        ("[3]", 'no "intervention"'),
        ("nonsense", "no JSON"),
    ],
)
def test_specifications_that_cannot_be_read(text, words):
    with pytest.raises(InterventionError, match=words):
        Stack.from_json(text)


@pytest.mark.parametrize(
    ("make_edit", "words"),
    [
        (lambda: KeyBias("0.1", "last_prompt", 1.0), "no set of keys"),
        (lambda: KeyBias("0.1", None, 1.0), "no key is named"),
        (lambda: KeyBias("0.1", [0], math.nan), "no number"),
        (lambda: SetBias("0.1", [0]), "bias= or mass="),
        (lambda: SetBias("0.1", [0], mass=1.0), "between 0 and 1"),
        (lambda: Temperature("0.1", 0.0), "positive"),
        (lambda: ReplaceQueries("0.1", "blur"), "width"),
        (lambda: ReplaceQueries("0.1", "blurred"), "did you mean blur"),
        (lambda: ReplaceQueries("0.1", "blur", 1.0, (4, 0)), "height, width"),
        (lambda: Redistribute("0.1", [0], -0.1), "negative"),
        (lambda: Mix("0.1", "identity", 1.5), "0 to 1"),
        (lambda: Mix("0.1", "sink", 0.5), "unknown pattern"),
        (lambda: SetRows("0.1", slice(0, 3)), "key by key"),
        (lambda: SetRows("0.1", [0, 1], [1.0]), "1 weights for 2 keys"),
        (lambda: RescaleRows("0.1", torch.zeros(1, 2, 3)), "one number per row"),
        (lambda: Scale("0.1", torch.zeros(2, 2)), "one per head"),
        (lambda: Replace("0.1", None), "nothing to use"),
        (lambda: Noise("0.1", -1.0), "negative"),
        (lambda: Scale("0.1", 2.0, order=1.5), "order"),
        (lambda: Stack(()), "nothing"),
        (lambda: Stack((3,)), "not an intervention"),
    ],
)
def test_settings_that_make_no_sense(make_edit, words):
    with pytest.raises(InterventionError, match=words):
        make_edit()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Scale("0.1,0.2", [1.0, 2.0, 3.0]), "3 values.*2 heads"),
        (Add("0.1", VALUES), "3, 8"),
        (Mix("0.9", "identity", 0.5), r"heads 0\.\.3"),
        (Redistribute("5.0", [0], 0.5), r"layers are 0\.\.1"),
    ],
    ids=name_of,
)
def test_edits_that_do_not_fit_the_model(edit, words):
    with pytest.raises(InterventionError, match=words), Scope(make(llama)).intervene(edit):
        pytest.fail("the block was entered")


def test_an_encoder_takes_the_bidirectional_ones():
    scope = Scope(make(bert))
    tokens, mask = ids(2, 9), padding("right", 2, 9)
    kept = []
    for edit in (ReplaceQueries("0.1", "mean"), Mix("0.1", "query_mean", 0.5)):
        with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record:
            logits(scope.model, tokens, attention_mask=mask)
        u = 1.0 if isinstance(edit, ReplaceQueries) else 0.5
        dense = Dense(kept[0]).mix([1], "query_mean", u)
        torch.testing.assert_close(record.z(0)[mask.bool()].double(), dense.output[mask.bool()], rtol=1e-4, atol=1e-5)
    causal = Scope(make(gpt2))
    with pytest.raises(InterventionError, match="causal"), causal.intervene(ReplaceQueries("0.1", "mean")):
        logits(causal.model, tokens)

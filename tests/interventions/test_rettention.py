"""Rettention against the dense matrix of each step, and its closed cases."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import Rettention, from_json, record_heads
from headscope.scope import Scope

from ..core.diffusion_models import IMAGE, MODELS, TEXT, inputs, noise
from .dense_edits import Dense
from .edit_cases import Grab

H = [(0, 1), (1, 0)]
KEPT = [0, 3, 4, 9, 15]


def run(scope, edit, given, steps, same=False):
    """The calls and head outputs of `steps` forward passes on changing inputs."""
    kept = []
    with torch.no_grad(), scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record:
        for step in range(steps):
            x = noise(*given["hidden_states"].shape, seed=0 if same else step).to(given["hidden_states"].dtype)
            scope.model(**{**given, "hidden_states": x})
    return kept, record


def double(kind):
    model, given = MODELS[kind]().double(), inputs(kind)
    return Scope(model), {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


@pytest.mark.parametrize("kind", ["sd3", "dit"])
@pytest.mark.parametrize(("drift", "residual"), [(0.0, True), (0.04, True), (0.0, False)])
def test_every_step_is_the_definition(kind, drift, residual):
    """full=2, every=3: steps 0, 1, 4, 7 are full; the others combine their own sparse softmax with the last full step's ratio and rest."""
    scope, given = double(kind)
    keys = "text" if kind == "sd3" else KEPT
    calls, record = run(scope, Rettention(H, keys, 2, 3, drift, residual), given, 8)
    for layer, head in H:
        name, ratio, rest, sparse_steps = scope.topology[layer].name, None, None, 0
        for step, call in enumerate([one for one in calls if one.module == name]):
            got = record.passes[step]["z", name][:, :, head]
            dense = Dense(call)
            members = torch.zeros(call.k.shape[2], dtype=torch.bool)
            members[slice(IMAGE, IMAGE + TEXT) if kind == "sd3" else KEPT] = True
            full = dense.output[:, :, head]
            scores = dense.scores[:, head].masked_fill(~members, -math.inf)
            sparse = torch.softmax(scores, -1) @ dense.v[:, head]
            if step in (0, 1, 4, 7):
                ratio = torch.exp(torch.logsumexp(scores, -1) - torch.logsumexp(dense.scores[:, head], -1))[..., None]
                rest = full - ratio * sparse
                want = full
            else:
                sparse_steps += 1
                want = (ratio + drift * sparse_steps) * sparse + (rest if residual else 0.0)
            assert float((got - want).abs().max()) < 1e-10, (step, layer)


def test_a_step_in_which_nothing_changed_is_reproduced():
    scope, given = double("dit")
    _, record = run(scope, Rettention(H, KEPT, 1, 4), given, 4, same=True)
    name = scope.topology[1].name
    for step in range(1, 4):
        torch.testing.assert_close(record.passes[step]["z", name], record.passes[0]["z", name], rtol=1e-10, atol=1e-10)


def test_full_steps_are_the_model_to_the_bit_and_a_block_begins_anew():
    model, given = MODELS["sd3"](), inputs("sd3")
    scope, edit = Scope(model), Rettention(H, "text", 2, 5)
    with torch.no_grad():
        plain = model(**given).sample
        for _ in range(2):
            with scope.intervene(edit):
                same = [torch.equal(model(**given).sample, plain) for _ in range(4)]
            assert same[:2] == [True, True]
        other = {name: value[:1] if value.shape[0] == 2 else value for name, value in given.items()}
        with scope.intervene(edit):
            for each in (given, given):
                model(**each)
            with pytest.raises(InterventionError, match="another shape"):
                model(**other)


def test_refusals_and_json(tiny_llama):
    for options, message in (
        ({"full": 0}, "nothing cached"),
        ({"every": 0}, "nothing cached"),
        ({"drift": math.inf}, "number"),
        ({"residual": 1}, "switch"),
    ):
        with pytest.raises(InterventionError, match=message):
            Rettention(H, "text", **options)
    with pytest.raises(InterventionError, match="no denoising steps"):
        Rettention([(0, 0)], [0]).bind(Scope(tiny_llama))
    scope, given = double("dit")
    with pytest.raises(InterventionError, match="none of its keys is kept"):
        run(scope, Rettention(H, [40]), given, 1)
    edit = Rettention(H, KEPT, 3, 4, 0.04, False)
    assert from_json(edit.to_json()) == edit
    assert "after 3 full steps" in edit.explain()

"""InContextBrush against its sums written out over the dense matrix, on SD3 and Flux, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import InContextBrush, from_json, record_heads
from headscope.scope import Scope

from ..core.diffusion_models import IMAGE, MODELS, TEXT, inputs
from .dense_edits import Dense
from .edit_cases import Grab

DEMO, QUERY = slice(0, 6), [7, 9, 12, 15]
FIRST = {"sd3": (0, IMAGE), "flux": (TEXT, 0)}
"""Where image and text begin in the joint sequence."""


def double(kind):
    model, given = MODELS[kind]().double(), inputs(kind)
    return Scope(model), {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def run(scope, edit, given):
    kept = []
    with torch.no_grad(), scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record:
        out = scope.model(**given).sample
    return kept, record, out


def written_out(call, heads, kind, edit, query, shifted):
    """[B, N, h, D] by loops over heads and rows of the whole matrix."""
    dense, (image, text) = Dense(call), FIRST[kind]
    words = range(text, text + TEXT)
    out = dense.output[:, :, heads].clone()
    demo = [image + at for at in range(6)]
    for b in range(out.shape[0]):
        rows = [image + at for at in query[b]]
        totals = [float(dense.a[b, head][rows][:, list(words)].sum()) for head in heads]
        low, high = min(totals), max(totals)
        for place, head in enumerate(heads):
            a, v = dense.a[b, head], dense.v[b, head]
            if shifted:
                for i in rows:
                    out[b, i, place] += edit.demo_gain * sum(a[i, j] * v[j] for j in demo)
                    out[b, i, place] += edit.text_gain * sum(a[i, j] * v[j] for j in words)
            out[b, :, place] *= 1 + edit.head_gain * ((totals[place] - low) / (high - low) if high > low else 0.0)
    return out


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("shift", ["joint", "all"])
def test_every_block_is_the_definition(kind, shift):
    scope, given = double(kind)
    edit = InContextBrush("all", QUERY, DEMO, 0.3, 0.5, 0.2, shift)
    calls, record, _ = run(scope, edit, given)
    seen = set()
    for call in calls:
        if call.module not in record.passes[0] and ("z", call.module) not in record.passes[0]:
            continue
        joint = kind == "sd3" or not call.module.startswith("single_")
        want = written_out(call, list(range(call.q.shape[1])), kind, edit, [QUERY, QUERY], joint or shift == "all")
        got = record.passes[0]["z", call.module]
        assert float((got - want).abs().max()) < 1e-10, call.module
        seen.add(joint)
    assert seen == ({True} if kind == "sd3" else {True, False})


def test_some_heads_and_another_query_per_sequence():
    scope, given = double("sd3")
    mask = torch.zeros(2, IMAGE, dtype=torch.bool)
    mask[0, QUERY], mask[1, [6, 8]] = True, True
    edit = InContextBrush([(0, 3), (0, 1), (2, 2)], mask, DEMO)
    calls, record, _ = run(scope, edit, given)
    call = next(one for one in calls if one.layer == 0)
    want = written_out(call, [3, 1], "sd3", edit, [QUERY, [6, 8]], True)
    got = record.passes[0]["z", call.module]
    assert float((got[:, :, [3, 1]] - want).abs().max()) < 1e-10
    assert float((got[:, :, [0, 2]] - Dense(call).output[:, :, [0, 2]]).abs().max()) < 1e-12, "heads that were not named stay"


def test_no_gain_is_the_model_to_the_bit_and_panels_are_halves():
    model, given = MODELS["sd3"](), inputs("sd3")
    scope = Scope(model)
    with torch.no_grad():
        plain = model(**given).sample
        with scope.intervene(InContextBrush("all", QUERY, DEMO, 0.0, 0.0, 0.0)):
            assert torch.equal(model(**given).sample, plain)
        edit = InContextBrush.panels("all", (4, 4))
        assert edit.query.tensor.tolist() == [at % 4 >= 2 for at in range(16)]
        assert torch.equal(edit.demo.tensor, ~edit.query.tensor)
        with scope.intervene(edit):
            changed = model(**given).sample
        assert not torch.equal(changed, plain)
        assert torch.equal(model(**given).sample, plain), "the model is as before"


def test_on_the_bundled_sd3():
    """Through the transformer that comes with the package: the prompt's weight on the painted half rises in every joint block."""
    import headscope as hs

    scope = hs.load("bundled:sd3")
    given = scope_inputs(scope)
    count = spans_of(scope, given)
    side = math.isqrt(count)
    assert side * side == count
    edit = InContextBrush.panels("all", (side, side), demo_gain=0.3, text_gain=0.3, head_gain=0.2)
    with torch.no_grad():
        plain = scope.model(**given).sample
        _, record, changed = run(scope, edit, given)
    assert changed.shape == plain.shape
    assert bool(changed.isfinite().all())
    assert float((changed - plain).abs().max()) > 1e-4
    assert record.passes


def scope_inputs(scope):
    """Inputs of an SD3 transformer by its own config."""
    config = scope.model.config
    draw = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=draw)

    return {
        "hidden_states": noise(1, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": noise(1, 5, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 500.0),
    }


def spans_of(scope, given):
    kept = []
    with torch.no_grad(), scope.intervene(Grab(kept)):
        scope.model(**given)
    first, end = next((first, end) for label, first, end in kept[0].facts["streams"] if label == 0)
    return end - first


def test_refusals_and_json(tmp_path, tiny_llama):
    for options, message in (
        ({"query": "image"}, "names no part"),
        ({"query": QUERY, "demo": None}, "names no part"),
        ({"query": QUERY, "demo_gain": math.nan}, "no number"),
        ({"query": QUERY, "shift": "some"}, "shift"),
    ):
        with pytest.raises(InterventionError, match=message):
            InContextBrush("all", **{"demo": DEMO, **options})
    with pytest.raises(InterventionError, match="even width"):
        InContextBrush.panels("all", (4, 3))
    with pytest.raises(InterventionError, match="draws no pictures"):
        InContextBrush("all", QUERY, DEMO).bind(Scope(tiny_llama))
    with pytest.raises(InterventionError, match=r"no(ne of its blocks has a)? text stream"):
        InContextBrush("all", QUERY, DEMO).bind(Scope(MODELS["dit"]()))
    scope, given = double("sd3")
    with pytest.raises(InterventionError, match=r"tokens 0\.\.15"):
        run(scope, InContextBrush("all", [40], DEMO), given)
    edit = InContextBrush([(0, 1)], QUERY, DEMO, 0.1, 0.2, 0.4, "all", order=2)
    assert from_json(edit.to_json()) == edit
    masked = InContextBrush.panels("all", (4, 4))
    assert from_json(masked.to_json(tmp_path / "spec.safetensors"), tmp_path) == masked
    assert "two-stream blocks" in masked.explain()
    assert "0.1 of what the query's rows read" in edit.explain()

"""SoftPAG: every kind and stream against the dense matrix in float64, and diffusers' own PAG processors as peers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0, PAGJointAttnProcessor2_0
from scipy.ndimage import convolve

from headscope.errors import InterventionError
from headscope.interventions import Mix, SetBias, SoftPAG, from_json, record_heads
from headscope.interventions.head_edit import Bound
from headscope.scope import Scope

from ..core.diffusion_models import IMAGE, MODELS, TEXT, inputs, sd3
from .dense_edits import Dense
from .edit_cases import Grab, make_call

H = [(0, 1), (1, 0), (1, 1)]
CASES = [
    {"kind": "identity", "u": 1.0},
    {"kind": "identity", "u": 0.3},
    {"kind": "uniform", "u": 0.7},
    {"kind": "query_mean", "u": 1.0},
    {"kind": "query_mean", "u": 0.6, "sigma": 0.5},
    {"kind": "argmax", "u": 0.5},
    {"kind": "temperature", "u": 1.0, "tau": 2.5},
    {"kind": "temperature", "u": 0.4, "tau": 0.5},
]


def softmax(call, scores):
    """Weights of scores [B, H, Nq, Nk], a sink logit in the denominator."""
    top = scores.exp()
    total = top.sum(-1, keepdim=True)
    if call.sink_logits is not None:
        total = total + call.sink_logits.double().exp()[None, :, None, None]
    return torch.where(total > 0, top / total, 0.0)


def blurred_queries(q, image, sigma):
    """q with the image rows' grid convolved, by scipy."""
    size = math.ceil(6 * sigma)
    size += 1 - size % 2
    x = np.arange(size) - size // 2
    line = np.exp(-(x**2) / (2 * sigma**2))
    weights = np.outer(line, line) / line.sum() ** 2
    side = math.isqrt(int(image.sum()))
    out, where = q.clone(), image.nonzero().flatten()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for d in range(q.shape[3]):
                picture = q[b, h, where, d].reshape(side, side).numpy()
                out[b, h, where, d] = torch.from_numpy(convolve(picture, weights, mode="mirror")).flatten()
    return out


def expected(call, heads, image, edit):
    """[B, Nq, H, Dv] of the dense matrix, edited as the definition says. `image` [N] bool."""
    dense = Dense(call)
    a, scores = dense.a, dense.scores
    if edit.joint == "diagonal":
        hidden = image[:, None] & image[None] & ~torch.eye(len(image), dtype=torch.bool)
        p = softmax(call, scores.masked_fill(hidden, -math.inf))
    elif edit.kind == "identity":
        p = torch.eye(a.shape[-1], dtype=torch.float64).expand_as(a)
    elif edit.kind == "uniform":
        p = dense.visible.double() / dense.visible.double().sum(-1, keepdim=True).clamp_min(1)
    elif edit.kind == "argmax":
        p = torch.nn.functional.one_hot(scores.argmax(-1), a.shape[-1]).double()
    elif edit.kind == "temperature":
        cold = replace(call, sink_logits=None if call.sink_logits is None else call.sink_logits / edit.tau)
        p = softmax(cold, scores / edit.tau)
    else:
        among = image if edit.stream == "image" else torch.ones_like(image)
        valid = among.expand(call.q.shape[0], -1)
        valid = valid if call.mask.query_valid is None else valid & call.mask.query_valid
        if edit.sigma is None:
            mean = torch.stack([q[:, rows].mean(1) for q, rows in zip(call.q, valid, strict=True)])
            q = mean[:, :, None].expand_as(call.q)
        else:
            q = blurred_queries(call.q, image, edit.sigma)
        p = Dense(replace(call, q=q)).a
    rows = torch.ones_like(image) if edit.stream == "all" else image
    a = torch.where(dense.where(heads, rows[None]), (1 - edit.u) * a + edit.u * p, a)
    return (a @ dense.v).transpose(1, 2), dense.counts


def streams_of(call):
    image = torch.zeros(call.q.shape[2], dtype=torch.bool)
    for label, first, end in call.facts["streams"]:
        image[first:end] = label == 0
    return image


def settings():
    for case in CASES:
        for stream in ("image", "all"):
            yield {**case, "stream": stream}
    for u in (1.0, 0.5):
        yield {"kind": "identity", "u": u, "joint": "diagonal"}


@pytest.mark.parametrize("kind", list(MODELS))
def test_processors_of_diffusers(kind):
    """SD3 (two streams, image first), Flux (text first, double and single blocks) and DiT (image alone), in float64."""
    model, given = MODELS[kind]().double(), inputs(kind)
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    scope = Scope(model)
    with torch.no_grad():
        plain = model(**given).sample
    seen = []
    for options in settings():
        edit, kept = SoftPAG(H, **options), []
        with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record, torch.no_grad():
            out = model(**given).sample
        assert not torch.equal(out, plain)
        for name, heads in edit.bind(scope).bound.heads.items():
            call = next(one for one in kept if one.module == name)
            image = streams_of(call)
            seen.append((name, int(image.sum()), call.q.shape[2]))
            want, _ = expected(call, heads, image, edit)
            got = record.passes[-1]["z", name]
            assert float((got - want).abs().max()) < 1e-10, (options, name)
    assert {(n, total) for _, n, total in seen} == {(IMAGE, IMAGE + (0 if kind == "dit" else TEXT))}
    with torch.no_grad():
        assert torch.equal(model(**given).sample, plain)


@pytest.mark.parametrize("kind", list(MODELS))
def test_u_of_zero_is_the_model_to_the_bit(kind):
    model, given = MODELS[kind](), inputs(kind)
    scope = Scope(model)
    with torch.no_grad():
        plain = model(**given).sample
        for options in settings():
            with scope.intervene(SoftPAG(H, **{**options, "u": 0.0})):
                assert torch.equal(model(**given).sample, plain), options


def masks():
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 12:] = False
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(2, 6, 16, 16, generator=generator, dtype=torch.float64)
    allowed = torch.rand(2, 1, 16, 16, generator=generator) < 0.7
    allowed |= torch.eye(16, dtype=torch.bool)
    sinks = torch.randn(6, generator=generator, dtype=torch.float64)
    first = torch.arange(16) >= 2
    return {
        "plain": {},
        "one key head": {"heads": 6, "kv_heads": 1},
        "padded text": {"key_valid": valid, "query_valid": valid},
        "a padded first row": {"key_valid": first.expand(2, 16), "query_valid": first.expand(2, 16)},
        "bias": {"bias": bias},
        "explicit": {"allowed": allowed},
        "soft cap": {"softcap": 1.5},
        "sinks": {"sink_logits": sinks},
        "all of it": {"sink_logits": sinks, "softcap": 2.0, "bias": bias, "key_valid": valid, "query_valid": valid},
    }


@pytest.mark.parametrize("image_first", [True, False])
@pytest.mark.parametrize("name", list(masks()))
def test_random_joint_calls(name, image_first):
    """Nine image tokens and seven words, grouped queries, padding, bias, sinks, soft caps."""
    streams = ((0, 0, 9), (1, 9, 16)) if image_first else ((1, 0, 7), (0, 7, 16))
    call = make_call(40, rows=16, causal=False, **masks()[name])
    call = replace(call, facts={"streams": streams})
    heads = [1, 2, 5]
    output = Dense(call).output
    for options in settings():
        edit = SoftPAG([(0, head) for head in heads], **options)
        bound = replace(edit, _bound=Bound({"m": heads}, {"m": [0, 1, 2]}))
        call = replace(call, facts={"streams": streams})
        got = bound.after(call, output)
        want, counts = expected(call, heads, streams_of(call), edit)
        error = torch.where(counts[..., None], (got - want).abs(), 0.0)
        assert float(error.max()) < 1e-10, options
        assert torch.equal(got[:, :, [0, 3, 4]], output[:, :, [0, 3, 4]])


def test_the_diagonal_survives_a_row_that_looks_elsewhere():
    """A row whose own key and text together hold e^-200 of its mass still has a distribution over them."""
    call = make_call(41, rows=6, heads=1, kv_heads=1, batch=1, causal=False, dtype=torch.float32)
    k = call.k.clone()
    own = call.q[0, 0, 0]
    k[:, :, 1] = own * 200 / (own @ own * call.scale)
    call = replace(call, k=k, facts={"streams": ((0, 0, 4), (1, 4, 6))})
    edit = replace(SoftPAG([(0, 0)], joint="diagonal"), _bound=Bound({"m": [0]}, {"m": [0]}))
    got = edit.after(call, Dense(call).output.float())
    want, _ = expected(call, [0], streams_of(call), edit)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


# ---- peers -----------------------------------------------------------------------------------------------------------------------


def twice(given):
    return {name: torch.cat([value, value]) if value.shape[0] == 2 else value for name, value in given.items()}


@pytest.mark.parametrize(
    ("kind", "processor", "joint"),
    [("sd3", PAGJointAttnProcessor2_0, "diagonal"), ("dit", PAGIdentitySelfAttnProcessor2_0, "replace")],
)
def test_a_whole_layer_is_what_the_pag_processor_of_diffusers_gives(kind, processor, joint):
    """Its batch is [plain, perturbed]: the mask of SD3's processor is the diagonal, a self-attention's is z := v."""
    model, given = (sd3() if kind == "sd3" else MODELS[kind]()), inputs(kind)
    scope = Scope(model)
    with torch.no_grad():
        plain = model(**given).sample
        results = {}
        for one in ("diagonal", "replace"):
            with scope.intervene(SoftPAG([(1, head) for head in range(4)], joint=one)):
                results[one] = model(**given).sample
        scope.model.get_submodule(scope.topology[1].name).set_processor(processor())
        theirs = model(**twice(given)).sample
    torch.testing.assert_close(theirs[:2], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs[2:], results[joint], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs[2:], plain, atol=1e-3)
    # the two meanings differ where there is text, and only there
    assert torch.allclose(results["diagonal"], results["replace"], atol=1e-6) == (kind == "dit")


# ---- the rest ---------------------------------------------------------------------------------------------------------------------


def test_steps_and_other_hosts(tiny_llama):
    model, given = MODELS["dit"](), inputs("dit")
    scope = Scope(model)
    with torch.no_grad():
        plain = model(**given).sample
        with scope.intervene(SoftPAG(H, steps=(1, 3))):
            same = [torch.equal(model(**given).sample, plain) for _ in range(4)]
    assert same == [True, False, False, True]
    text = Scope(tiny_llama)
    tokens = torch.arange(8)[None]
    with pytest.raises(InterventionError, match=r"no image tokens.*stream='all'"), text.intervene(SoftPAG([(0, 0)])):
        pytest.fail("entered")
    with torch.no_grad(), text.intervene(SoftPAG([(0, 0)], 0.5, stream="all")):
        soft = tiny_llama(tokens).logits
    with torch.no_grad(), text.intervene(Mix([(0, 0)], "identity", 0.5)):
        assert torch.equal(tiny_llama(tokens).logits, soft)


def test_a_call_that_does_not_say_what_is_text_is_refused():
    call = make_call(42, rows=6, causal=False)
    edit = replace(SoftPAG([(0, 0)]), _bound=Bound({"m": [0]}, {"m": [0]}))
    with pytest.raises(InterventionError, match=r"cannot be told.*stream='all'"):
        edit.after(call, Dense(call).output)


def test_computed_patterns_refuse_edited_scores_and_gradients():
    model, given = MODELS["sd3"](), inputs("sd3")
    scope = Scope(model)
    bias = SetBias([(0, 0)], "text", bias=-1.0)
    after = pytest.raises(InterventionError, match="after another edit of its weights")
    with torch.no_grad(), after, scope.intervene(bias, SoftPAG([(0, 0)], kind="temperature", tau=2.0)):
        model(**given)
    with torch.no_grad(), scope.intervene(bias, SoftPAG([(0, 0)], 0.5)):
        model(**given)
    with pytest.raises(InterventionError, match="autograd"), scope.intervene(SoftPAG([(0, 0)], joint="diagonal")):
        model(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pag"}, "kind"),
        ({"stream": "txt"}, "stream"),
        ({"joint": "mask"}, "joint"),
        ({"u": 1.5}, "share"),
        ({"u": math.nan}, "number"),
        ({"kind": "temperature"}, "positive tau"),
        ({"kind": "temperature", "tau": 0.0}, "positive tau"),
        ({"tau": 2.0}, "positive tau"),
        ({"sigma": 1.0}, "only queries are blurred"),
        ({"kind": "query_mean", "grid": (4, 4)}, r"\(height, width\)"),
        ({"kind": "uniform", "joint": "diagonal"}, "identity among image tokens"),
        ({"stream": "all", "joint": "diagonal"}, "identity among image tokens"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InterventionError, match=message):
        SoftPAG(H, **options)


def test_json_and_words():
    for options in settings():
        edit = SoftPAG(H, steps=(2, 8), **options)
        assert from_json(edit.to_json()) == edit
    edit = SoftPAG(H, 0.5, "query_mean", sigma=1.5, grid=(4, 8))
    assert from_json(edit.to_json()) == edit
    said = SoftPAG(H, 0.5, joint="diagonal", steps=(0, 4)).explain()
    assert all(part in said for part in ("image rows", "all text", "u = 0.5", "0.1, 1.0", "steps 0 to 3", "O(N |text| d)"))

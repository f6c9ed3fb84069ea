"""HeadMask's modes against models whose weights say the same thing, and against the dense matrix."""

from __future__ import annotations

import json

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import HeadMask, from_json, record_heads
from headscope.kernels.naive import naive_scores
from headscope.kernels.visible_mean import naive_visible_mean, visible_mean
from headscope.scope import Scope

from ..core.tiny_models import bert, gemma2, gpt2, gpt_oss, ids, llama, make, mistral, padding
from .edit_cases import Grab, calls

WIDTH = 8
LONG = ("causal", "one group", "left padding", "window", "two-sided window", "packed", "chunk", "bidirectional")
HEADS = [(0, 1), (1, 3), (1, 0)]


def logits(model, tokens, **kw):
    with torch.no_grad():
        out = model(tokens, **kw)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# ---- mean ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, gpt_oss])
def test_mean_is_a_constant_added_to_the_output_bias(build):
    """A head replaced by a constant c is a head whose W_O slice is zero, and W_O c in the bias of W_O."""
    model, twin, tokens = make(build), make(build), ids(2, 11)
    scope = Scope(model)
    mask = HeadMask.calibrated(scope, [ids(1, 9, seed=3), ids(1, 12, seed=4)], HEADS)
    with scope.intervene(mask):
        got = logits(model, tokens)
    with torch.no_grad():
        for (layer, head), mean in zip(HEADS, mask.reference.tensor, strict=True):
            out = twin.get_submodule(scope.topology[layer].output)
            span = slice(head * WIDTH, (head + 1) * WIDTH)
            transposed = type(out).__name__ == "Conv1D"
            matrix = out.weight[span].T if transposed else out.weight[:, span]
            add = matrix @ mean
            if out.bias is None:
                out.bias = torch.nn.Parameter(torch.zeros(len(add)))
            out.bias += add
            matrix.zero_()
    torch.testing.assert_close(got, logits(twin, tokens), rtol=1e-5, atol=1e-5)
    assert float((got - logits(model, tokens)).abs().max()) > 1e-2


def test_calibration_is_the_mean_over_all_positions_of_all_inputs():
    scope, data = Scope(make(llama)), [ids(1, 9, seed=3), ids(1, 12, seed=4)]
    pooled = HeadMask.calibrated(scope, data, HEADS).reference.tensor
    by_position = HeadMask.calibrated(scope, data, HEADS, per_position=True).reference.tensor
    rows = []
    for one in data:
        with record_heads(scope, HEADS, sites=("z",)) as record, torch.no_grad():
            scope.model(one)
        rows.append(record.stacked("z", HEADS)[0])
    torch.testing.assert_close(pooled, torch.cat(rows, 1).mean(1))
    assert by_position.shape == (3, 12, WIDTH)
    torch.testing.assert_close(by_position[:, 4], (rows[0][:, 4] + rows[1][:, 4]) / 2)
    torch.testing.assert_close(by_position[:, 11], rows[1][:, 11])


# ---- resample -----------------------------------------------------------------------------------------------------------------


def test_resample_takes_the_other_inputs_outputs():
    scope, tokens, other = Scope(make(llama)), ids(1, 11), ids(1, 11, seed=5)
    mask = HeadMask.resampled(scope, other, [(0, 1)])
    with record_heads(scope, sites=("z",)) as theirs, torch.no_grad():
        scope.model(other)
    with scope.intervene(mask), record_heads(scope, sites=("z",)) as changed, torch.no_grad():
        scope.model(tokens)
    with record_heads(scope, sites=("z",)) as plain, torch.no_grad():
        scope.model(tokens)
    assert torch.equal(changed.z(0)[:, :, 1], theirs.z(0)[:, :, 1])
    assert torch.equal(changed.z(0)[:, :, [0, 2, 3]], plain.z(0)[:, :, [0, 2, 3]])
    same = logits(scope.model, tokens)
    with scope.intervene(HeadMask.resampled(scope, tokens, "all")):
        assert torch.equal(logits(scope.model, tokens), same)


def test_a_longer_text_than_the_resampled_one_is_refused():
    scope = Scope(make(llama))
    mask = HeadMask.resampled(scope, ids(1, 6), [(0, 1)])
    with pytest.raises(InterventionError, match=r"position 10.*6 positions"), scope.intervene(mask):
        logits(scope.model, ids(1, 11))


# ---- uniform ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", calls(), ids=lambda case: case[0])
def test_visible_mean_equals_its_dense_twin(case):
    _, call = case
    got = visible_mean(call)
    seen = naive_scores(call)[1].any(-1, keepdim=True)
    want = naive_visible_mean(call)
    assert got.dtype == torch.float64
    torch.testing.assert_close(torch.where(seen, got, 0.0), torch.where(seen, want, 0.0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in calls(rows=300) if case[0] in LONG], ids=lambda case: case[0])
def test_running_sums_over_blocks_equal_the_dense_twin(case):
    """More rows than are summed at once: blocks of 64, the last one cut."""
    _, call = case
    seen = naive_scores(call)[1].any(-1, keepdim=True)
    want = torch.where(seen, naive_visible_mean(call), 0.0)
    torch.testing.assert_close(torch.where(seen, visible_mean(call), 0.0), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "impl"),
    [(llama, "sdpa"), (mistral, "sdpa"), (gemma2, "eager"), (gpt_oss, "eager"), (bert, "sdpa")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_uniform_is_the_mean_of_the_visible_values(build, impl, pad):
    """Against the dense mean of what the module's call may see."""
    model, tokens, mask = make(build, impl), ids(2, 14), padding(pad, 2, 14)
    exact = build is not gpt_oss  # its experts multiply in float32 at most
    model = model.double() if exact else model
    scope = Scope(model)
    kept = []
    with scope.intervene(Grab(kept)):
        logits(model, tokens, attention_mask=mask)
    call = next(one for one in kept if one.layer == 0)
    want = naive_visible_mean(call)[:, 1]
    with scope.intervene(HeadMask([(0, 1)], "uniform")), record_heads(scope, sites=("z",)) as record:
        logits(model, tokens, attention_mask=mask)
    real = torch.ones(2, 14, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(record.z(0)[:, :, 1][real].double(), want[real], rtol=0, atol=1e-10 if exact else 1e-5)


@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", ["uniform", "noise"])
def test_decoding_with_a_cache_equals_reading_the_whole_text(build, cache, mode):
    model, tokens, mask = make(build).double(), ids(2, 9), padding("left", 2, 9)
    scope, edit = Scope(model), HeadMask(HEADS, mode, seed=4)
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, cache_implementation=cache)
    whole = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], 1)
    positions = (whole.cumsum(1) - 1).clamp_min(0)
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as once:
        logits(model, out.ids[:, :-1], attention_mask=whole, position_ids=positions)
    for layer in (0, 1):
        torch.testing.assert_close(steps.z(layer)[whole.bool()], once.z(layer)[whole.bool()], rtol=1e-9, atol=1e-9)


# ---- noise --------------------------------------------------------------------------------------------------------------------


def test_noise_has_the_heads_length_and_follows_the_seed():
    scope, tokens = Scope(make(llama)), ids(1, 60)
    with record_heads(scope, sites=("z",)) as plain, torch.no_grad():
        scope.model(tokens)
    seen = {}
    for seed in (0, 0, 1):
        with scope.intervene(HeadMask([(0, 1), (0, 2)], "noise", seed=seed)), record_heads(scope, sites=("z",)) as record:
            logits(scope.model, tokens)
        z = record.z(0)
        assert torch.equal(seen.setdefault(seed, z), z)
        torch.testing.assert_close(z.norm(dim=-1), plain.z(0).norm(dim=-1))
    a, b = seen[0][0, :, 1], seen[1][0, :, 1]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    assert abs(float(cosine.mean())) < 0.2
    assert abs(float(torch.nn.functional.cosine_similarity(seen[0][0, :, 1], seen[0][0, :, 2], dim=-1).mean())) < 0.2


def test_noise_is_standard_normal():
    from headscope.interventions.noise import position_noise

    _, call = next(iter(calls(rows=400)))
    x = position_noise(call, 3, [0, 1, 2], 64, torch.float64).flatten()
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert abs(float((x**4).mean()) - 3) < 0.15


# ---- where --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"positions": slice(2, 5)}, {2, 3, 4}),
        ({"positions": [0, 7]}, {0, 7}),
        ({"positions": "last_prompt"}, {8}),
        ({"phase": "prefill"}, set(range(9))),
        ({"phase": "decode"}, {9, 10, 11}),
        ({"positions": torch.arange(12) % 2 == 0}, {0, 2, 4, 6, 8, 10}),
        ({"phase": "decode", "positions": slice(10, None)}, {10, 11}),
    ],
    ids=str,
)
def test_phases_and_positions(options, expected):
    scope, tokens = Scope(make(llama)), ids(1, 9)
    with scope.intervene(HeadMask([(1, 2)], **options)), record_heads(scope, sites=("z",)) as record:
        scope.generate(tokens, max_new_tokens=4, min_new_tokens=4)
    z = record.z(1)
    assert {t for t in range(z.shape[1]) if not z[0, t, 2].any()} == expected
    assert z[:, :, [0, 1, 3]].any(-1).all()


def test_last_prompt_is_the_last_real_token_of_each_sequence():
    scope, tokens, mask = Scope(make(llama)), ids(2, 11), padding("right", 2, 11)
    with scope.intervene(HeadMask([(0, 0)], positions="last_prompt")), record_heads(scope, sites=("z",)) as record:
        logits(scope.model, tokens, attention_mask=mask)
    zero = ~record.z(0)[:, :, 0].any(-1)
    assert zero[0].nonzero().flatten().tolist() == [10]
    assert zero[1].nonzero().flatten().tolist() == [5]


def test_layers_narrow_all_heads():
    scope, tokens = Scope(make(llama)), ids(1, 9)
    with scope.intervene(HeadMask("all", layers=(1, 2))), record_heads(scope, sites=("z",)) as record:
        logits(scope.model, tokens)
    assert not record.z(1).any()
    assert record.z(0).any()


# ---- JSON, errors -------------------------------------------------------------------------------------------------------------


def test_json_keeps_tensors_in_a_file_by_content(tmp_path):
    scope = Scope(make(llama))
    mask = HeadMask.calibrated(scope, ids(1, 9), HEADS, positions=slice(1, None), phase="prefill")
    with pytest.raises(InterventionError, match="tensors"):
        mask.to_json()
    text = mask.to_json(tensors=tmp_path / "mask.safetensors")
    back = from_json(text, tmp_path)
    assert back == mask
    assert json.loads(text)["positions"] == {"slice": [1, None, None]}
    other = HeadMask.calibrated(scope, ids(1, 9, seed=9), HEADS)
    other.to_json(tensors=tmp_path / "mask.safetensors")
    with pytest.raises(InterventionError, match="not the tensor"):
        from_json(text, tmp_path)
    with pytest.raises(InterventionError, match="no such file"):
        from_json(text, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "mean"}, "calibrated"),
        ({"mode": "resample"}, "resampled"),
        ({"mode": "zero", "reference": torch.zeros(1, 8)}, "uses none"),
        ({"phase": "decoding"}, "did you mean decode"),
        ({"positions": "last"}, "last_prompt"),
        ({"positions": slice(-1, None)}, "last_prompt"),
        ({"positions": []}, "positions"),
        ({"layers": (2, 1)}, "layers"),
        ({"seed": 1.5}, "seed"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(options, words):
    with pytest.raises(InterventionError, match=words):
        HeadMask([(0, 0)], **options)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (HeadMask([(0, 0)], "mean", torch.zeros(2, 8)), "one value per head"),
        (HeadMask([(0, 0)], "mean", torch.zeros(1, 9)), "width 8"),
        (HeadMask([(0, 0)], positions="image"), "image tokens"),
        (HeadMask([(0, 0)], layers=(1, 2)), "none of the heads"),
        (HeadMask([(0, 0)], steps=(0, 3)), "no diffusion model"),
    ],
    ids=str,
)
def test_masks_that_do_not_fit_the_model(mask, words):
    with pytest.raises(InterventionError, match=words), Scope(make(llama)).intervene(mask):
        pytest.fail("the block was entered")


def test_decoding_phase_of_an_encoder():
    with pytest.raises(InterventionError, match="token by token"), Scope(make(bert)).intervene(HeadMask([(0, 0)], phase="decode")):
        pytest.fail("the block was entered")

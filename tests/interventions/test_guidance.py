"""guided: against two runs of the model combined by hand, against diffusers' PAG pipeline, and what it leaves behind."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)

from headscope.errors import InterventionError
from headscope.interventions import HeadMask, SoftPAG, guided
from headscope.scope import Scope

from ..core.diffusion_models import MODELS, NO_TEXT_ENCODERS, flux, inputs, noise, prompts, quiet, sd3, spread, vae

H = [(0, 1), (1, 0)]


def hooks(model):
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for name, m in model.named_modules()]


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_bare_transformer(kind):
    model, given = MODELS[kind](), inputs(kind)
    scope = Scope(model)
    before = hooks(model)
    with torch.no_grad():
        plain = model(**given).sample
        with scope.intervene(SoftPAG(H)):
            spoilt = model(**given).sample
        with guided(scope, SoftPAG(H), w=2.5) as report:
            got = model(**given).sample
            (as_tuple,) = model(**given, return_dict=False)
        torch.testing.assert_close(got, (1 + 2.5) * plain - 2.5 * spoilt, rtol=1e-5, atol=1e-5)
        assert torch.equal(got, plain + 2.5 * (plain - spoilt))
        assert torch.equal(got, as_tuple)
        assert (report.steps, report.perturbed) == (2, 2)
        with guided(scope, SoftPAG(H, 0.0), w=2.5) as report:
            assert torch.equal(model(**given).sample, plain)
        assert report.perturbed == 1
        with guided(scope, SoftPAG(H), w=0) as report:
            assert torch.equal(model(**given).sample, plain)
        assert (report.steps, report.perturbed) == (1, 0)
        assert torch.equal(model(**given).sample, plain)
    assert hooks(model) == before


def test_windows_count_denoising_steps():
    """Two passes per step are one step; a perturbation may have a window of its own; two perturbations act together."""
    model, given = MODELS["dit"](), inputs("dit")
    scope = Scope(model)
    one, two = SoftPAG([(0, 1)], steps=(0, 3)), HeadMask([(1, 0)], steps=(2, 6))
    with torch.no_grad():
        plain = model(**given).sample

        def by_hand(*edits):
            with scope.intervene(*edits):
                return plain + 3.0 * (plain - model(**given).sample)

        first, second = SoftPAG([(0, 1)]), HeadMask([(1, 0)])
        want = [plain, by_hand(first), by_hand(first, second), by_hand(second), plain]
        with guided(scope, one, two, steps=(1, 4)) as report:
            got = [model(**given).sample for _ in want]
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * 5
    assert (report.steps, report.perturbed) == (5, 3)


def test_variances_are_not_guided():
    model = spread(
        DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10,
        )
    )  # fmt: skip
    scope, given = Scope(model), inputs("dit")
    with torch.no_grad():
        plain = model(**given).sample
        with guided(scope, SoftPAG(H)):
            got = model(**given).sample
    assert torch.equal(got[:, 4:], plain[:, 4:])
    assert not torch.allclose(got[:, :4], plain[:, :4], atol=1e-3)


def test_the_conditional_difference_goes_to_every_branch():
    model, given = MODELS["sd3"](), inputs("sd3", batch=4)
    scope = Scope(model)
    scope.host.guidance = ("uncond", "cond")
    with torch.no_grad():
        plain = model(**given).sample
        with scope.intervene(SoftPAG(H)):
            more = 3.0 * (plain - model(**given).sample)
        with guided(scope, SoftPAG(H), branch="cond"):
            got = model(**given).sample
        torch.testing.assert_close(got, plain + torch.cat([more[2:], more[2:]]), rtol=0, atol=0)
        with pytest.raises(InterventionError, match=r"runs uncond, cond here, and no such branch"), guided(scope, SoftPAG(H), branch="x"):
            model(**given)
        scope.host.guidance = None
        with pytest.raises(InterventionError, match=r"scope\.host\.guidance"), guided(scope, SoftPAG(H), branch="cond"):
            model(**given)


# ---- pipelines --------------------------------------------------------------------------------------------------------------------


def sd3_call(**more):
    call = {**prompts(20), "num_inference_steps": 3, "output_type": "latent", "height": 8, "width": 8, "latents": noise(1, 4, 8, 8, seed=5)}
    return {**call, **more}


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_an_sd3_pipeline_is_the_pag_pipeline_of_diffusers(guidance_scale):
    """uncond + g (cond - uncond) + s (cond - perturbed), the mask of its processor, layer 1; without text guidance, too."""
    parts = {"vae": vae(), **NO_TEXT_ENCODERS}
    theirs = quiet(
        StableDiffusion3PAGPipeline(transformer=sd3(), scheduler=FlowMatchEulerDiscreteScheduler(), pag_applied_layers="blocks.1", **parts)
    )
    want = theirs(**sd3_call(guidance_scale=guidance_scale, pag_scale=2.0)).images
    pipe = quiet(StableDiffusion3Pipeline(transformer=sd3(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts))
    scope = Scope(pipe)
    plain = pipe(**sd3_call(guidance_scale=guidance_scale)).images
    with guided(scope, SoftPAG([(1, head) for head in range(4)], joint="diagonal"), w=2.0, branch="cond") as report:
        got = pipe(**sd3_call(guidance_scale=guidance_scale)).images
    assert (report.steps, report.perturbed) == (3, 3)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert float((got - plain).abs().max()) > 0.05 * float(plain.abs().max())
    assert torch.equal(pipe(**sd3_call(guidance_scale=guidance_scale)).images, plain)


def test_flux_whose_branches_run_one_after_the_other():
    """The unconditional pass gets the difference of the conditional one before it, and is not run twice."""
    model = flux()
    pipe = quiet(
        FluxPipeline(
            transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None,
        )
    )  # fmt: skip
    call = {**prompts(20), "true_cfg_scale": 2.0, "num_inference_steps": 2, "output_type": "latent", "height": 8, "width": 8}
    scope, passes = Scope(pipe), []
    with guided(scope, SoftPAG([(0, 0)]), w=2.0, branch="cond", steps=(0, 1)) as report:
        handle = model.register_forward_hook(lambda m, a, o: passes.append(o[0].clone()))
        pipe(**call, generator=torch.Generator().manual_seed(0))
        handle.remove()
    plain = []
    handle = model.register_forward_hook(lambda m, a, o: plain.append(o[0].clone()))
    pipe(**call, generator=torch.Generator().manual_seed(0))
    handle.remove()
    assert (report.steps, report.perturbed) == (2, 1)
    # passes: the perturbed one ends first, then the guided conditional and the guided unconditional one of step 0, then step 1
    spoilt, cond, uncond = passes[0], passes[1], passes[2]
    assert len(passes) == 5
    torch.testing.assert_close(cond, plain[0] + 2.0 * (plain[0] - spoilt))
    torch.testing.assert_close(uncond - plain[1], cond - plain[0], rtol=1e-4, atol=1e-5)


# ---- beside other things ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False])
def test_an_observer_sees_both_passes(outside):
    model, given = MODELS["dit"](), inputs("dit")
    scope = Scope(model)
    plain = scope.capture(given, statistics=["entropy"])
    with scope.intervene(SoftPAG([(0, 1)])):
        spoilt = scope.capture(given, statistics=["entropy"])
    blocks = [scope.observe(["entropy"]), guided(scope, SoftPAG([(0, 1)]))]
    with torch.no_grad(), blocks[0 if outside else 1] as one, blocks[1 if outside else 0] as two:
        model(**given)
    stats = one if outside else two
    assert len(stats.passes) == 2
    for got, want in zip(stats.passes, (plain, spoilt), strict=True):
        assert torch.equal(got["entropy"][1], want["entropy"][1])


def test_an_exception_in_the_middle_leaves_nothing():
    model, given = MODELS["sd3"](), inputs("sd3")
    scope, before = Scope(model), hooks(MODELS["sd3"]())
    with torch.no_grad():
        plain = model(**given).sample

    def trip(module, args, output):
        if len(ran) == 3:
            raise RuntimeError("tripped")
        ran.append(1)

    def steps():
        for _ in range(3):
            model(**given)

    ran = []
    handle = model.transformer_blocks[1].register_forward_hook(trip)
    with pytest.raises(RuntimeError, match="tripped"), torch.no_grad(), guided(scope, SoftPAG(H)):
        steps()
    handle.remove()
    assert hooks(model) == before
    with torch.no_grad():
        assert torch.equal(model(**given).sample, plain)
        with guided(scope, SoftPAG(H)):  # and it can be guided again
            assert not torch.equal(model(**given).sample, plain)


def test_another_thread_is_left_alone():
    model, given = MODELS["dit"](), inputs("dit")
    scope, found = Scope(model), []
    with torch.no_grad():
        plain = model(**given).sample

    def run():
        with torch.no_grad():
            found.append(model(**given).sample)

    with torch.no_grad(), guided(scope, SoftPAG(H)) as report:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not torch.equal(model(**given).sample, plain)
    assert torch.equal(found[0], plain)
    assert report.steps == 1


def test_refusals(tiny_llama):
    scope = Scope(MODELS["dit"]())
    for arguments, options, message in (
        ((), {}, "nothing to run away from"),
        ((HeadMask(H), "x"), {}, "not an intervention"),
        ((SoftPAG(H),), {"w": math.nan}, "no finite number"),
        ((SoftPAG(H),), {"steps": (3, 1)}, "0 <= first < end"),
        ((SoftPAG(H),), {"branch": ("cond",)}, "one branch's name"),
        ((SoftPAG([(9, 0)]),), {}, "9"),
        ((SoftPAG(H, branches="cond"),), {}, r"branch='cond'"),
    ):
        with pytest.raises(InterventionError, match=message), guided(scope, *arguments, **options):
            pytest.fail("entered")
    with pytest.raises(InterventionError, match="no diffusion model"), guided(Scope(tiny_llama), HeadMask([(0, 0)])):
        pytest.fail("entered")
    with pytest.raises(InterventionError, match="guided inside of guided"), guided(scope, SoftPAG(H)), guided(scope, SoftPAG(H)):
        pytest.fail("entered")

"""diffusers pipelines and edits: steps and guidance branches, masked heads, what is left behind, and what is refused."""

from __future__ import annotations

import gc
import threading
import weakref

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.nn.functional import scaled_dot_product_attention

from headscope.errors import CaptureError, DataError, StatisticError
from headscope.interventions import HeadMask
from headscope.scope import Scope
from headscope.statistics.steps import StepStatistics

from .diffusion_models import MODELS, NO_TEXT_ENCODERS, dit, flux, inputs, noise, prompts, quiet, sd3, vae

# ---- steps and branches --------------------------------------------------------------------------------------------------------


def test_a_guided_sd3_pipeline_step_by_step():
    model = sd3()
    pipe = quiet(StableDiffusion3Pipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), **NO_TEXT_ENCODERS))
    call = {**prompts(20), "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "height": 8, "width": 8}
    call["latents"] = noise(1, 4, 8, 8, seed=5)
    ran = []
    handle = model.register_forward_pre_hook(lambda m, a, k: ran.append({n: k[n] for n in k if n != "return_dict"}), with_kwargs=True)
    plain = pipe(**call).images
    handle.remove()
    scope = Scope(pipe)
    with scope.observe() as stats:
        images = scope.host.given(**call).images
    assert torch.equal(images, plain)
    assert isinstance(stats, StepStatistics)
    assert stats.timesteps == [float(one["timestep"][0]) for one in ran]
    assert [step.branches for step in stats.steps] == [("uncond", "cond")] * 3
    with pytest.raises(StatisticError, match="3 sequences"):
        stats["entropy"]
    # each step, and each branch, is what the bare transformer gives for those inputs alone
    alone = [Scope(model).capture({k: v for k, v in one.items() if v is not None}) for one in ran]
    for step, single in zip(stats.passes, alone, strict=True):
        assert torch.equal(step["entropy"][1], single["entropy"][1])
    stacked = torch.stack([single["entropy"][1] for single in alone])
    assert torch.equal(stats.by_step("entropy")[1], stacked)
    torch.testing.assert_close(stats.over_steps("entropy")[1], stacked.mean(0))
    cond, uncond = stats.branch("cond"), stats.branch("uncond")
    assert torch.equal(cond.by_step("class_mass")[0], stats.by_step("class_mass")[0][:, 1:])
    assert torch.equal(uncond.by_step("class_mass")[0], stats.by_step("class_mass")[0][:, :1])
    assert not torch.equal(cond.mean("class_mass"), uncond.mean("class_mass"))
    torch.testing.assert_close(stats.mean("entropy")[1], stacked.double().mean((0, 1, 3)))
    torch.testing.assert_close((cond.mean("entropy") + uncond.mean("entropy")) / 2, stats.mean("entropy"))
    with pytest.raises(StatisticError, match=r"'other'.*uncond, cond"):
        stats.branch("other")


def test_flux_runs_its_branches_one_after_the_other():
    model = flux()
    pipe = quiet(
        FluxPipeline(
            transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None,
        )
    )  # fmt: skip
    call = {**prompts(20), "true_cfg_scale": 2.0, "num_inference_steps": 2, "output_type": "latent", "height": 8, "width": 8}
    stats = Scope(pipe).capture(call)
    assert [step.branches for step in stats.steps] == [("cond",), ("uncond",)] * 2
    assert [step.forward for step in stats.steps] == [0, 1, 2, 3]
    assert len(stats.branch("cond").passes) == 2
    assert "cache_context" not in vars(model)


def test_dit_puts_the_conditional_half_first():
    """The null class says which half is which, whatever order a pipeline has."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    pipe = quiet(DiTPipeline(transformer=model, vae=vae(), scheduler=DDIMScheduler()))
    stats = Scope(pipe).capture({"class_labels": [3, 4], "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"})
    assert [step.branches for step in stats.steps] == [("cond", "cond", "uncond", "uncond")] * 2


def test_a_bare_model_does_not_guess_its_branches():
    scope = Scope(sd3())
    stats = scope.capture(inputs("sd3"))
    assert stats.steps[0].branches is None
    with pytest.raises(StatisticError, match=r"none.*scope\.host\.guidance"):
        stats.branch("cond")
    scope.host.guidance = ("uncond", "cond")
    assert scope.capture(inputs("sd3")).branches == ["uncond", "cond"]
    with pytest.raises(CaptureError, match="batch of 3"):
        scope.capture(inputs("sd3", batch=3))


# ---- interventions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layer"), [("sd3", 0), ("flux", 2), ("dit", 1)])
def test_a_masked_head_is_a_zeroed_slice_of_the_output_projection(kind, layer):
    model, given = MODELS[kind](), inputs(kind)
    scope = Scope(model)
    record = scope.topology[layer]
    with torch.no_grad(), scope.intervene(HeadMask(heads=[(layer, 1)])):
        masked = model(**given).sample
    attn = model.get_submodule(record.name)
    width = record.head_dim
    with torch.no_grad():
        plain = model(**given).sample
        if record.output is None or kind == "flux":  # a single block's W_O is the block's proj_out, attention first
            attn.to_v.weight[width : 2 * width] = 0
            attn.to_v.bias[width : 2 * width] = 0
        else:
            for linear in (attn.to_out[0], getattr(attn, "to_add_out", None)):
                if linear is not None:
                    linear.weight[:, width : 2 * width] = 0
        expected = model(**given).sample
    assert not torch.allclose(masked, plain, atol=1e-4)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-4)


# ---- guards --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_after_an_exception_everything_is_as_before(kind):
    model, given = MODELS[kind](), inputs(kind)
    backends = dict(_AttentionBackendRegistry._backends)
    scope = Scope(model)

    def fail(*_):
        raise RuntimeError("in the middle")

    def interrupt(*_):
        raise KeyboardInterrupt

    for what, error in ((fail, RuntimeError), (interrupt, KeyboardInterrupt)):
        handle = scope._attachment.module_of(scope.topology[1]).register_forward_pre_hook(what)
        with pytest.raises(error), scope.observe():
            model(**given)
        handle.remove()
        assert _AttentionBackendRegistry._backends == backends
        assert not torch.overrides._get_current_function_mode_stack()
    assert len(scope.capture(given).passes) == 1


def test_nested_and_two_models_and_threads():
    one, two = sd3(), flux()
    first, second = Scope(one), Scope(two)
    with torch.no_grad(), first.observe("entropy") as outer, second.observe("entropy") as other, first.observe("lse") as inner:
        one(**inputs("sd3"))
        two(**inputs("flux"))
    assert len(outer.passes) == len(inner.passes) == len(other.passes) == 1
    assert torch.equal(outer["entropy"][0], first.capture(inputs("sd3"), statistics="entropy")["entropy"][0])
    found, started = {}, threading.Barrier(2)

    def run(name, scope, kind):
        with torch.no_grad(), scope.observe("entropy") as stats:
            started.wait()
            scope.model(**inputs(kind))
        found[name] = stats

    threads = [threading.Thread(target=run, args=pair) for pair in (("a", first, "sd3"), ("b", first, "sd3"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["a"]["entropy"][2], found["b"]["entropy"][2])
    with first.observe() as unseen:
        thread = threading.Thread(target=lambda: one(**inputs("sd3")))
        thread.start()
        thread.join()
    assert not unseen.passes
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_captured_model_can_be_collected():
    model = flux()
    stats = Scope(model).capture(inputs("flux"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert stats.layers == [0, 1, 2]


# ---- refusals ------------------------------------------------------------------------------------------------------------------


def test_objects_without_a_transformer_are_refused():
    with pytest.raises(CaptureError, match=r"diffusers\.FlowMatchEulerDiscreteScheduler.*neither"):
        Scope(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(CaptureError, match="no attention modules"):
        Scope(diffusers.UNet1DModel(block_out_channels=(8, 16, 16), sample_size=32))


def test_text_is_refused_where_there_is_no_tokenizer_to_read_it():
    scope = Scope(dit())
    with pytest.raises(DataError, match="does not read token ids"):
        scope.capture("a cat")
    with pytest.raises(DataError, match="a int"):
        scope.capture(5)
    with pytest.raises(DataError, match="generate="):
        scope.capture(inputs("dit"), generate=3)
    with pytest.raises(CaptureError, match="cannot generate"):
        scope.generate("a cat")


def test_a_processor_that_never_reaches_the_seam_is_named():
    class Own:
        def __call__(self, attn, hidden_states, **kwargs):
            q, k, v = (linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v))
            return attn.to_out[0]((q @ k.transpose(-1, -2)).softmax(-1) @ v)

    model = dit()
    late = Scope(model)
    model.transformer_blocks[1].attn1.set_processor(Own())
    with pytest.raises(CaptureError, match=r"transformer_blocks\.1\.attn1 \(Own\).*neither scaled_dot_product_attention nor"):
        late.capture(inputs("dit"))
    scope = Scope(model)
    assert "Own" in scope.topology[1].capturable
    assert scope.capture(inputs("dit")).layers == [0]


def test_a_processor_that_attends_twice_is_refused():
    class Twice:
        def __call__(self, attn, hidden_states, **kwargs):
            states = (linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v))
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in states)
            out = scaled_dot_product_attention(q, k, v) + scaled_dot_product_attention(q, v, k)
            return attn.to_out[0](out.transpose(1, 2).flatten(2))

    model = dit()
    model.transformer_blocks[0].attn1.set_processor(Twice())
    with pytest.raises(CaptureError, match=r"transformer_blocks\.0\.attn1.*2 times"):
        Scope(model).capture(inputs("dit"))

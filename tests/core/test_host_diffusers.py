"""diffusers: SD3, Flux and DiT against attention written out from their weights; steps, guidance branches, token labels; nothing changed.

The oracle takes the inputs of each attention module from a plain run (no headscope) and computes q, k, v, norms, rotation, softmax and
output by hand in float64. Its output must be the module's own, so that a wrong oracle is found out too.
"""

from __future__ import annotations

import gc
import threading
import weakref

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.nn.functional import scaled_dot_product_attention

from headscope.errors import CaptureError, DataError, StatisticError
from headscope.interventions import HeadMask
from headscope.scope import Scope
from headscope.statistics.steps import StepStatistics

from .tiny_models import compare, dense

IMAGE, TEXT, WORDS = 16, 7, 7
NO_TEXT_ENCODERS = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}


def spread(model):
    """Fixed weights that make attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 or name.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model.eval()


def sd3(**kw):
    return spread(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8, **kw,
        )
    )  # fmt: skip


def flux():
    return spread(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=20, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def dit():
    return spread(
        DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10,
        )
    )  # fmt: skip


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(kind, batch=2):
    if kind == "dit":
        return {"hidden_states": noise(batch, 4, 8, 8), "timestep": torch.full((batch,), 5), "class_labels": torch.arange(batch)}
    common = {"encoder_hidden_states": noise(batch, WORDS, 20, seed=1), "pooled_projections": noise(batch, 16, seed=2)}
    if kind == "sd3":
        return {"hidden_states": noise(batch, 4, 8, 8), "timestep": torch.full((batch,), 500.0), **common}
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1).float()
    given = {"hidden_states": noise(batch, IMAGE, 16), "timestep": torch.full((batch,), 0.5), **common}
    return {**given, "img_ids": places, "txt_ids": torch.zeros(WORDS, 3)}


MODELS = {"sd3": lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"), "flux": flux, "dit": dit}


# ---- the oracle ---------------------------------------------------------------------------------------------------------


def recorded(model, given):
    """Inputs and outputs of every attention module in a plain run: name -> ((args, kwargs), output)."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(("attn", "attn1", "attn2")):
            handles.append(module.register_forward_hook(lambda m, a, k, o, name=name: seen.update({name: (a, k, o)}), with_kwargs=True))
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return seen


def project(linear, x):
    return x @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())


def rms(norm, x):
    return x if norm is None else x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def rotated(x, cos, sin):
    """Flux's rotation [B, H, N, D]: neighbouring numbers are a pair."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return x * cos.double() + turned * sin.double()


def explicit(attn, args, kwargs, text_first):
    """(A [B, H, N, N], outputs of the image stream) of one attention module, from its inputs and weights."""
    hidden = kwargs.get("hidden_states", args[0] if args else None).double()
    text = kwargs.get("encoder_hidden_states")
    heads = attn.heads

    def heads_of(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = (heads_of(project(linear, hidden)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    q, k = rms(getattr(attn, "norm_q", None), q), rms(getattr(attn, "norm_k", None), k)
    if text is not None:
        text = text.double()
        tq, tk, tv = (heads_of(project(linear, text)) for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        tq, tk = rms(attn.norm_added_q, tq), rms(attn.norm_added_k, tk)
        pairs = ((tq, q), (tk, k), (tv, v)) if text_first else ((q, tq), (k, tk), (v, tv))
        q, k, v = (torch.cat(pair, 2) for pair in pairs)
    rotary = kwargs.get("image_rotary_emb")
    if rotary is not None:
        q, k = rotated(q, *rotary), rotated(k, *rotary)
    a = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    out = (a @ v).transpose(1, 2).flatten(2)
    if text is not None:
        out = out[:, text.shape[1] :] if text_first else out[:, : hidden.shape[1]]
    return a, out if getattr(attn, "to_out", None) is None else project(attn.to_out[0], out)


@pytest.mark.parametrize("kind", ["sd3", "flux", "dit"])
def test_statistics_equal_explicit_attention(kind):
    model, given = MODELS[kind](), inputs(kind)
    seen = recorded(model, given)
    scope = Scope(model)
    stats = scope.capture(given, statistics=["passive", "class_mass", "diagonal_sum"], block=16)
    assert len(seen) == len(scope.topology.modules) == len(stats.layers)
    for layer in stats.layers:
        record = scope.topology[layer]
        args, kwargs, output = seen[record.name]
        a, out = explicit(model.get_submodule(record.name), args, kwargs, text_first=kind == "flux")
        theirs = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(out.float(), theirs, atol=1e-4, rtol=1e-4)
        n = a.shape[-1]
        compare(stats, layer, dense(a, causal=False, block=16))
        words = {"sd3": slice(IMAGE, n), "flux": slice(0, TEXT), "dit": slice(0, 0)}[kind]
        if n == IMAGE:
            words = slice(0, 0)
        mass = a[..., words].sum(-1)
        torch.testing.assert_close(stats["class_mass"][layer][..., 1].double(), mass, atol=1e-5, rtol=0)
        torch.testing.assert_close(stats["class_mass"][layer][..., 0].double(), 1 - mass, atol=1e-5, rtol=0)
        apart = torch.stack([torch.diagonal(a, d, -2, -1).sum(-1) for d in range(n - 1, -n, -1)], -1)
        torch.testing.assert_close(stats["diagonal_sum"][layer].double(), apart, atol=1e-5, rtol=0)
    assert stats.request.label_names == ("image", "text")


@pytest.mark.parametrize("kind", ["sd3", "flux", "dit"])
def test_outputs_are_the_same_to_the_bit_and_nothing_stays(kind):
    model, given = MODELS[kind](), inputs(kind)
    backends = dict(_AttentionBackendRegistry._backends)
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    keys = [set(vars(m)) for m in model.modules()]
    with torch.no_grad():
        before = model(**given).sample
        with Scope(model).observe() as stats:
            during = model(**given).sample
        after = model(**given).sample
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert len(stats.passes) == 1
    assert _AttentionBackendRegistry._backends == backends
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == keys


def test_layers_are_blocks_and_a_second_attention_has_a_name():
    topology = Scope(MODELS["sd3"]()).topology
    assert [record.name for record in topology.main] == [f"transformer_blocks.{i}.attn" for i in range(3)]
    assert topology["transformer_blocks.1.attn2"].layer is None
    assert topology[0].output == "transformer_blocks.0.attn.to_out.0"
    assert not any(record.causal for record in topology.modules)
    flux_names = [record.name for record in Scope(flux()).topology.main]
    assert flux_names == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]


def test_class_mass_is_measured_by_default_where_there_is_text():
    assert "class_mass" in Scope(sd3()).capture(inputs("sd3")).names
    assert "class_mass" in Scope(flux()).capture(inputs("flux")).names
    assert "class_mass" not in Scope(dit()).capture(inputs("dit")).names
    own = Scope(sd3()).capture(inputs("sd3"), statistics="class_mass", labels=torch.arange(IMAGE + TEXT) % 2, label_names=("even", "odd"))
    assert own.request.label_names == ("even", "odd")


def test_text_masks_do_not_depend_on_how_many_tokens_there_are():
    """As many words as image tokens: lengths say nothing about the order, values do."""
    given = {**inputs("sd3"), "encoder_hidden_states": noise(2, IMAGE, 20, seed=3)}
    model = sd3()
    a, _ = explicit(model.transformer_blocks[0].attn, *recorded(model, given)["transformer_blocks.0.attn"][:2], text_first=False)
    stats = Scope(model).capture(given, statistics="class_mass")
    torch.testing.assert_close(stats["class_mass"][0][..., 1].double(), a[..., IMAGE:].sum(-1), atol=1e-5, rtol=0)


# ---- other backends and dtypes -----------------------------------------------------------------------------------------------


def test_the_backend_that_the_user_chose_is_the_one_that_runs():
    model, given = flux(), inputs("flux")
    plain = Scope(model).capture(given)
    called = []
    original = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(query, key, value, **kwargs):  # no scaled_dot_product_attention inside: only the registry is left to see it
        called.append(query.shape)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)

    _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH] = counted
    try:
        model.set_attention_backend("_native_math")
        stats = Scope(model).capture(given)
    finally:
        _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH] = original
        _AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE
    assert len(called) == 3
    assert stats.kernels == {"_native_math"}
    torch.testing.assert_close(stats["entropy"][2], plain["entropy"][2], atol=1e-5, rtol=0)


def test_bfloat16():
    model, given = sd3().to(torch.bfloat16), inputs("sd3")
    low = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    scope = Scope(model)
    stats = scope.capture(low, keep=(0,))
    assert stats["entropy"][0].dtype == torch.float32
    q, k = stats._kept["transformer_blocks.0.attn"].calls[0].q.double(), stats._kept["transformer_blocks.0.attn"].pieces[0].double()
    a = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    compare(stats, 0, {"row_max": a.amax(-1), "column_sum": a.sum(2)})
    assert stats._kept["transformer_blocks.0.attn"].calls[0].q.dtype == torch.bfloat16
    assert [record.name for record in scope.topology.main] == [f"transformer_blocks.{i}.attn" for i in range(3)]


# ---- steps and branches --------------------------------------------------------------------------------------------------------


def vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,), norm_num_groups=4,
        latent_channels=4, sample_size=8, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(width):
    return {
        "prompt_embeds": noise(1, 5, width, seed=1), "pooled_prompt_embeds": noise(1, 16, seed=2),
        "negative_prompt_embeds": noise(1, 5, width, seed=3), "negative_pooled_prompt_embeds": noise(1, 16, seed=4),
    }  # fmt: skip


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


def test_a_unet_with_cross_attention():
    model = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    given = {"sample": noise(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": noise(1, 16, 16, seed=1)}
    scope = Scope(model)
    seen = recorded(model, given)
    stats = scope.capture(given)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert scope.topology[name].kind == "cross"
    args, kwargs, _ = seen[name]
    attn = model.get_submodule(name)
    q = project(attn.to_q, args[0].double()).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    k = project(attn.to_k, kwargs["encoder_hidden_states"].double()).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    a = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(stats["row_max"][name].double(), a.amax(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(stats["column_sum"][name].double(), a.sum(2), atol=1e-5, rtol=0)
    with pytest.raises(StatisticError):
        stats["distance"][name]

"""diffusers: SD3, Flux and DiT against attention written out from their weights; token labels, backends, dtypes; nothing changed.

The oracle takes the inputs of each attention module from a plain run (no headscope) and computes q, k, v, norms, rotation, softmax and
output by hand in float64. Its output must be the module's own, so that a wrong oracle is found out too.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    UNet2DConditionModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from headscope.errors import StatisticError
from headscope.scope import Scope

from .diffusion_models import IMAGE, MODELS, TEXT, dit, flux, inputs, noise, sd3
from .tiny_models import compare, dense

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

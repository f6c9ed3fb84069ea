"""Weights of heads: recombined with the captured attention they must give the module's own output, and q k its scores."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from headscope.circuits import head_weights
from headscope.errors import CaptureError
from headscope.scope import Scope

from .tiny_models import BASE, bert, dinov2, gpt2, ids, llama, make, phi3, qwen3, t5


def gpt_neox(impl="sdpa"):
    return hf.GPTNeoXForCausalLM._from_config(hf.GPTNeoXConfig(**BASE, max_position_embeddings=64), attn_implementation=impl)


def moe_latent(impl="sdpa"):
    config = hf.DeepseekV3Config(
        **BASE, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, first_k_dense_replace=2, n_group=1, topk_group=1,
    )  # fmt: skip
    return hf.DeepseekV3ForCausalLM._from_config(config, attn_implementation=impl)


def biased(model):
    """Biases that are not zero, so that forgetting one is found out."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    return model


def run(model, layer):
    """(scope, statistics with q and k, the module's input and output) of one layer."""
    scope = Scope(model)
    name = scope.topology[layer].name
    seen = {}
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, a, k, o: seen.update(x=k.get("hidden_states", a[0] if a else None), out=o[0] if isinstance(o, tuple) else o),
        with_kwargs=True,
    )
    data = {"pixel_values": torch.randn(1, 3, 28, 28)} if model.main_input_name == "pixel_values" else ids(1, 11)
    stats = scope.capture(data, keep=(layer,))
    handle.remove()
    return scope, stats, seen["x"].double()[0], seen["out"].double()[0]


@pytest.mark.parametrize("build", [llama, qwen3, gpt2, phi3, gpt_neox, bert, dinov2])
def test_values_through_w_v_and_w_o_are_the_output(build):
    model = biased(make(build))
    scope, stats, x, out = run(model, 1)
    weights = head_weights(scope, 1)
    record = scope.topology[1]
    everywhere = range(x.shape[0])
    total = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float64)
    for head in range(record.heads):
        a = stats.weights(1, head, everywhere, everywhere)[0].double()
        kv = weights.kv_head(head)
        total += a @ x @ weights.ov(head).double()
        if weights.v_bias is not None:
            total += weights.v_bias[kv].double() @ weights.o[head].double()
    total += 0 if weights.o_bias is None else weights.o_bias.double()
    if build is bert:  # BERT's module ends before W_O
        linear = model.get_submodule(str(record.output))
        out = out @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(total, out, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [gpt2, bert, dinov2])
def test_w_q_and_w_k_give_the_scores(build):
    scope, stats, x, _ = run(biased(make(build)), 1)
    weights = head_weights(scope, 1)
    kept = stats._kept[scope.topology[1].name]
    for head in range(scope.topology[1].heads):
        q = x @ weights.q[head].double() + weights.q_bias[head].double()
        k = x @ weights.k[head].double() + weights.k_bias[head].double()
        scores = kept.calls[0].q[0, head].double() @ kept.pieces[0][0, weights.kv_head(head)].double().T
        torch.testing.assert_close(q @ k.T, scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(weights.qk(head).double(), weights.q[head].double() @ weights.k[head].double().T, atol=1e-6, rtol=1e-5)


def test_grouped_heads_share_keys_in_order():
    weights = head_weights(Scope(make(llama)), 0)
    assert [weights.kv_head(head) for head in range(4)] == [0, 0, 1, 1]
    assert weights.q.shape == (4, 32, 8)
    assert weights.k.shape == weights.v.shape == (2, 32, 8)
    assert weights.o.shape == (4, 8, 32)
    assert torch.equal(weights.ov(3), weights.v[1] @ weights.o[3])
    with pytest.raises(CaptureError, match=r"head 4.*0\.\.3"):
        weights.ov(4)


def test_t5_by_name():
    scope = Scope(make(t5))
    for record in scope.topology.modules:
        assert head_weights(scope, record.name).o.shape == (4, 8, 32)


def test_through_a_bridge_and_an_envoy_and_a_diffusion_model():
    import copy

    import nnsight
    from diffusers import DiTTransformer2DModel

    model = make(llama)
    plain = head_weights(Scope(model), 1)
    wrapped = head_weights(Scope(nnsight.NNsight(copy.deepcopy(model))), 1)
    for name in ("q", "k", "v", "o"):
        assert torch.equal(getattr(plain, name), getattr(wrapped, name))
    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, patch_size=2)
    weights = head_weights(Scope(dit), 0)
    attn = dit.transformer_blocks[0].attn1
    assert torch.equal(weights.q[1], attn.to_q.weight[8:].T)
    assert torch.equal(weights.o[1], attn.to_out[0].weight[:, 8:].T)


def test_latent_attention_is_refused():
    with pytest.raises(CaptureError, match="latent attention"):
        head_weights(Scope(make(moe_latent)), 0)

"""Topology is read from live modules: shapes, windows, kinds and W_O of many architectures, and refusals."""

from __future__ import annotations

import pytest
import transformers as hf
from torch import nn

from headscope.errors import CaptureError
from headscope.topology import derive

from .tiny_models import BASE, IDS, VOCABULARY, WINDOW, bart, bert, dinov2, gemma2, gpt2, gpt_oss, llama, llava, mistral, qwen_vl, t5


@pytest.mark.parametrize(
    ("build", "kv_heads", "output"),
    [(llama, 2, "o_proj"), (gpt2, 4, "c_proj"), (mistral, 2, "o_proj"), (bert, 4, "output.dense"), (dinov2, 4, ("o_proj", "output.dense"))],
    ids=["llama", "gpt2", "mistral", "bert", "dinov2"],
)
def test_main_stack(build, kv_heads, output):
    model = build()
    topology = derive(model)
    assert topology.layers == (0, 1)
    assert topology.heads == 8
    for module in topology.main:
        assert (module.heads, module.kv_heads, module.head_dim, module.group) == (4, kv_heads, 8, 4 // kv_heads)
        assert module.capturable == ""
        assert module.output is not None
        assert module.output.endswith(output)
        weight = model.get_submodule(module.output).weight
        assert 4 * 8 in weight.shape
        assert topology[module.name] is module


def test_windows_softcap_and_sinks_per_layer():
    first, second = derive(gemma2()).main
    assert (first.kind, first.window, first.softcap) == ("sliding", WINDOW, 1.5)
    assert (second.kind, second.window, second.softcap) == ("full", None, 1.5)
    first, second = derive(gpt_oss()).main
    assert (first.window, second.window) == (WINDOW, None)
    assert first.has_sinks
    assert second.has_sinks
    assert all(module.window == WINDOW for module in derive(mistral()).main)
    assert all(module.causal for module in derive(mistral()).main)
    assert not any(module.causal for module in derive(bert()).main)


@pytest.mark.parametrize("build", [t5, bart])
def test_an_encoder_decoder_numbers_its_decoder(build):
    topology = derive(build())
    assert topology.layers == (0, 1)
    assert all("decoder" in module.name and module.causal for module in topology.main)
    side = [module for module in topology.modules if module.layer is None]
    assert [module.kind for module in side].count("cross") == 2
    assert [module.kind for module in side].count("full") == 2
    assert not any(module.causal for module in side)


@pytest.mark.parametrize("build", [llava, qwen_vl])
def test_a_vision_tower_has_no_layer_numbers(build):
    topology = derive(build())
    assert topology.layers == (0, 1)
    assert all("language_model" in module.name for module in topology.main)
    side = [module for module in topology.modules if module.layer is None]
    assert len(side) == 2
    assert {module.kind for module in side} == {"vision"}


def test_layer_numbers_of_a_hybrid_model_are_the_models_own():
    config = hf.Qwen3NextConfig(
        **{**BASE, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    topology = derive(hf.Qwen3NextForCausalLM(config))
    assert topology.layers == (3,)
    assert topology[3].name == "model.layers.3.self_attn"


def test_attention_off_the_interface_is_listed_with_its_reason():
    config = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    topology = derive(hf.SiglipVisionModel(config))
    pooling = [module for module in topology.modules if module.capturable]
    assert len(pooling) == 1
    assert "MultiheadAttention" in pooling[0].capturable
    assert sum(not module.capturable for module in topology.modules) == 2


OFF_THE_INTERFACE = [
    (hf.FalconForCausalLM, hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **IDS)),
    (hf.GPTJForCausalLM, hf.GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, **IDS)),
    (hf.BloomForCausalLM, hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4, **IDS)),
    (hf.MambaForCausalLM, hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, **IDS)),
]


@pytest.mark.parametrize(("cls", "config"), OFF_THE_INTERFACE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_off_the_interface_is_refused_with_reason_and_remedy(cls, config):
    with pytest.raises(CaptureError) as caught:
        derive(cls(config))
    message = str(caught.value)
    assert cls.__name__ in message
    assert "attention interface" in message
    assert "use a model" in message
    assert "\n" not in message


def test_unknown_layers_are_named():
    topology = derive(llama())
    with pytest.raises(CaptureError, match=r"layer 7.*0\.\.1"):
        topology[7]
    with pytest.raises(CaptureError, match=r"model\.layers\.0\.self_attn"):
        topology["model.layers.9.self_attn"]


def test_a_plain_module_is_refused():
    with pytest.raises(CaptureError, match="no attention modules"):
        derive(nn.Linear(2, 2))

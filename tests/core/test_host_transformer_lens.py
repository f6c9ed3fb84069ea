"""TransformerLens bridges: a bridged model's statistics are those of the model itself, its forward is not changed, its hooks count."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import AttentionInterface

from headscope.circuits import head_weights
from headscope.errors import CaptureError
from headscope.interventions import HeadMask, Intervention
from headscope.scope import Scope

from .tiny_models import BASE, IDS, VOCABULARY, gpt2, ids, llama, make, padding, qwen3


def gpt_neox(impl="sdpa"):
    config = hf.GPTNeoXConfig(**BASE, max_position_embeddings=64)
    return hf.GPTNeoXForCausalLM._from_config(config, attn_implementation=impl)


def gemma2(impl="eager"):
    config = hf.Gemma2Config(**BASE, num_key_value_heads=2, head_dim=8, sliding_window=8, attn_logit_softcapping=1.5)
    return hf.Gemma2ForCausalLM._from_config(config, attn_implementation=impl)


def bert(impl="sdpa"):
    return hf.BertForMaskedLM._from_config(hf.BertConfig(**BASE, max_position_embeddings=64), attn_implementation=impl)


def bloom(impl="eager"):
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4, **IDS))


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A tokenizer that lies in a directory, as the bridge wants it."""
    where = tmp_path_factory.mktemp("words")
    level = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level), bos_token="w1", eos_token="w2", pad_token="w0")
    fast.save_pretrained(where)
    return hf.AutoTokenizer.from_pretrained(where)


def bridged(build, words):
    """(bridge, an untouched copy of the model inside it)."""
    model = make(build)
    model.config.architectures = [type(model).__name__]
    plain = copy.deepcopy(model)
    return TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=words, device="cpu"), plain


def same(a, b, limit=1e-5):
    """All statistics of two captures agree to a limit relative to the statistic's largest value; argmax, NaN and keys exactly."""
    assert a.layers == b.layers
    assert a.names == b.names
    for name in a.names:
        for layer in a.layers:
            x, y = a[name][layer].double(), b[name][layer].double()
            assert x.shape == y.shape
            assert torch.equal(x.isnan(), y.isnan()), (name, layer)
            scale = float(y.nan_to_num().abs().max().clamp_min(1e-12))
            error = float((x - y).nan_to_num().abs().max()) / scale
            assert error <= (0 if name == "argmax" else limit), (name, layer, error)


BUILDS = [llama, gpt2, qwen3, gpt_neox, gemma2]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_statistics_are_those_of_the_model(build, pad, words):
    bridge, plain = bridged(build, words)
    tokens, mask = ids(2, 14), padding(pad, 2, 14)
    stats = Scope(bridge).capture(tokens, attention_mask=mask, statistics=["passive", "diagonal_sum"], block=16)
    assert stats.kernels == {"transformer_lens"}
    same(stats, Scope(plain).capture(tokens, attention_mask=mask, statistics=["passive", "diagonal_sum"], block=16))
    assert torch.equal(stats.tokens, tokens)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("how", [{"chunk": 5}, {"chunk": 4}, {"generate": 3}])
def test_chunks_and_generation_with_a_cache(build, how, words):
    bridge, plain = bridged(build, words)
    tokens = ids(1, 14)
    same(Scope(bridge).capture(tokens, **how), Scope(plain).capture(tokens, **how), 2e-5)


def test_an_encoder_is_captured_where_the_bridge_leaves_it_to_transformers(words):
    bridge, plain = bridged(bert, words)
    stats = Scope(bridge).capture(ids(2, 12), attention_mask=padding("right", 2, 12))
    assert stats.kernels == {"eager"}  # the bridge switches the model it wraps
    same(stats, Scope(plain).capture(ids(2, 12), attention_mask=padding("right", 2, 12)))


def test_names_layers_and_kept_keys_are_those_of_the_model(words):
    bridge, plain = bridged(llama, words)
    scope, other = Scope(bridge), Scope(plain)
    assert [(m.name, m.layer, m.heads, m.kv_heads, m.output) for m in scope.topology.modules] == [
        (m.name, m.layer, m.heads, m.kv_heads, m.output) for m in other.topology.modules
    ]
    assert scope.host.kind == "transformer_lens"
    assert scope.host.given is bridge
    stats = scope.capture(ids(1, 10), keep="all")
    kept = stats._kept["model.layers.0.self_attn"]
    assert kept.calls[0].q.shape == (1, 4, 10, 8)
    assert kept.pieces[0].shape == (1, 2, 10, 8)  # key heads are not repeated
    expected = other.capture(ids(1, 10), keep="all").weights(1, 3, range(10), range(10))
    torch.testing.assert_close(stats.weights(1, 3, range(10), range(10)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("build", [llama, gpt2, gpt_neox])
def test_the_bridge_runs_as_before(build, words):
    bridge, _ = bridged(build, words)
    tokens = ids(2, 12)
    bridge(tokens)  # the bridge puts hooks of its own on its norms when it first runs
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bridge.original_model.modules()]
    keys = [set(vars(m)) for m in bridge.original_model.modules()]
    with torch.no_grad():
        before = bridge(tokens)
        with Scope(bridge).observe() as stats:
            during = bridge(tokens)
    assert torch.equal(before, during)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bridge.original_model.modules()] == hooks
    assert [set(vars(m)) for m in bridge.original_model.modules()] == keys
    _, cache = bridge.run_with_cache(tokens)
    pattern = cache["blocks.1.attn.hook_pattern"].double()
    torch.testing.assert_close(stats["row_max"][1].double(), pattern.amax(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(stats["column_sum"][1].double(), pattern.sum(2), atol=1e-5, rtol=0)


def test_a_bridge_that_runs_with_a_cache_may_be_observed(words):
    bridge, _ = bridged(llama, words)
    with Scope(bridge).observe("entropy") as stats:
        _, cache = bridge.run_with_cache(ids(1, 9))
    pattern = cache["blocks.0.attn.hook_pattern"].double()
    entropy = -(pattern * pattern.clamp_min(1e-300).log()).sum(-1)
    torch.testing.assert_close(stats["entropy"][0].double(), entropy, atol=1e-5, rtol=0)


# ---- hooks of the user's --------------------------------------------------------------------------------------------


def test_edits_of_q_and_k_are_measured(words):
    bridge, _ = bridged(llama, words)
    scope, tokens = Scope(bridge), ids(1, 9)

    def flatten(q, hook):
        return q * 0

    with scope.observe(["entropy"]) as stats:
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_rot_q", flatten)])
    uniform = torch.arange(1, 10).float().log()
    torch.testing.assert_close(stats["entropy"][0][0], uniform.expand(4, 9), atol=1e-5, rtol=0)
    assert not torch.allclose(stats["entropy"][1][0], uniform.expand(4, 9), atol=1e-2)


@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_edits_of_the_pattern_are_refused_whenever_they_come(point, words):
    bridge, _ = bridged(llama, words)
    scope, tokens = Scope(bridge), ids(1, 9)

    def shift(x, hook):
        return x.roll(1, -1) if point == "hook_pattern" else x * 3

    def clean_then_edited():
        with scope.observe():
            bridge(tokens)  # the first call of every module is in order, and has been checked
            bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.attn.{point}", shift)])

    with pytest.raises(CaptureError, match=r"model\.layers\.1\.self_attn.*hooks"):
        clean_then_edited()


def test_edits_of_z_come_after_what_is_measured(words):
    bridge, _ = bridged(llama, words)
    scope, tokens = Scope(bridge), ids(1, 9)
    with scope.observe("entropy") as stats:
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)])
    assert torch.equal(stats["entropy"][1], scope.capture(tokens, statistics="entropy")["entropy"][1])


# ---- interventions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_a_masked_head(build, words):
    bridge, plain = bridged(build, words)
    tokens, mask = ids(2, 10), HeadMask(heads=[(1, 2), (0, 0)])
    with torch.no_grad():
        with Scope(bridge).intervene(mask):
            changed = bridge(tokens)
        with Scope(plain).intervene(mask):
            expected = plain(tokens).logits
        assert not torch.allclose(changed, bridge(tokens), atol=1e-3)
    torch.testing.assert_close(changed, expected, atol=2e-5, rtol=1e-4)


class Half(Intervention):
    """Halves the keys of every head (an edit of the call), or its scale (an edit that no host function can be told)."""

    def __init__(self, what):
        object.__setattr__(self, "what", what)

    def before(self, call):
        from dataclasses import replace

        return replace(call, k=call.k * 0.5) if self.what == "k" else replace(call, scale=call.scale * 0.5)


@pytest.mark.parametrize("what", ["k", "scale"])
@pytest.mark.parametrize("build", [llama, gemma2])
def test_an_edited_call_is_computed_and_measured(build, what, words):
    bridge, plain = bridged(build, words)
    tokens = ids(1, 12)
    with torch.no_grad():
        a, b = Scope(bridge), Scope(plain)
        with a.intervene(Half(what)), a.observe() as stats:
            changed = bridge(tokens)
        with b.intervene(Half(what)), b.observe() as expected:
            wanted = plain(tokens).logits
    same(stats, expected)
    torch.testing.assert_close(changed, wanted, atol=2e-5, rtol=1e-4)


# ---- guards and refusals --------------------------------------------------------------------------------------------


def test_after_an_exception_or_an_interrupt_the_bridge_is_as_before(words):
    bridge, _ = bridged(llama, words)
    scope, tokens = Scope(bridge), ids(1, 6)

    def fail(error):
        def hook(x, hook):
            raise error

        return hook

    for error in (RuntimeError, KeyboardInterrupt):  # what the bridge's own failed run leaves behind is the bridge's
        with pytest.raises(error):
            bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", fail(error))])
        bridge.reset_hooks()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bridge.original_model.modules()]
    keys = [set(vars(m)) for m in bridge.original_model.modules()]
    interface = AttentionInterface.get_interface
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), scope.observe():
            bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", fail(error))])
        bridge.reset_hooks()
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bridge.original_model.modules()] == hooks
        assert [set(vars(m)) for m in bridge.original_model.modules()] == keys
        assert AttentionInterface.get_interface is interface
    assert scope.capture(tokens).layers == [0, 1]


def test_nested_observations(words):
    bridge, _ = bridged(llama, words)
    scope = Scope(bridge)
    with scope.observe("entropy") as outer, scope.observe("lse") as inner:
        bridge(ids(1, 6))
    assert outer["entropy"][0].shape == inner["lse"][0].shape == (1, 4, 6)


def test_a_captured_bridge_can_be_collected(words):
    bridge, _ = bridged(llama, words)
    Scope(bridge).capture(ids(1, 6))
    gone = weakref.ref(bridge.original_model)
    del bridge
    gc.collect()
    assert gone() is None


def test_position_slopes_are_refused(words):
    model = make(bloom)
    model.config.architectures = ["BloomForCausalLM"]
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=words, device="cpu")
    with pytest.raises(CaptureError, match="BloomForCausalLM"):
        Scope(bridge)


def test_other_objects_of_the_library_are_refused():
    from transformer_lens.hook_points import HookPoint

    with pytest.raises(CaptureError, match=r"transformer_lens\.HookPoint.*pass a TransformerBridge"):
        Scope(HookPoint())


@pytest.mark.parametrize("build", [llama, gpt2, gpt_neox])
def test_weights_of_heads_are_the_models_and_the_bridges(build, words):
    bridge, plain = bridged(build, words)
    found, expected = head_weights(Scope(bridge), 1), head_weights(Scope(plain), 1)
    theirs = bridge.blocks[1].attn
    for name, their in (("q", theirs.W_Q), ("k", theirs.W_K), ("v", theirs.W_V), ("o", theirs.W_O)):
        assert torch.equal(getattr(found, name), getattr(expected, name))
        assert torch.equal(getattr(found, name), their)

"""What cannot be measured exactly is refused, in one line that names the module, the reason and what to do; nothing is half-measured."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headscope.errors import CaptureError, StatisticError
from headscope.scope import Scope

from .tiny_models import BASE, gemma2, gpt2, gpt_oss, ids, llama, make, mistral, padding


def refused(*words):
    """A CaptureError of one line in which all words stand, in this order."""
    return pytest.raises(CaptureError, match="^[^\n]*" + "[^\n]*".join(words) + "[^\n]*$")


def custom(monkeypatch, function, mask=True):
    """Register a function under a name for one test."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "custom", function)
    if mask:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "custom", AttentionMaskInterface._global_mapping["sdpa"])
    return "custom"


# ---- the self-check: every kind of misreading changes the output ------------------------------------------------


def wrong_scale(module, q, k, v, attention_mask, **kw):
    kw["scaling"] *= 1.3
    return sdpa_attention_forward(module, q, k, v, attention_mask, **kw)


def hidden_window(module, q, k, v, attention_mask, **kw):
    """Applies a window of its own that nobody was told about."""
    n = q.shape[2]
    seen = torch.ones(n, n, dtype=torch.bool).tril().triu(-3)
    return sdpa_attention_forward(module, q, k, v, seen[None, None], **kw)


def not_causal(module, q, k, v, attention_mask, **kw):
    return sdpa_attention_forward(module, q, k, v, attention_mask, **{**kw, "is_causal": False})


def unknown_argument(module, q, k, v, attention_mask, surprise=2.0, **kw):
    """A keyword that a new model might add: scores are capped."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * kw["scaling"]
    scores = surprise * torch.tanh(scores / surprise)
    scores = scores.masked_fill(~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2), None


@pytest.mark.parametrize("function", [wrong_scale, hidden_window, not_causal, unknown_argument])
def test_a_function_that_does_something_else_is_found_out(function, monkeypatch):
    model = make(llama, custom(monkeypatch, function))
    with refused(r"model\.layers\.0\.self_attn", "custom", "relative error", "keyword arguments:.*scaling", "none are given"):
        Scope(model).capture(ids(2, 12))


def test_an_error_that_begins_with_decoding_is_found_out(monkeypatch):
    """The first decode step is checked apart from the prefill."""

    def only_prefill(module, q, k, v, attention_mask, **kw):
        if q.shape[2] == 1:
            kw["scaling"] *= 2
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kw)

    scope = Scope(make(llama, custom(monkeypatch, only_prefill)))
    scope.capture(ids(1, 9))
    with refused("relative error", "q .1, 4, 1, 8. at 9"):
        scope.capture(ids(1, 9), generate=2)


def test_the_self_check_can_be_switched_off(monkeypatch):
    scope = Scope(make(llama, custom(monkeypatch, wrong_scale)))
    assert scope.capture(ids(1, 9), verify=False, statistics=["entropy"])["entropy"][0].shape == (1, 4, 9)


def test_padding_that_the_function_never_hears_of(monkeypatch):
    """transformers makes no mask for a name without a mask function: the model attends to padding, silently."""
    model = make(llama, custom(monkeypatch, lambda *a, **k: sdpa_attention_forward(*a, **k), mask=False))
    scope = Scope(model)
    scope.capture(ids(2, 12))
    with refused("custom", "attends to padding", "AttentionMaskInterface.register"):
        scope.capture(ids(2, 12), attention_mask=padding("left", 2, 12))


# ---- paths around the interface ---------------------------------------------------------------------------------


def test_a_module_that_leaves_the_interface_by_an_option():
    model = make(gpt2, "eager", reorder_and_upcast_attn=True)
    with refused(r"transformer\.h\.0\.attn \(GPT2Attention\)", "never reached", "reorder_and_upcast_attn", "sdpa"):
        Scope(model).capture(ids(1, 7))


def test_a_replaced_forward_is_noticed():
    model = make(llama)
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    with refused(r"model\.layers\.1\.self_attn", "never reached"):
        Scope(model).capture(ids(1, 7))


def test_a_model_that_was_changed_after_it_was_scoped():
    model = make(llama)
    scope = Scope(model)
    model.model.layers[1] = make(llama).model.layers[0]
    with refused(r"model\.layers\.1\.self_attn", "replaced", "new Scope"):
        scope.capture(ids(1, 7))
    del model.model.layers[1]
    with refused(r"model\.layers\.1\.self_attn", "removed"):
        scope.capture(ids(1, 7))
    assert Scope(model).topology.layers == (0,)


def test_shared_layers_are_refused():
    model = hf.AlbertModel(hf.AlbertConfig(**BASE, embedding_size=16)).eval()
    with refused("albert_layers.0.attention", "ran twice", "share one module"):
        Scope(model).capture(ids(1, 7))


def test_differential_attention_is_refused():
    model = hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**BASE, num_key_value_heads=2)).eval()
    with refused(r"model\.layers\.0\.self_attn", "several times", "no one pattern"):
        Scope(model).capture(ids(1, 7))


@pytest.mark.parametrize("argument", ["indices", "block_indices", "sinks", "cache"])
def test_arguments_that_cannot_be_read(argument, monkeypatch):
    """Models with an indexer pass these to their attention function; here they are given to the model, which hands them on."""
    scope = Scope(make(llama, custom(monkeypatch, lambda *a, **k: sdpa_attention_forward(*a, **{**k, argument: None}))))
    with refused(r"model\.layers\.0\.self_attn", f"{argument}=", "cannot be measured"):
        scope.capture({"input_ids": ids(1, 7), argument: torch.zeros(1)})


@pytest.mark.parametrize(("build", "what"), [(gemma2, "soft cap"), (gpt_oss, "sink logits")])
def test_sdpa_that_drops_what_the_model_needs(build, what, monkeypatch):
    model = make(build)
    model.config._attn_implementation_internal = "sdpa"
    with refused(what, "drops", "eager"):
        Scope(model).capture(ids(1, 7))


# ---- states of the model ----------------------------------------------------------------------------------------


def test_dropout_is_refused_and_the_training_flag_left_alone():
    model = make(llama, attention_dropout=0.1).train()
    with refused("dropout", "random", r"model\.eval"):
        Scope(model).capture(ids(1, 7))
    assert model.training
    calm = make(llama).train()
    assert Scope(calm).capture(ids(1, 7), statistics=["entropy"]).layers == [0, 1]
    assert calm.training


def test_gradient_checkpointing_is_refused_in_training():
    model = make(llama).train()
    model.gradient_checkpointing_enable()
    with refused("gradient checkpointing", "twice"):
        Scope(model).capture(ids(1, 7))


def test_compiled_models_are_refused():
    with refused(r"torch\.compile", "_orig_mod"):
        Scope(torch.compile(make(llama)))
    model = make(llama)
    scope = Scope(model)
    model.model.layers[1].compile()
    with refused(r"model\.layers\.1", r"torch\.compile"):
        scope.capture(ids(1, 7))


# ---- generation that does not go straight on --------------------------------------------------------------------


def test_beam_search_is_refused():
    model = make(llama)
    with refused("keys of earlier tokens", "beam search", "num_beams=1"), Scope(model).observe():
        model.generate(ids(2, 9), max_new_tokens=8, num_beams=3, do_sample=False)


def test_assisted_decoding_is_refused():
    model, assistant = make(llama), make(llama, num_hidden_layers=1)
    with refused("were measured before", "cropped"), Scope(model).observe():
        model.generate(ids(1, 9), max_new_tokens=12, assistant_model=assistant, do_sample=False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda cache: cache.crop(-3), "cropped"),
        (lambda cache: cache.batch_repeat_interleave(2), "became 4"),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), "they changed"),
    ],
    ids=["crop", "batch", "reorder"],
)
def test_an_edited_cache_is_noticed(change, why):
    model, tokens, cache = make(llama), ids(2, 9), DynamicCache()
    with torch.no_grad(), refused(why), Scope(model).observe():
        model(tokens, past_key_values=cache)
        change(cache)
        model(tokens[:1, :1].expand(cache.layers[0].keys.shape[0], 1), past_key_values=cache)


def test_steps_that_were_not_seen_are_refused():
    model, tokens, cache = make(llama), ids(1, 12), DynamicCache()
    scope = Scope(model)
    with torch.no_grad(), refused("not seen"), scope.observe():
        model(tokens[:, :5], past_key_values=cache)
        model.lm_head(model.model.embed_tokens(tokens))  # not attention: not noticed, and rightly so
        seen = scope._attachment._actors.pop()
        model(tokens[:, 5:8], past_key_values=cache)
        scope._attachment._actors.append(seen)
        model(tokens[:, 8:], past_key_values=cache)


def test_a_new_sequence_is_a_new_pass():
    model = make(mistral)
    with torch.no_grad(), Scope(model).observe(statistics=["entropy", "column_sum"]) as stats:
        model(ids(2, 9))
        model.generate(ids(1, 5), max_new_tokens=4, do_sample=False)
        model(ids(1, 30))
    assert [tuple(one["column_sum"][1].shape) for one in stats.passes] == [(2, 4, 9), (1, 4, 8), (1, 4, 30)]
    with pytest.raises(StatisticError, match=r"3 sequences.*passes\[i\]"):
        stats["entropy"]


def test_nothing_ran():
    scope = Scope(make(llama))
    with scope.observe() as stats:
        pass
    with pytest.raises(StatisticError, match="not run inside the block"):
        stats["entropy"]
    with scope.observe() as stats, pytest.raises(StatisticError, match="has not ended"):
        stats["entropy"]

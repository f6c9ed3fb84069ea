"""The seam leaves no trace: logits to the bit, the table of functions as it was, other models and threads untouched, nothing kept alive."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface

from headscope.capture.seam import _attached
from headscope.scope import Scope

from .tiny_models import bart, bert, compare, dense, eager_copy, gemma2, gpt2, gpt_oss, ids, llama, make, mistral, padding

PARAMETERS = {"block": 16, "fai_band": (2, 5), "local_window": 4}
ORIGINAL = AttentionInterface.__dict__["get_interface"]


@pytest.fixture(autouse=True)
def _restored():
    """Whatever a test did, the interface must be exactly as it was."""
    mapping = dict(AttentionInterface._global_mapping)
    yield
    assert AttentionInterface.__dict__["get_interface"] is ORIGINAL
    assert "__getitem__" not in AttentionInterface.__dict__
    assert dict(AttentionInterface._global_mapping) == mapping
    assert len(_attached) == 0


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("build", "impl"),
    [(llama, "sdpa"), (llama, "eager"), (gpt2, "sdpa"), (gpt2, "eager"), (mistral, "sdpa"), (gemma2, "eager"), (gpt_oss, "eager")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("pad", ["none", "left"])
def test_logits_are_identical_to_the_bit(build, impl, pad):
    model, tokens, mask = make(build, impl), ids(2, 19), padding(pad, 2, 19)
    before = hooks(model)
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask).logits
        written = model.generate(
            tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with Scope(model).observe() as stats:
            observed = model(tokens, attention_mask=mask).logits
            again = model.generate(
                tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    assert torch.equal(plain, observed)
    assert torch.equal(written.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(written.logits, again.logits, strict=True))
    assert len(stats.passes) == 2
    assert hooks(model) == before
    assert model.config._attn_implementation == impl


def test_gradients_are_the_same_while_observing():
    model, tokens = make(llama), ids(1, 9)
    grads = []
    for observe in (False, True):
        model.zero_grad()
        if observe:
            with Scope(model).observe(statistics=["entropy"]):
                model(tokens, labels=tokens).loss.backward()
        else:
            model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def divide(output):
    return 1 / 0 if output is not None else None


def test_restored_after_an_exception_inside_the_block():
    model = make(llama)
    before = hooks(model)
    scope = Scope(model)
    block = scope.observe()
    with pytest.raises(ZeroDivisionError), block as stats:
        divide(model(ids(1, 5)))
    assert hooks(model) == before
    assert "ended with an error" in repr(stats)
    assert scope.capture(ids(1, 5), statistics=["entropy"])["entropy"][0].shape == (1, 4, 5)


def test_restored_after_an_exception_inside_the_forward_pass():
    model = make(llama)
    scope = Scope(model)

    def fail(module, args):
        raise RuntimeError("broken layer")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        scope.capture(ids(1, 5))
    handle.remove()
    with torch.no_grad(), scope.observe(statistics=["entropy"]) as stats:
        handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken layer"):
            model(ids(1, 5))
        handle.remove()
        model(ids(1, 6))
    assert stats.passes[-1]["entropy"][1].shape == (1, 4, 6)


def test_nested_observations_of_one_model():
    model, tokens = make(llama), ids(1, 11)
    scope = Scope(model)
    with torch.no_grad(), scope.observe(statistics=["entropy"]) as outer:
        model(tokens)
        with scope.observe(statistics=["column_sum"]) as inner:
            model(tokens[:, :7])
        model(tokens[:, :3])
    assert [one["entropy"][0].shape[-1] for one in outer.passes] == [11, 7, 3]
    assert inner["column_sum"][0].shape == (1, 4, 7)


def test_two_scopes_of_one_model_and_a_model_that_is_not_scoped():
    model, other, tokens = make(llama), make(gpt2), ids(1, 8)
    with torch.no_grad(), Scope(model).observe(statistics=["entropy"]) as first:
        with Scope(model).observe(statistics=["entropy"]) as second, Scope(other).observe(statistics=["entropy"]) as third:
            make(llama)(tokens)
            model(tokens)
            other(tokens[:, :5])
        model(tokens)
    assert (len(first.passes), len(second.passes), len(third.passes)) == (2, 1, 1)
    assert torch.equal(first.passes[0]["entropy"][1], second["entropy"][1])
    assert third["entropy"][0].shape == (1, 4, 5)


def test_two_threads_see_only_their_own():
    """Both threads observe the same model at once with different texts; a third only runs it."""
    model = make(llama)
    scope = Scope(model)
    barrier = threading.Barrier(3)
    results, failures = {}, []

    def work(length):
        try:
            with torch.no_grad(), scope.observe(statistics=["entropy"]) as stats:
                barrier.wait(timeout=30)
                for _ in range(5):
                    model(ids(1, length))
                barrier.wait(timeout=30)
            results[length] = stats
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(length,)) for length in (6, 13)]
    for thread in threads:
        thread.start()
    barrier.wait(timeout=30)
    with torch.no_grad():
        model(ids(1, 9))
    barrier.wait(timeout=30)
    for thread in threads:
        thread.join()
    assert not failures
    for length, stats in results.items():
        assert [one["entropy"][0].shape[-1] for one in stats.passes] == [length] * 5


def test_nothing_keeps_the_model_alive():
    model = make(llama)
    alive = weakref.ref(model)
    scope = Scope(model)
    stats = scope.capture(ids(1, 9), keep="all")
    del model, scope
    gc.collect()
    assert alive() is None
    assert stats["entropy"][0].shape == (1, 4, 9)


# ---- other implementations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, mistral, gemma2])
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_flex_attention(build, pad):
    """BlockMask, sliding window and softcap (flex runs uncompiled here: compiling takes a minute)."""
    model, tokens, mask = make(build, "flex_attention"), ids(2, 21), padding(pad, 2, 21)
    with torch.compiler.set_stance("force_eager"):
        stats = Scope(model).capture(tokens, attention_mask=mask, **PARAMETERS)
    assert stats.kernels == {"flex_attention"}
    with torch.no_grad():
        matrices = eager_copy(model)(tokens, attention_mask=mask, output_attentions=True).attentions
    for layer, matrix in enumerate(matrices):
        compare(stats, layer, dense(matrix, causal=True, row_valid=mask, **PARAMETERS))


def delegating(module, query, key, value, attention_mask, **kwargs):
    """A custom attention that goes through the table itself: one call, to be counted once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


@pytest.fixture
def custom(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "delegating", delegating)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "delegating", AttentionMaskInterface._global_mapping["sdpa"])
    yield "delegating"
    monkeypatch.undo()


@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_a_custom_name(custom, pad):
    model, tokens, mask = make(llama, custom), ids(2, 21), padding(pad, 2, 21)
    stats = Scope(model).capture(tokens, attention_mask=mask, generate=3, **PARAMETERS) if pad == "left" else None
    stats = stats or Scope(model).capture(tokens, attention_mask=mask, **PARAMETERS)
    assert stats.kernels == {custom}
    whole = mask if pad != "left" else torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], 1)
    extra = {} if pad != "left" else {"position_ids": (whole.cumsum(1) - 1).masked_fill(whole == 0, 0)}
    with torch.no_grad():
        matrices = eager_copy(model)(stats.tokens, attention_mask=whole, output_attentions=True, **extra).attentions
    for layer, matrix in enumerate(matrices):
        compare(stats, layer, dense(matrix, causal=True, row_valid=whole, **PARAMETERS))


def fake_flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, is_causal=None, **kwargs):
    """Flash attention's contract in plain PyTorch: a [B, Nk] mask or None, causality and window applied by the function itself."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2] if attention_mask is None else attention_mask.shape[1]
    group = heads // key.shape[1]
    k, v = (x[:, :, :keys].repeat_interleave(group, 1) for x in (key, value))
    t, s = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None]
    seen = (s <= t) if (module.is_causal if is_causal is None else is_causal) else torch.ones(rows, keys, dtype=torch.bool)
    if sliding_window is not None:
        seen = seen & (t - s < sliding_window)
    seen = seen.expand(batch, 1, rows, keys)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    weights = (query @ k.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return (weights @ v).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_flash_attention_masks(build, pad, chunk, monkeypatch):
    """The two-dimensional masks and the window argument that transformers hands to flash attention, on a stand-in kernel."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", fake_flash)
    model, tokens, mask = make(build), ids(2, 21), padding(pad, 2, 21)
    matrices = None
    with torch.no_grad():
        matrices = eager_copy(model)(tokens, attention_mask=mask, output_attentions=True).attentions
    model.config._attn_implementation_internal = "flash_attention_2"
    stats = Scope(model).capture(tokens, attention_mask=mask, chunk=chunk, **PARAMETERS)
    assert stats.kernels == {"flash_attention_2"}
    for layer, matrix in enumerate(matrices):
        compare(stats, layer, dense(matrix, causal=True, row_valid=mask, **PARAMETERS))
    monkeypatch.undo()


def test_a_model_with_a_table_of_its_own():
    """Doge declares its own AttentionInterface instance."""
    from .tiny_models import BASE

    model = make(lambda: hf.DogeForCausalLM._from_config(hf.DogeConfig(**BASE, num_key_value_heads=2), attn_implementation="sdpa"))
    stats = Scope(model).capture(ids(2, 9), statistics=["entropy"])
    assert stats["entropy"][1].shape == (2, 4, 9)


def test_packed_sequences_see_only_themselves():
    """Position ids that start again pack two texts into one row; the mask is recognised without keeping a matrix."""
    model, tokens = make(llama), ids(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    scope = Scope(model)
    stats = scope.capture({"input_ids": tokens, "position_ids": positions}, keep="all", **PARAMETERS)
    with torch.no_grad():
        matrices = eager_copy(model)(tokens, position_ids=positions, output_attentions=True, use_cache=False).attentions
    for layer, matrix in enumerate(matrices):
        assert float(matrix[0, :, 12:, :12].abs().max()) == 0.0
        for name in ("entropy", "row_max", "distance", "column_sum", "argmax"):
            want = dense(matrix, causal=True, **PARAMETERS)[name].double()
            torch.testing.assert_close(stats[name][layer].double(), want, rtol=1e-5, atol=1e-5)
    facts = stats._kept[scope.topology[0].name].calls[0].mask
    assert facts.allowed is None
    assert facts.query_segments is not None


@pytest.mark.parametrize(("build", "pad"), [(llama, "left"), (llama, "right"), (mistral, "left"), (gemma2, "right"), (bert, "right")])
def test_ordinary_masks_are_kept_as_facts_not_as_matrices(build, pad):
    scope = Scope(make(build, "eager"))
    stats = scope.capture(ids(2, 21), attention_mask=padding(pad, 2, 21), statistics=["entropy"], keep="all")
    for module in scope.topology.main:
        facts = stats._kept[module.name].calls[0].mask
        assert facts.allowed is None
        assert facts.bias is None
        assert facts.causal == module.causal
        assert facts.window == module.window
        assert torch.equal(facts.key_valid, padding(pad, 2, 21).bool())


def test_a_mask_of_ones_own_is_kept_whole():
    """A 4-D mask with a hole (and a 4-D additive bias) is nothing that facts can say."""
    model, tokens = make(llama), ids(1, 12)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    seen[5:, 3] = False
    bias = torch.zeros(1, 1, 12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    bias[..., 8:, 2] = 1.5
    for mask in (seen[None, None], bias):
        stats = Scope(model).capture({"input_ids": tokens, "attention_mask": mask}, **PARAMETERS)
        additive = mask if mask.is_floating_point() else torch.zeros(1, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)
        with torch.no_grad():
            matrices = eager_copy(model)(tokens, attention_mask=additive, output_attentions=True).attentions
        for layer, matrix in enumerate(matrices):
            compare(stats, layer, dense(matrix, causal=True, **PARAMETERS))


def test_generate_does_not_compile_itself_while_observed(monkeypatch):
    """With a static cache on a GPU, generate() compiles the forward pass; compiled code would slip past the seam."""
    from transformers import CompileConfig

    model = make(llama)
    monkeypatch.setattr(model, "get_compiled_call", lambda config: pytest.fail("generate() compiled the model"))
    options = {"cache_implementation": "static", "compile_config": CompileConfig(), "max_new_tokens": 4, "do_sample": False}
    options["compile_config"]._compile_all_devices = True
    with torch.no_grad(), Scope(model).observe(statistics=["entropy"]) as stats:
        model.generate(ids(1, 6), **options)
    assert stats["entropy"][0].shape == (1, 4, 9)
    assert "_valid_auto_compile_criteria" not in vars(model)


def test_an_encoder_alone_is_its_own_sequence():
    model = make(bart)
    scope = Scope(model)
    with torch.no_grad(), scope.observe(statistics=["entropy"]) as stats:
        model.get_encoder()(ids(1, 7))
    assert len(stats.passes) == 1
    assert all(layer.startswith("model.encoder") for layer in stats.layers)

"""HeadMask: zeroing a head at the seam is exactly a model whose slice of W_O is zero, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from headscope.errors import InterventionError
from headscope.interventions import REGISTRY, HeadMask, Intervention, from_json
from headscope.scope import Scope

from ..core.tiny_models import bart, bert, gemma2, gpt2, gpt_oss, ids, llama, llava, make, padding

WIDTH = 8


def without_heads(model, heads, scope):
    """The model with W_O's input slices of these heads set to zero."""
    with torch.no_grad():
        for layer, head in heads:
            weight = model.get_submodule(scope.topology[layer].output).weight
            span = slice(head * WIDTH, (head + 1) * WIDTH)
            if isinstance(model.get_submodule(scope.topology[layer].output), hf.pytorch_utils.Conv1D):
                weight[span] = 0
            else:
                weight[:, span] = 0
    return model


def output(model, tokens, **kw):
    with torch.no_grad():
        out = model(tokens, **kw)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize(
    ("build", "impl"),
    [(llama, "sdpa"), (llama, "eager"), (gpt2, "sdpa"), (gemma2, "eager"), (gpt_oss, "eager"), (bert, "sdpa")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("pad", ["none", "right"])
def test_equals_a_zeroed_slice_of_the_output_matrix(build, impl, pad):
    model, tokens, mask = make(build, impl), ids(2, 11), padding(pad, 2, 11)
    scope, heads = Scope(model), [(0, 1), (1, 3), (1, 0)]
    plain = output(model, tokens, attention_mask=mask)
    with scope.intervene(HeadMask(heads=heads)):
        masked = output(model, tokens, attention_mask=mask)
    twin = without_heads(make(build, impl), heads, scope)
    assert torch.equal(masked, output(twin, tokens, attention_mask=mask))
    assert float((masked - plain).abs().max()) > 1e-2
    assert torch.equal(output(model, tokens, attention_mask=mask), plain)


def test_the_output_side_of_the_matrix_would_be_another_thing():
    """The mistake to avoid: a slice of W_O's output belongs to all heads at once."""
    model, tokens = make(llama), ids(1, 11)
    scope = Scope(model)
    with scope.intervene(HeadMask(heads=[(0, 1)])):
        masked = output(model, tokens)
    wrong = make(llama)
    with torch.no_grad():
        wrong.model.layers[0].self_attn.o_proj.weight[WIDTH : 2 * WIDTH] = 0
    assert float((masked - output(wrong, tokens)).abs().max()) > 1e-2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_works_in_generation_with_a_cache(cache):
    model, tokens, mask = make(llama), ids(2, 9), padding("left", 2, 9)
    scope, heads = Scope(model), "0.1,1.3,1.2"
    with scope.intervene(HeadMask(heads=heads)):
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, cache_implementation=cache)
    twin = without_heads(make(llama), [(0, 1), (1, 3), (1, 2)], scope)
    with torch.no_grad():
        want = twin.generate(tokens, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False)
        plain = model.generate(tokens, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert torch.equal(out.ids, want)
    assert not torch.equal(plain, want)


def test_blocks_stack_and_observers_see_the_changed_model():
    model, tokens = make(llama), ids(1, 9)
    scope = Scope(model)
    with scope.intervene(HeadMask(heads="0.0")), scope.intervene(HeadMask(heads="0.1"), HeadMask(heads="0.2")):
        both = output(model, tokens)
        stats = scope.capture(tokens, statistics=["entropy"])
    twin = without_heads(make(llama), [(0, 0), (0, 1), (0, 2)], scope)
    assert torch.equal(both, output(twin, tokens))
    want = Scope(twin).capture(tokens, statistics=["entropy"])
    assert torch.equal(stats["entropy"][1], want["entropy"][1])


def test_removed_after_an_exception():
    model, tokens = make(llama), ids(1, 9)
    plain = output(model, tokens)
    block = Scope(model).intervene(HeadMask(heads="0.0"))
    with pytest.raises(ValueError, match="stop"), block:
        stop(output(model, tokens))
    assert torch.equal(output(model, tokens), plain)


def stop(_):
    raise ValueError("stop")


def test_heads_of_towers_and_cross_attention_by_module_name():
    scope = Scope(make(bart))
    inputs = {"input_ids": ids(1, 9), "decoder_input_ids": ids(1, 5)}
    with torch.no_grad(), scope.intervene(HeadMask(heads=[("model.decoder.layers.0.encoder_attn", 2)])):
        masked = scope.model(**inputs).logits
    twin = make(bart)
    with torch.no_grad():
        twin.model.decoder.layers[0].encoder_attn.out_proj.weight[:, 2 * WIDTH : 3 * WIDTH] = 0
        assert torch.equal(masked, twin(**inputs).logits)
    tower = Scope(make(llava))
    name = "model.vision_tower.encoder.layers.1.self_attn"
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        plain = tower.model.model.vision_tower(pixels).last_hidden_state
        with tower.intervene(HeadMask(heads=f"{name}.3")):
            changed = tower.model.model.vision_tower(pixels).last_hidden_state
    assert float((plain - changed).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([(7, 1)], r"head 7\.1.*0\.\.1"),
        ([(0, 4)], r"head 0\.4.*heads 0\.\.3"),
        ([(0, -1)], r"head 0\.-1"),
        ([("model.layer.0", 1)], "attention module"),
    ],
    ids=str,
)
def test_heads_the_model_does_not_have(heads, words):
    scope = Scope(make(llama))
    with pytest.raises(InterventionError, match=words), scope.intervene(HeadMask(heads=heads)):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("heads", ["", "abc", "1.x", "12", [], [(1,)], [(1, 2, 3)], 5, None], ids=repr)
def test_heads_that_cannot_be_read(heads):
    with pytest.raises(InterventionError, match=r"head|pairs"):
        HeadMask(heads=heads)


def test_an_unknown_mode():
    with pytest.raises(InterventionError, match=r"mode 'zerro'.*did you mean zero"):
        HeadMask(heads="0.0", mode="zerro")


def test_json_and_equality():
    mask = HeadMask(heads="18.6, 17.3,18.6")
    assert mask.heads == ((18, 6), (17, 3))
    assert mask.to_json() == '{"intervention": "head_mask", "version": 1, "heads": [[18, 6], [17, 3]], "mode": "zero"}'
    assert from_json(mask.to_json()) == mask == Intervention.from_json(mask.to_json())
    assert REGISTRY["head_mask"] is HeadMask
    for text, words in (
        ("{", "no JSON"),
        ("[]", "intervention"),
        ('{"intervention": "head_musk"}', "did you mean head_mask"),
        ('{"intervention": "head_mask", "head": 1}', "did you mean heads"),
        ('{"intervention": "head_mask"}', "heads"),
    ):
        with pytest.raises(InterventionError, match=words):
            from_json(text)


def test_a_block_in_which_nothing_ran_warns():
    scope = Scope(make(llama))
    with pytest.warns(UserWarning, match="nothing was changed"), scope.intervene(HeadMask(heads="0.0")):
        pass

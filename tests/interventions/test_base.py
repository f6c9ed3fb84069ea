"""The call as interventions see it: q, k, v, mask and scale may change before it runs, the heads' outputs after."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import Intervention
from headscope.interventions.base import REGISTRY, register
from headscope.scope import Scope

from ..core.tiny_models import ids, llama, make, mistral, padding


@dataclass(frozen=True)
class Temperature(Intervention):
    """scores / tau, by q or by scale."""

    tau: float
    by: str

    def before(self, call):
        if self.by == "q":
            return replace(call, q=call.q / self.tau)
        return replace(call, scale=call.scale / self.tau)


@dataclass(frozen=True)
class ScaleValues(Intervention):
    factor: float

    def before(self, call):
        return replace(call, v=call.v * self.factor)


@dataclass(frozen=True)
class Narrow(Intervention):
    """A sliding window of the user's own."""

    window: int

    def before(self, call):
        return replace(call, mask=replace(call.mask, window=self.window))


def logits(model, tokens, **kw):
    with torch.no_grad():
        return model(tokens, **kw).logits


@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize("pad", ["none", "left"])
def test_scale_and_q_are_two_ways_to_the_same_temperature(build, pad):
    """q goes to the model's own kernel, scale to headscope's exact attention; on real tokens they agree."""
    model, tokens, mask = make(build), ids(2, 14), padding(pad, 2, 14)
    scope = Scope(model)
    results = []
    for by in ("q", "scale"):
        with scope.intervene(Temperature(2.0, by)):
            results.append(logits(model, tokens, attention_mask=mask))
    real = torch.ones(2, 14, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(results[0][real], results[1][real], rtol=1e-4, atol=1e-4)
    assert float((results[0] - logits(model, tokens, attention_mask=mask))[real].abs().max()) > 1e-2


def test_a_changed_mask_is_the_model_with_that_mask():
    model = make(llama)
    narrow = make(mistral)  # the same weights and layout, with a window of 8
    tokens = ids(2, 20)
    narrow.load_state_dict(model.state_dict())
    with Scope(model).intervene(Narrow(8)):
        got = logits(model, tokens)
    torch.testing.assert_close(got, logits(narrow, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_changed_values_in_generation(cache):
    """With a static cache the call's values are cut to the tokens so far; the rest of the room must stay where it is."""
    model, twin, tokens = make(llama), make(llama), ids(1, 7)
    with torch.no_grad():
        for layer in twin.model.layers:
            layer.self_attn.o_proj.weight *= 2
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    with torch.no_grad(), Scope(model).intervene(ScaleValues(2.0)):
        got = model.generate(tokens, **options)
    with torch.no_grad():
        want = twin.generate(tokens, **options)
        assert not torch.equal(model.generate(tokens, **options), want)
    assert torch.equal(got, want)


def test_the_order_is_that_of_the_blocks():
    model, tokens = make(llama), ids(1, 9)
    scope = Scope(model)
    seen = []

    @dataclass(frozen=True)
    class Note(Intervention):
        label: str

        def before(self, call):
            seen.append(self.label)
            return call

    with scope.intervene(Note("first"), Note("second")), scope.intervene(Note("third")):
        logits(model, tokens)
    assert seen == ["first", "second", "third"] * 2


def test_an_executor_acts_after_interventions_and_before_observers():
    model, tokens = make(llama), ids(1, 9)
    scope = Scope(model)
    scales = []

    class Zero:
        def execute(self, call):
            scales.append(call.scale)
            return call.q.new_zeros(1, 9, 4, 8) if call.layer == 0 else None

    twin = make(llama)
    with torch.no_grad():
        twin.model.layers[0].self_attn.o_proj.weight.zero_()
    with scope.intervene(ScaleValues(1.0)), scope.executing(Zero()):
        got = logits(model, tokens)
        stats = scope.capture(tokens, statistics=["entropy"])
    torch.testing.assert_close(got, logits(twin, tokens))
    torch.testing.assert_close(stats["entropy"][1], Scope(twin).capture(tokens, statistics=["entropy"])["entropy"][1])
    assert scales == [8**-0.5] * 4


def test_only_interventions_are_accepted():
    scope = Scope(make(llama))
    for wrong, words in (((lambda call: call,), "not an intervention"), ((), "at least one")):
        with pytest.raises(InterventionError, match=words), scope.intervene(*wrong):
            pytest.fail("the block was entered")


def test_a_name_is_given_once():
    with pytest.raises(InterventionError, match=r"head_mask.*HeadMask"):
        register("head_mask")(Narrow)
    assert REGISTRY["head_mask"].__name__ == "HeadMask"

"""Two edits at once in generate(): padded batches, both kinds of caches, and what is left after an exception."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headscope.interventions import (
    ACT,
    BoostScores,
    CircuitReuse,
    EntropyABF,
    HeadMask,
    KeyBias,
    Mix,
    Noise,
    Redistribute,
    RescaledPattern,
    Scale,
    SetBias,
    SoftInjection,
    SoftplusReweighting,
    Temperature,
    record_heads,
)
from headscope.plans import Streaming
from headscope.scope import Scope

from ..core.tiny_models import ids, llama, make, mistral, padding
from .edit_table import VALUES, logits

# ---- generation ---------------------------------------------------------------------------------------------------------------

PAIRS = [
    (KeyBias("0.1,1.3", "first", 0.7), Redistribute("0.1,1.3", [2, 3], 0.4)),
    (Temperature("0.1,1.3", 2.0), Mix("0.1,1.2", "uniform", 0.5)),
    (BoostScores("0.1,1.3", [1, 6], 0.6), Redistribute("0.1,1.3", "first", 0.4)),
    (Redistribute("0.1,1.3", "first", 0.2), HeadMask("0.0,1.2", "uniform")),
    (SetBias("0.1,1.3", "first", mass=0.5), Noise("0.1,1.3", 0.3)),
    (Mix("0.1,1.3", "identity", 0.5), Scale("0.1,1.0", 2.0)),
    (EntropyABF("0.1,1.3", 4), SoftplusReweighting("0.1,1.3", power=2.0)),
    (RescaledPattern("0.1,1.3", Streaming(1, 3), "exact"), Scale("0.1,1.0", 2.0)),
]
COUNTING = [
    (ACT("0.1,1.3,1.0", alpha=1.5), HeadMask("0.0,1.2", "uniform")),
    (CircuitReuse("0.1,1.3", [[0, 2], [1, 3]]), SoftInjection("0.1,1.0", VALUES[:2], 0.4)),
]
"""Pairs of which one remembers the prompt: reading the whole text at once is another thing for them."""


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(edit.name for edit in pair))
@pytest.mark.parametrize("build", [llama, mistral], ids=lambda build: build.__name__)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_two_edits_in_a_padded_generation_equal_reading_the_whole_text(pair, build, cache):
    model, tokens, mask = make(build).double(), ids(2, 9), padding("left", 2, 9)
    scope = Scope(model)
    with scope.intervene(*pair), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, cache_implementation=cache)
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], 1)
    with scope.intervene(*pair), record_heads(scope, sites=("z",)) as once:
        full = logits(model, out.ids[:, :-1], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0))
    for layer in (0, 1):
        torch.testing.assert_close(steps.z(layer)[whole.bool()], once.z(layer)[whole.bool()], rtol=1e-8, atol=1e-8)
    assert torch.equal(full[:, 8:].argmax(-1), out.new_ids)


@pytest.mark.parametrize("pair", COUNTING, ids=lambda pair: "+".join(edit.name for edit in pair))
def test_what_remembers_the_prompt_does_so_in_both_caches_and_in_any_batch(pair):
    """Static and dynamic caches give the same heads, and each sequence of a padded batch gives what it gives alone, where none is padded;
    a second generation in the block begins anew."""
    model, tokens, mask = make(llama).double(), ids(2, 9), padding("left", 2, 9)
    scope, found = Scope(model), []
    with scope.intervene(*pair):
        for cache in ("dynamic", "static", "dynamic"):
            with record_heads(scope, sites=("z",)) as record:
                out = scope.generate(tokens, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, cache_implementation=cache)
            found.append((out.ids, [record.z(layer) for layer in (0, 1)]))
    whole = torch.cat([mask, torch.ones(2, 4, dtype=torch.int64)], 1).bool()
    for other, z in found[1:]:
        assert torch.equal(other, found[0][0])
        for a, b in zip(z, found[0][1], strict=True):
            torch.testing.assert_close(a[whole], b[whole], rtol=1e-9, atol=1e-9)
    start = int(mask[1].argmax())
    assert start > 0
    alone = [replace(edit, keys=[[1, 3]]) if isinstance(edit, CircuitReuse) else edit for edit in pair]
    with scope.intervene(*alone), record_heads(scope, sites=("z",)) as record:
        out = scope.generate(tokens[1:, start:], max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(out.ids[0], found[0][0][1, start:])
    for layer in (0, 1):
        torch.testing.assert_close(record.z(layer)[0], found[0][1][layer][1, start:], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pair", [*PAIRS, COUNTING[0]], ids=lambda pair: "+".join(edit.name for edit in pair))
def test_an_exception_in_the_middle_of_a_generation_leaves_the_model_as_it_was(pair):
    from transformers import StoppingCriteria

    class Stop(StoppingCriteria):
        def __call__(self, tokens, scores, **kwargs):
            if tokens.shape[1] == 12:
                raise ZeroDivisionError("in the middle")
            return torch.zeros(len(tokens), dtype=torch.bool)

    model, tokens = make(llama), ids(1, 9)
    scope = Scope(model)
    plain, state = logits(model, tokens), {name: value.clone() for name, value in model.state_dict().items()}
    want = scope.generate(tokens, max_new_tokens=6).ids
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    with pytest.raises(ZeroDivisionError), scope.intervene(*pair):
        scope.generate(tokens, max_new_tokens=8, stopping_criteria=[Stop()])
    assert torch.equal(logits(model, tokens), plain)
    assert torch.equal(scope.generate(tokens, max_new_tokens=6).ids, want)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks


def test_statistics_see_a_key_bias():
    """A bias is part of the call: what is measured is the attention that the bias made."""
    scope = Scope(make(llama))
    scope_double = Scope(scope.model.double())
    with scope_double.intervene(KeyBias("0.1", [0], 30.0)):
        stats = scope_double.capture(ids(1, 9), statistics=["sink_mass"], sink_tokens=1)
    mass = stats["sink_mass"][0][0]
    assert float(mass[1].min()) > 0.999
    assert float(mass[0].min()) < 0.9


def test_only_the_biased_heads_are_computed_anew():
    """The other heads stay the model's own kernel's, to the bit."""
    scope, tokens = Scope(make(llama)), ids(1, 9)
    with record_heads(scope, sites=("z",)) as plain:
        logits(scope.model, tokens)
    with scope.intervene(KeyBias("0.1", [0], 2.0)), record_heads(scope, sites=("z",)) as biased:
        logits(scope.model, tokens)
    assert torch.equal(biased.z(0)[:, :, [0, 2, 3]], plain.z(0)[:, :, [0, 2, 3]])
    assert not torch.equal(biased.z(0)[:, :, 1], plain.z(0)[:, :, 1])

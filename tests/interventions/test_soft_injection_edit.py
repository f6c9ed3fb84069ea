"""SoftInjection as an intervention: the edit against hooks on W_O's input, padding and caches, and a task put into SmolLM2."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.errors import DataError, InterventionError
from headscope.interventions import SoftInjection, from_json, record_heads
from headscope.probes.contrast import last_logits
from headscope.probes.icl_tasks import ICL_TASKS
from headscope.probes.soft_injection import encoded
from headscope.scope import Scope

from ..core.tiny_models import ids, padding

VALUES = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GATES = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)


def biased():
    """Two layers of four heads in float64; W_O has a bias, which a product written by hand would lose."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        initializer_range=0.4, attention_bias=True, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.normal_()
    return model


def hooked(model, tokens, last, **kw):
    """(1 - a) z + a t at row `last[b]` of each sequence, by hooks on o_proj's input."""
    handles = []
    for layer, block in enumerate(model.model.layers):

        def edit(part, args, layer=layer):
            z = args[0].clone().unflatten(-1, (4, 8))
            gate, task = GATES[4 * layer : 4 * layer + 4, None], VALUES[4 * layer : 4 * layer + 4]
            for b, row in enumerate(last):
                z[b, row] = (1 - gate) * z[b, row] + gate * task
            return (z.flatten(2),)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(edit))
    try:
        return model(tokens, **kw).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@torch.no_grad()
def test_the_last_real_token_is_moved_and_no_other(pad):
    model, tokens, mask = biased(), ids(2, 10), padding(pad, 2, 10)
    real = torch.ones(2, 10, dtype=torch.bool) if mask is None else mask.bool()
    last = [int(row.nonzero()[-1]) for row in real]
    scope, edit = Scope(model), SoftInjection("all", VALUES, GATES)
    with scope.intervene(edit):
        got = model(tokens, attention_mask=mask).logits
    want = hooked(model, tokens, last, attention_mask=mask)
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-10)
    for b, row in enumerate(last):
        before = real[b].clone()
        before[row] = False
        torch.testing.assert_close(got[b, before], model(tokens, attention_mask=mask).logits[b, before], rtol=0, atol=1e-10)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens_are_not_edited(cache):
    model, tokens, mask = biased(), ids(2, 9), padding("left", 2, 9)
    scope, edit = Scope(model), SoftInjection("all", VALUES, GATES)
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, cache_implementation=cache)
    whole = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
    again = SoftInjection("all", VALUES, GATES, positions=(8,))
    with torch.no_grad(), scope.intervene(again), record_heads(scope, sites=("z",)) as once:
        model(out.ids[:, :-1], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0))
    for layer in (0, 1):
        torch.testing.assert_close(steps.z(layer)[whole.bool()], once.z(layer)[whole.bool()], rtol=0, atol=1e-9)


@torch.no_grad()
def test_shut_gates_are_nothing_to_the_bit_and_open_ones_are_the_task():
    model, tokens = biased(), ids(1, 7)
    scope = Scope(model)
    plain = model(tokens).logits
    for shut in (0.0, torch.zeros(8)):
        with scope.intervene(SoftInjection("all", VALUES, shut)):
            assert torch.equal(model(tokens).logits, plain)
    with scope.intervene(SoftInjection([(0, 2), (1, 1)], VALUES[:2], 1.0)), record_heads(scope, sites=("z",)) as record:
        model(tokens)
    assert torch.equal(record.z(0)[0, -1, 2], VALUES[0])
    assert torch.equal(record.z(1)[0, -1, 1], VALUES[1])


def test_a_task_that_examples_taught_helps_questions_it_never_saw(smollm2):
    """Plurals, learnt from a few prompts of four examples: the loss on held-out nouns falls, that on another task's questions hardly."""
    pairs = list(dict.fromkeys(ICL_TASKS["plurals"]))
    held, rest = pairs[:6], pairs[6:30]
    other = list(dict.fromkeys(ICL_TASKS["past"]))[:6]
    edit = SoftInjection.prepared(smollm2, rest, shots=4, prompts=4, steps=20, every=10, progress=False)

    def loss(asked, change=None):
        total = 0.0
        for question in asked:
            tokens, answer = encoded(smollm2, question, [])
            with torch.no_grad(), nullcontext() if change is None else smollm2.intervene(change):
                total -= float(last_logits(smollm2, [tokens])[0].double().log_softmax(-1)[answer])
        return total / len(asked)

    gain, elsewhere = loss(held) - loss(held, edit), loss(other) - loss(other, edit)
    assert gain > 3.0
    assert elsewhere < gain / 2
    assert edit.gates.tensor.shape == (270,)
    assert 0.0 < float(edit.gates.tensor.min()) < float(edit.gates.tensor.max()) < 1.0
    assert SoftInjection.prompt("cat") == "Q: cat\nA:"


def test_refusals_and_json(tmp_path, smollm2, tiny_llama):
    for gates, message in ((1.5, "shares"), (torch.tensor([0.5, -0.1]), "shares"), ("half", "no tensor")):
        with pytest.raises(InterventionError, match=message):
            SoftInjection([(0, 0), (0, 1)], torch.zeros(2, 8), gates)
    with pytest.raises(InterventionError, match="one vector per head"):
        SoftInjection([(0, 0)], torch.zeros(1, 5, 8))
    with pytest.raises(InterventionError, match="3 values of gates"):
        SoftInjection("all", torch.zeros(8, 8), torch.full((3,), 0.5)).bind(Scope(tiny_llama))
    with pytest.raises(InterventionError, match="without a tokenizer"):
        SoftInjection.prepared(Scope(tiny_llama), [("a", "b")] * 20)
    with pytest.raises(InterventionError, match="12 pairs"):
        SoftInjection.prepared(smollm2, list(ICL_TASKS["plurals"][:12]))
    with pytest.raises(DataError, match="as pairs"):
        SoftInjection.prepared(smollm2, "plurals")
    edit = SoftInjection([(0, 0), (1, 1)], VALUES[:2].float(), GATES[:2].float(), order=1)
    assert from_json(edit.to_json(tmp_path / "task.safetensors"), tmp_path) == edit
    assert from_json(SoftInjection([(0, 0)], VALUES[:1], 0.25).to_json(tmp_path / "one.safetensors"), tmp_path).gates == 0.25
    assert "0 of 2 above a half" in edit.explain()
    assert "at the last prompt token" in edit.explain()

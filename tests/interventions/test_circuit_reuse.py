"""CircuitReuse against rows of the dense matrix, with padding, groups and a cache; its control; and that it repairs a planted circuit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import headscope as hs
from headscope.errors import InterventionError
from headscope.interventions import CircuitReuse, SetRows, from_json, record_heads
from headscope.models import bundled
from headscope.scope import Scope

from ..core.tiny_models import gemma2, gpt_oss, ids, llama, make, mistral, padding
from .dense_edits import Dense
from .edit_cases import Grab

HEADS = [(0, 1), (1, 3), (1, 0)]
TRUTH = Path(bundled.__file__).parent / "weights" / "induction" / "truth.json"


def run(scope, edit, tokens, **kw):
    kept = []
    with torch.no_grad(), scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record:
        scope.model(tokens, **kw)
    return kept, record


@pytest.mark.parametrize(("build", "impl"), [(llama, "sdpa"), (mistral, "sdpa"), (gemma2, "eager"), (gpt_oss, "eager")])
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_the_row_is_the_mean_of_the_named_values(build, impl, pad):
    model, tokens, mask = make(build, impl), ids(2, 10), padding(pad, 2, 10)
    exact = build is not gpt_oss
    scope = Scope(model.double() if exact else model)
    calls, record = run(scope, CircuitReuse(HEADS, [[1, 3], [0, 4]]), tokens, attention_mask=mask)
    real = torch.ones(2, 10, dtype=torch.bool) if mask is None else mask.bool()
    for call in calls:
        mine = [head for layer, head in HEADS if layer == call.layer]
        got, want = record.z(call.layer).double(), Dense(call).output
        for b, keys in enumerate(([1, 3], [0, 4])):
            first, last = int(real[b].nonzero()[0]), int(real[b].nonzero()[-1])
            for head in mine:
                mean = call.v[b, head // call.group, [first + one for one in keys]].double().mean(0)
                assert float((got[b, last, head] - mean).abs().max()) < (1e-10 if exact else 1e-5)
                want[b, last, head] = got[b, last, head]
        seen = real & got.isfinite().flatten(2).all(-1)  # gemma2's own eager attention spreads NaN from padding behind a window
        assert float((got - want)[seen].abs().max()) < 1e-5, "nothing else is edited"  # eager softmax is float32 in any dtype


def test_one_list_of_keys_is_set_rows():
    model, tokens = make(llama).double(), ids(2, 9)
    scope = Scope(model)
    with torch.no_grad():
        with scope.intervene(CircuitReuse(HEADS, [2, 5])):
            got = model(tokens).logits
        with scope.intervene(SetRows(HEADS, [2, 5], positions="last_prompt")):
            want = model(tokens).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(got[:, :-1], model(tokens).logits[:, :-1], rtol=0, atol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens_are_not_edited(cache):
    """Decoding with a cache is the whole text read again with the prompt's last row edited, and no other."""
    model, tokens, mask = make(llama).double(), ids(2, 9), padding("left", 2, 9)
    scope, edit = Scope(model), CircuitReuse(HEADS, [[0, 2], [1, 3]])
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, cache_implementation=cache)
    whole = out.ids[:, :-1]
    longer = torch.cat([mask, torch.ones(2, whole.shape[1] - 9, dtype=mask.dtype)], 1)
    with torch.no_grad(), scope.intervene(replace(edit, positions=(8,))), record_heads(scope, sites=("z",)) as again:
        model(whole, attention_mask=longer, position_ids=(longer.cumsum(1) - 1).clamp_min(0))
    real = longer.bool()
    for layer in (0, 1):
        torch.testing.assert_close(steps.z(layer)[real], again.z(layer)[real], rtol=0, atol=1e-9)


def test_it_repairs_a_circuit_that_looks_at_the_wrong_token():
    """A planted induction model is asked with a token that never occurred: its heads have nothing to copy from. Set on the token after
    another one they say what stands there, and on other keys they do not."""
    scope = hs.load("bundled:induction")
    heads = [tuple(pair) for pair in json.loads(TRUTH.read_text())["induction"]]
    draw = torch.Generator().manual_seed(0)
    vocabulary = scope.model.config.vocab_size
    tokens = torch.stack([torch.randperm(vocabulary - 8, generator=draw)[:32] + 4 for _ in range(16)])
    at = torch.randint(3, 28, (16,), generator=draw)
    edit = CircuitReuse(heads, [[int(one)] for one in at])
    wanted = tokens.gather(1, at[:, None])[:, 0]

    def says(change):
        with torch.no_grad(), scope.intervene(change):
            return float((scope.model(tokens).logits[:, -1].argmax(-1) == wanted).double().mean())

    with torch.no_grad():
        plain = float((scope.model(tokens).logits[:, -1].argmax(-1) == wanted).double().mean())
    controls = [says(edit.control(31, seed)) for seed in range(3)]
    assert plain <= 0.1
    assert says(edit) >= 0.8
    assert max(controls) <= 0.1, controls


def test_a_control_has_other_keys():
    edit = CircuitReuse(HEADS, [[1, 3], [0, 4]])
    for seed in range(5):
        other = edit.control(9, seed)
        assert all(len(a) == 2 and not set(a) & set(b) and max(a) < 9 for a, b in zip(other.keys, edit.keys, strict=True))
    assert edit.control(9, 1) == edit.control(9, 1)
    assert edit.control(9, 1).heads == edit.heads
    with pytest.raises(InterventionError, match="1 others are left"):
        CircuitReuse(HEADS, [0, 1]).control(3)


@pytest.mark.parametrize("keys", [[], [1, 1], [[1, 2], [3]], [-1], "12", [True], [[]]])
def test_bad_keys_are_refused(keys):
    with pytest.raises(InterventionError, match="different token numbers"):
        CircuitReuse(HEADS, keys)


def test_keys_that_are_not_seen_and_json():
    model, tokens = make(llama), ids(2, 8)
    scope = Scope(model)
    with torch.no_grad(), pytest.raises(InterventionError, match="key 9 of sequence 0"), scope.intervene(CircuitReuse(HEADS, [2, 9])):
        model(tokens)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad(), pytest.raises(InterventionError, match="key 5 of sequence 1"), scope.intervene(CircuitReuse(HEADS, [2, 5])):
        model(tokens, attention_mask=mask)
    early = CircuitReuse(HEADS, [3], positions=[2])
    with torch.no_grad(), pytest.raises(InterventionError, match="key 3"), scope.intervene(early):
        model(tokens)
    for edit in (CircuitReuse(HEADS, [1, 3]), CircuitReuse(HEADS, [[1, 3], [0, 4]], order=1)):
        assert from_json(edit.to_json()) == edit
    assert "tokens 1, 3 alone" in CircuitReuse(HEADS, [1, 3]).explain()
    assert "at the last prompt token" in CircuitReuse(HEADS, [1, 3]).explain()

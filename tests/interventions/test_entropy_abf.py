"""EntropyABF against the dense matrix, with padding, chunks and decode steps, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import EntropyABF, from_json
from headscope.interventions.head_edit import Bound
from headscope.kernels.partial import exact_attention
from headscope.scope import Scope

from ..core.diffusion_models import MODELS
from .dense_edits import Dense, close
from .edit_cases import calls

HEADS = [0, 2]


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, call in calls() if call.mask.causal], ids=lambda one: one if isinstance(one, str) else ""
)
def test_dense(name, call):
    """Scores q.k times max(1, ln(i + 1) / ln c), then soft cap, bias and sinks as ever."""
    edit = replace(EntropyABF([(0, head) for head in HEADS], 5), _bound=Bound({"m": HEADS}, {"m": [0, 1]}))
    edited = edit.before(call)
    first = torch.zeros(call.q.shape[0], dtype=torch.int64) if call.first_token is None else call.first_token
    q = call.q.clone()
    for b in range(q.shape[0]):
        for row in range(q.shape[2]):
            seen = max(row + call.query_offset - int(first[b]) + 1, 1)
            q[b, HEADS, row] *= max(1.0, math.log(seen) / math.log(5))
    close(exact_attention(edited), Dense(replace(call, q=q)))
    assert torch.equal(edited.q[:, 1], call.q[:, 1])
    assert not torch.equal(edited.q[:, HEADS], call.q[:, HEADS])


def test_decode_equals_the_whole_sequence_and_padding_does_not_count(tiny_llama):
    scope = Scope(tiny_llama.double())
    tokens = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    edit = EntropyABF("all", 8)
    with torch.no_grad(), scope.intervene(edit):
        whole = tiny_llama(tokens, attention_mask=mask).logits
        alone = tiny_llama(tokens[1:, 6:]).logits
        part = tiny_llama(tokens[:, :15], attention_mask=mask[:, :15], use_cache=True)
        cache, rows = part.past_key_values, [part.logits]
        for at in range(15, 20):
            out = tiny_llama(tokens[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache, use_cache=True)
            rows.append(out.logits)
    torch.testing.assert_close(torch.cat(rows, 1)[mask.bool()], whole[mask.bool()], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole[1:, 6:], alone, rtol=1e-6, atol=1e-7)  # rotary tables are float32
    with torch.no_grad():
        plain = tiny_llama(tokens[:1]).logits
        with scope.intervene(EntropyABF("all", 20)):
            assert torch.equal(tiny_llama(tokens[:1]).logits, plain)
    torch.testing.assert_close(whole[0, :8], plain[0, :8], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole[0, 8:], plain[0, 8:], atol=1e-6)


def test_refusals_and_json():
    for trained in (1, 0, 4096.0, True):
        with pytest.raises(InterventionError, match="length in tokens"):
            EntropyABF("all", trained)
    with pytest.raises(InterventionError, match="whole sequence"):
        EntropyABF([(0, 0)]).bind(Scope(MODELS["dit"]()))
    edit = EntropyABF([(0, 1)], 2048, layers=(0, 4))
    assert from_json(edit.to_json()) == edit
    assert "ln 2048" in edit.explain()

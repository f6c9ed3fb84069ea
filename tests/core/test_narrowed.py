"""The attention that the needle model is trained with: blocks against a mask, who may look far, what is pulled and what is dropped."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headscope.models.bundled.ablation import streaming_but, streaming_mask
from headscope.models.bundled.narrowed import Narrowed, attach, streaming_attention
from headscope.models.bundled.train_needle import build


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 800, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(3)
    return build(hidden=64, layers=3).double().eval()


@pytest.mark.parametrize(
    ("count", "sink", "window", "heads", "keys"), [(96, 4, 16, 8, 4), (37, 3, 8, 6, 3), (5, 4, 16, 2, 1), (64, 0, 32, 2, 2)]
)
def test_blocks_are_the_masked_attention_and_its_gradient(count, sink, window, heads, keys):
    source = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(2, each, count, 8, dtype=torch.float64, generator=source).requires_grad_() for each in (heads, keys, keys))
    mask = streaming_mask(count, sink, window, "cpu")
    given = {"attn_mask": mask, "scale": 0.3, "enable_gqa": True}
    found = streaming_attention(q, k, v, sink=sink, window=window, scale=0.3)
    expected = scaled_dot_product_attention(q, k, v, **given)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    toward = torch.randn(found.shape, dtype=torch.float64, generator=source)
    for one, other in zip(torch.autograd.grad(found, (q, k, v), toward), torch.autograd.grad(expected, (q, k, v), toward), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_open_it_is_the_plain_model_and_afterwards_too(model, ids):
    expected = model(ids, use_cache=False).logits
    narrowed = Narrowed({1: 1})
    attach(model, narrowed)
    narrowed.set(closed=False)
    assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-12)
    assert len(narrowed.strays) == 3
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_closed_only_the_designated_heads_see_all_keys(model, ids):
    """Against transformers' own attention under a mask per head."""
    with streaming_but(model.model.layers, [(1, 0), (2, 0), (2, 1)], 2, streaming_mask(70, 4, 16, "cpu")):
        expected = model(ids, attention_mask=streaming_mask(70, 4, 16, "cpu").expand(2, -1, -1, -1), use_cache=False).logits
    plain = model(ids, use_cache=False).logits
    narrowed = Narrowed({1: 1, 2: 2}, sink=4, window=16)
    attach(model, narrowed)
    narrowed.set(closed=True)
    found = model(ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-12)
    assert (found - plain).abs().max() > 1e-3
    assert narrowed.strays == []


def test_strays_are_none_where_the_window_holds_the_text_and_the_designated_heads_owe_nothing(model, ids):
    narrowed = Narrowed({0: 4}, sink=4, window=16)
    attach(model, narrowed)
    narrowed.set(closed=False)
    model(ids[:, :16], use_cache=False)
    assert len(narrowed.strays) == 2, "a layer whose heads are all designated owes nothing"
    assert max(stray.item() for stray in narrowed.strays) < 1e-20
    narrowed.set(closed=False)
    model(ids, use_cache=False)
    assert min(stray.item() for stray in narrowed.strays) > 1e-3


def test_dropped_heads_write_nothing(model, ids):
    narrowed = Narrowed({1: 1})
    kept = narrowed.drop(400, model.config, 0.2, torch.Generator().manual_seed(0))
    assert kept.shape == (400, 3, 8)
    assert bool(kept[:200].all())
    assert bool(kept[:, 1, :2].all()), "the designated key head's two query heads"
    free = torch.ones(3, 8, dtype=torch.bool)
    free[1, :2] = False
    assert float(kept[200:, free].mean()) == pytest.approx(0.8, abs=0.02)
    expected = model(ids, use_cache=False).logits
    attach(model, narrowed)
    only = torch.ones(2, 3, 8)
    only[1, 2, 5] = 0
    narrowed.set(closed=False, kept=only)
    found = model(ids, use_cache=False).logits
    assert torch.allclose(found[0], expected[0], atol=1e-12)
    weight = model.model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, 5 * 16 : 6 * 16] = 0
    narrowed.set(closed=False)
    assert torch.allclose(found[1], model(ids, use_cache=False).logits[1], atol=1e-12)

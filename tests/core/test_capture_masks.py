"""Masks are read for what they hold: matrices become facts where facts say the same, by absolute position."""

from __future__ import annotations

import pytest
import torch

from headscope.call import MaskFacts
from headscope.capture.masks import Place, from_tensor, recognise, visible
from headscope.errors import CaptureError

ROWS, START, KEYS = 5, 20, 25


def matrix(*, causal=True, window=None, hidden=(), rows=ROWS, start=START, keys=KEYS, first=0):
    t, s = torch.arange(rows)[:, None] + start, torch.arange(keys)[None] + first
    seen = (s <= t) if causal else torch.ones(rows, keys, dtype=torch.bool)
    if window is not None:
        seen = seen & ((t - s if causal else (t - s).abs()) < window)
    seen = seen & ~torch.tensor([int(key) in hidden for key in s[0]])
    return seen[None, None]


def place(**kw):
    return Place(**{"batch": 1, "rows": ROWS, "keys": KEYS, "query_offset": START, "key_offset": 0, "causal": True, **kw})


def read(seen, **kw):
    return recognise(from_tensor(seen, seen.shape[2], seen.shape[3]), place(**kw))


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda m: m, additive, lambda m: m.long()], ids=["bool", "float", "int"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 8), (False, None), (False, 23)])
def test_causality_and_windows_are_recognised(form, causal, window):
    facts = read(form(matrix(causal=causal, window=window)), windows=(8, 23))
    assert (facts.causal, facts.window) == (causal, window)
    assert facts.allowed is None
    assert facts.bias is None
    assert facts.key_valid is None


def test_a_flag_that_says_causal_does_not_make_it_so():
    """The host's flag is only the first guess: the matrix decides."""
    assert read(matrix(causal=False), causal=True).causal is False
    assert read(matrix(causal=True), causal=False).causal is True


def test_padding_is_read_off_the_matrix_where_nobody_told():
    facts = read(matrix(hidden=(0, 1, 2)))
    assert facts.key_valid.tolist() == [[key > 2 for key in range(KEYS)]]
    assert facts.query_valid is None


def test_keys_out_of_the_windows_reach_are_not_taken_for_padding():
    """A full cache under a sliding mask: old keys are unseen by these rows and real all the same; what earlier calls knew stays known."""
    seen = matrix(window=8, hidden=(0, 1))
    facts = read(seen, windows=(8,))
    assert facts.key_valid is None
    known = torch.ones(1, START, dtype=torch.bool)
    known[:, :2] = False
    facts = read(seen, windows=(8,), known=known)
    assert facts.key_valid.tolist() == [[key > 1 for key in range(KEYS)]]
    assert (facts.causal, facts.window, facts.allowed) == (True, 8, None)


def test_rows_of_padding_at_the_ends_and_hidden_keys_in_the_middle():
    """A key that all rows ignore in the middle of a text is somebody's experiment: its own row still counts."""
    square = {"rows": 8, "start": 0, "keys": 8}
    facts = read(matrix(hidden=(0, 1, 4), **square), rows=8, keys=8, query_offset=0)
    assert facts.key_valid.tolist() == [[False, False, True, True, False, True, True, True]]
    assert facts.query_valid.tolist() == [[False, False, True, True, True, True, True, True]]


def test_a_sliding_caches_keys_start_late():
    facts = read(matrix(window=8, keys=12, first=13), keys=12, key_offset=13, windows=(8,))
    assert (facts.causal, facts.window, facts.allowed) == (True, 8, None)


def test_anything_else_is_kept_and_what_is_kept_is_what_was_given():
    generator = torch.Generator().manual_seed(0)
    seen = matrix() & (torch.rand(1, 3, ROWS, KEYS, generator=generator) > 0.3)
    facts = read(seen)
    assert torch.equal(visible(facts, torch.arange(ROWS) + START, torch.arange(KEYS)), seen)
    assert facts.causal
    prefix = matrix(rows=6, start=0, keys=6)
    prefix[..., :3, :3] = True  # an image whose patches see one another
    facts = read(prefix, rows=6, keys=6, query_offset=0)
    assert not facts.causal
    assert torch.equal(facts.allowed, prefix)


def test_what_a_float_mask_adds_becomes_the_bias():
    bias = additive(matrix())
    bias[..., 3] += torch.where(bias[..., 3] == 0, 0.5, 0.0)
    facts = read(bias)
    assert facts.causal
    assert facts.allowed is None
    assert set(facts.bias.unique().tolist()) == {0.0, 0.5}
    assert bool((facts.bias[..., 3] == 0.5).all())


def test_visible_is_every_fact_at_once():
    facts = MaskFacts(
        True,
        window=3,
        key_valid=torch.tensor([[True, False, True, True]]),
        query_segments=torch.tensor([[0, 0, 1, 1]]),
        key_segments=torch.tensor([[0, 0, 1, 1]]),
    )
    at = torch.arange(4)
    assert visible(facts, at, at)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(1, 1, 3, KEYS), (1, 1, ROWS, 7), (1, 1, 1, ROWS, KEYS), (4,)])
def test_masks_of_unknown_shape_are_refused(shape):
    with pytest.raises(CaptureError, match=r"an attention mask of shape .* for 5 queries and 25 keys"):
        from_tensor(torch.ones(shape, dtype=torch.bool), ROWS, KEYS)

"""What the tests of the primitives share: calls of every kind, some of their heads, rows and keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headscope.kernels.partial import exact_attention

from .dense_edits import Dense
from .edit_cases import calls

CALLS = calls()
every_call = pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
on_rows = pytest.mark.parametrize("restricted", [False, True], ids=["all rows", "some rows"])


def heads_of(call):
    """Some heads, of more than one group where there is one, not in order."""
    return [call.q.shape[1] - 1, 0] if call.q.shape[1] > 3 else [1]


def rows_of(call, restricted):
    if not restricted:
        return True
    rows = torch.rand(call.q.shape[0], call.q.shape[2], generator=torch.Generator().manual_seed(3)) < 0.5
    rows[:, -1] = True
    return rows


def some_keys(call, seed=5, share=0.4):
    """A key set per sequence; the first key is in it."""
    keys = torch.rand(call.q.shape[0], call.k.shape[2], generator=torch.Generator().manual_seed(seed)) < share
    keys[:, 0] = True
    keys[:, 1] = False
    return keys


def fresh(call):
    return replace(call, facts=dict(call.facts)), Dense(call)


def outside(call, got, output, heads, rows):
    """Heads and rows that were not named are the same to the bit."""
    other = [head for head in range(call.q.shape[1]) if head not in heads]
    assert torch.equal(got[:, :, other], output[:, :, other])
    if rows is not True:
        assert torch.equal(got[~rows.expand(got.shape[:2])], output[~rows.expand(got.shape[:2])])


def ran(call):
    return exact_attention(call)

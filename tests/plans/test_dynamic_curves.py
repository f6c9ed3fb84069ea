"""What settings of a rule keep: looked up in tile masses or masked entry by entry, it is the weight of the kept entries; and what is
remembered of a call is forgotten when the call changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.plans import Blocks, Dense, Lines, Pattern, TopBlocks
from headscope.plans.dynamic_anchor import Stripes
from headscope.plans.dynamic_curves import held
from headscope.plans.dynamic_flexprefill import FlexBlocks
from headscope.plans.indices import choose
from headscope.plans.remembered import Newest

LENGTH = 300


def call_of(seed: int = 0) -> AttentionCall:
    """Four query heads on two key heads, 300 tokens."""
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, 4, LENGTH, 16, generator=generator)
    k, v = (torch.randn(1, 2, LENGTH, 16, generator=generator) for _ in range(2))
    return AttentionCall("m", 0, q, k, v, 0.25, MaskFacts(causal=True))


def weights_of(call: AttentionCall) -> torch.Tensor:
    """A [4, N, N] float64."""
    scores = call.q[0].double() @ call.k[0].double().repeat_interleave(2, 0).transpose(-1, -2) * call.scale
    return torch.softmax(scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf), -1)


@pytest.mark.parametrize("mixed", [False, True])
def test_held_is_the_weight_of_the_kept_entries(mixed: bool) -> None:
    call = call_of()
    settings: list[Pattern] = [TopBlocks(mass=mass, rule="antidiagonal", block=32, stride=8) for mass in (0.3, 0.7, 0.95)]
    chosen = [
        [*(choose(call, head, one) for one in settings), Dense(), *([Lines((0, 5), (0, 1, 9))] if mixed else [])] for head in range(4)
    ]
    assert all(isinstance(one, Blocks) for row in chosen for one in row[:3])
    found = held(call, chosen)
    weights, at = weights_of(call), torch.arange(LENGTH)
    expected = [
        [float((weights[head] * row[number].visible(at, at)).sum()) for head, row in enumerate(chosen)] for number in range(len(chosen[0]))
    ]
    assert np.allclose(found, expected, atol=1e-3)
    assert np.allclose(found[3], LENGTH, atol=1e-3)
    assert (np.diff(found[:3], axis=0) > 1).all(), "a larger threshold holds more"


@pytest.mark.parametrize(
    "rules",
    [
        [TopBlocks(mass=mass, rule="pooled", block=32) for mass in (0.2, 0.9)],
        [Stripes(theta=theta, block=32, step=2) for theta in (0.5, 4.0)],
        [FlexBlocks(gamma=gamma, block=32) for gamma in (0.2, 0.95)],
    ],
)
def test_a_choice_is_the_same_whatever_was_asked_before(rules: list[Pattern]) -> None:
    call = call_of()
    alone = [[choose(call_of(), head, rule) for rule in rules] for head in range(2)]
    assert [[choose(call, head, rule) for rule in rules] for head in range(2)] == alone
    assert alone[0][0] != alone[0][1]
    call.k.mul_(-1.0)  # written in place: what was made of it is no longer true
    other = call_of()
    other.k.mul_(-1.0)
    assert [choose(call, 1, rule) for rule in rules] == [choose(other, 1, rule) for rule in rules]
    assert [choose(call, 1, rule) for rule in rules] != alone[1]


def test_the_newest_is_made_once_per_call_and_key() -> None:
    made: list[str] = []
    newest: Newest[int] = Newest()

    def make(name: str) -> int:
        made.append(name)
        return len(made)

    one, two = call_of(1), call_of(2)
    assert [newest.of(one, (0,), lambda: make("a")), newest.of(one, (0,), lambda: make("b"))] == [1, 1]
    assert newest.of(one, (1,), lambda: make("c")) == 2
    assert newest.of(two, (1,), lambda: make("d")) == 3
    with torch.inference_mode():
        inner = call_of(3)
    assert [newest.of(inner, (0,), lambda: make("e")), newest.of(inner, (0,), lambda: make("f"))] == [4, 5]
    assert made == ["a", "c", "d", "e", "f"]

"""MoA's influence: finite differences of taking an edge out, block sums, spans of planted heads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from headscope import Scope
from headscope.errors import ProbeError
from headscope.interventions import Intervention
from headscope.models.planted import Induction, Previous, planted_llama
from headscope.probes import Moa, ProbeText
from headscope.probes.calls import each_call, weight_rows
from headscope.probes.moa import Traced, block_influence, edge_influence, influence, joined

N = 40


@pytest.fixture
def model(tiny_llama):
    with torch.no_grad():
        for name, weight in tiny_llama.named_parameters():
            if "proj" in name:
                weight.mul_(6.0)  # sharper attention, so that edges matter
    return tiny_llama.double()


@dataclass(frozen=True)
class Shift(Intervention):
    """z of one row of one head moves by `by`."""

    layer: int
    head: int
    row: int
    by: torch.Tensor

    def after(self, call, output):
        if call.layer != self.layer:
            return output
        moved = output.clone()
        moved[0, self.row, self.head] += self.by
        return moved


def loss_of(scope: Scope, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = scope.model(ids[None], use_cache=False).logits[0]
        return float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]))


def traced(scope: Scope, ids: torch.Tensor):
    calls = {}
    with torch.enable_grad(), scope.intervene(Traced(calls, frozenset(module.name for module in scope.topology.main))):
        logits = scope.model(ids[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    return calls, dict(zip(calls, torch.autograd.grad(loss, [z for _, z in calls.values()]), strict=True))


def test_influence_is_the_finite_difference_of_removing_an_edge(model) -> None:
    scope = Scope(model)
    ids = torch.randint(2, 97, (N,), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    calls, gradients = traced(scope, ids)
    checked = 0
    for name, head, (row, key) in itertools.product(calls, (0, 3), ((5, 2), (17, 0), (17, 17), (39, 30), (1, 0))):
        call, z = calls[name]
        exact = edge_influence(call, gradients[name], row, row + 1)[0, head, 0, key]
        weights = weight_rows(call, row, row + 1, torch.float64)[0, head, 0]
        value = call.v[0, head // 2]
        # what taking the edge out does to the row's output: the weights without it, renormalised
        without = weights.clone()
        without[key] = 0.0
        direction = (without / without.sum()) @ value - weights @ value
        torch.testing.assert_close(weights @ value, z[0, row, head].detach(), atol=1e-5, rtol=1e-5)
        losses = []
        for step in (1e-2, -1e-2):
            with scope.intervene(Shift(call.layer, head, row, step * direction)):
                losses.append(loss_of(scope, ids))
        measured = (losses[0] - losses[1]) / 2e-2
        assert float(exact) == pytest.approx(measured, rel=2e-3, abs=1e-7)
        checked += abs(float(exact)) > 1e-5
    assert checked >= 10


def test_blocks_sum_the_edges(model) -> None:
    scope = Scope(model)
    ids = torch.randint(2, 97, (N,), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    calls, gradients = traced(scope, ids)
    maps, loss = influence(scope, ids, 1, 16)
    assert loss == pytest.approx(loss_of(scope, ids), rel=1e-6)
    signed, _ = influence(scope, ids, 1, 16, absolute=False)
    for place, (call, _) in enumerate(calls.values()):
        # the formula on dense matrices, with autograd through the softmax weights themselves
        weights = weight_rows(call, 0, N, torch.float64).requires_grad_(True)
        values = call.v.repeat_interleave(2, 1).double()
        out = (weights @ values).transpose(1, 2)
        (g,) = torch.autograd.grad(out, weights, gradients[call.module].double())
        a = weights.detach()
        dense = -a * (g - (g * a).sum(-1, keepdim=True)) / (1 - a)
        dense[:, :, 0] = 0.0
        dense = dense.tril()[0]
        blocks = torch.nn.functional.pad(dense, (0, 8, 0, 8)).unflatten(1, (3, 16)).unflatten(3, (3, 16))
        torch.testing.assert_close(maps[place], blocks.abs().sum((2, 4)), atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(signed[place], blocks.sum((2, 4)), atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(block_influence(call, gradients[call.module], 16), maps[place], atol=1e-9, rtol=1e-6)
        assert float(maps[place].min()) >= 0
        # a row's signed influences, weighed back by 1 - A, cancel
        assert float((dense * (1 - a[0])).sum(-1).abs().max()) < 1e-12


def test_planted_spans() -> None:
    """Repeated words, block of 60: the induction head's weight is 60 back and matters; a head that writes nothing has no influence."""
    made = planted_llama({(0, 0): Previous(), (1, 0): Induction()}, layers=2, n_heads=2, vocab=80, max_positions=200, sharpness=4.0)
    ids = made.prompt(block=60, repeats=3)[0]
    found = Moa(response=0, block=16).run(Scope(made.model), data=ids)
    total = found["moa_influence"]
    assert float(total[1, 0]) > 1e-3
    assert float(total[0, 1]) == 0.0
    assert float(total[1, 1]) == 0.0
    blocks = -(-181 // 16)
    # the target is 59 back or 119: within 9 blocks of 16; BOS is in the first block, which every window keeps
    assert 5 / blocks <= float(found["moa_span"][1, 0]) <= 9 / blocks
    assert float(found["moa_span"][0, 0]) <= 2 / blocks
    assert float(found["moa_distant"][0, 0]) < 0.05
    table = found.tables["spans"]
    mine = table[(table["layer"] == 1) & (table["head"] == 0)]["lost"].to_numpy()
    assert (mine[:-1] >= mine[1:] - 1e-12).all()
    assert mine[-1] == 0.0


def test_the_response_is_the_models_own(model) -> None:
    scope = Scope(model)
    text = ProbeText.natural(torch.randint(2, 97, (80,), generator=torch.Generator().manual_seed(0)))
    found = Moa(response=16, block=16).run(scope, data=text)
    made = scope.generate(text.ids[None, :64], max_new_tokens=16, min_new_tokens=16).ids[0]
    with torch.no_grad():
        logits = model(made[None]).logits[0, 63:-1]
    expected = float(torch.nn.functional.cross_entropy(logits.double(), made[64:]))
    assert found.numbers["moa_loss"] == pytest.approx(expected, rel=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_texts_of_different_lengths_are_added() -> None:
    a, b = torch.ones(1, 2, 2), torch.ones(1, 3, 3)
    assert joined(a, b)[0].tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]


def test_refusals(tiny_llama) -> None:
    scope = Scope(tiny_llama)
    with pytest.raises(ProbeError, match="raise the context"):
        Moa(response=0).run(scope, context=200)
    with pytest.raises(ProbeError, match="are for the response"):
        Moa(response=100, block=32).run(scope, data=torch.arange(200) % 90)
    with pytest.raises(ProbeError, match="keep is a share"):
        Moa(keep=0.0).run(scope)


def test_reading_a_call_leaves_gradients_alone(tiny_llama) -> None:
    """A frozen pass builds no graph of its own where nobody asked for one."""
    shapes = []
    each_call(Scope(tiny_llama), torch.arange(3, 30), lambda call, output: shapes.append(output.requires_grad))
    assert shapes == [False, False]

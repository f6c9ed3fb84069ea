"""Second thoughts: what each head would gain or lose by another pattern, measured where the plan has brought the model.

Losses that were measured on the dense model, head by head, are added up by a knapsack as if heads erred independently. They do not: errors
of a layer feed the next ones, and two heads that miss the same key may cancel or double. At the plan itself the gradient of the
divergence from the dense model is not zero, and says to first order what moving a head does given what all the others do wrong:

    change of the loss  =  sum_t g_t . delta_t  +  mu / 2 sum_t (h_t . delta_t)^2,     delta = o(candidate) - o(now)

with g the gradient of the loss and h that of the log-likelihood of words drawn from the model (of a right answer's log-odds, where the
model recalls), so that the second term is the loss's own curvature, head by head (Fisher information; Gauss-Newton). One more knapsack
shares the budget out by this; `mu` above 1 keeps the heads closer to where they are. A new plan counts only if a trial on other texts says
so, and where a plan loses less than FLOOR of every kind it is left as it is: what else it could gain on a few texts is their noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from headscope.plans.dynamic import TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_rules import Choosing
from headscope.plans.planners.planned import Planned
from headscope.plans.planners.trial import FLOOR, ODDS, Text, Trials, best, grown, logits_of, odds_of, score

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.patterns import Pattern
    from headscope.plans.plan import Place

DAMPING = (4.0, 16.0, 64.0, 256.0)
"""Values of mu that are tried."""
ROWS, ROWS_ON_DEVICE = 256, 512
"""Rows with the largest gradients that are read, and as many others: on a CPU, and elsewhere."""

Solve = Callable[[Mapping["Place", Sequence["Pattern"]], Mapping["Place", np.ndarray]], "dict[Place, Pattern]"]


@dataclass(frozen=True, eq=False)
class Refiner:
    """`fit`: what gradients are taken on; `judge`: what says if a plan is better; `candidates` of every head; `solve`: the knapsack."""

    fit: Trials
    judge: Trials
    candidates: Mapping[Place, Sequence[Pattern]]
    solve: Solve

    def refined(self, now: dict[Place, Pattern], other: Mapping[Place, Pattern], rounds: int) -> tuple[dict[Place, Pattern], list[float]]:
        """(the plan after at most `rounds` improvements, the score before and after each). `other`: a second plan to borrow from."""
        if any(isinstance(one, TopKeys) for one in now.values()):
            return now, []
        losses = self.judge.loss(now)
        found = [score(losses)]
        if max(losses.values()) < FLOOR:  # as good as dense: what is left to gain on these texts is noise
            return now, found
        for _ in range(rounds):
            listed = {place: [now[place], other[place], *self.candidates[place]] for place in now}
            slopes, bends = self.measure(now, listed)
            plans: list[dict[Place, Pattern]] = [now]
            for mu in DAMPING:
                made = self.solve(listed, {place: slopes[place] + mu * bends[place] for place in now})
                if made not in plans:
                    plans.append(made)
            order, lost = best(self.judge, plans, halve=False)
            if order[0] == 0:
                break
            other, now = now, plans[order[0]]
            found.append(score(lost[order[0]]))
            if max(lost[order[0]].values()) < FLOOR:
                break
        return now, found

    def measure(
        self, now: Mapping[Place, Pattern], listed: Mapping[Place, Sequence[Pattern]]
    ) -> tuple[dict[Place, np.ndarray], dict[Place, np.ndarray]]:
        """(slope, bend) of every head's candidates: the two terms of the loss's change, kinds weighted as in `score`."""
        slopes = {place: np.zeros(len(patterns)) for place, patterns in listed.items()}
        bends = {place: np.zeros(len(patterns)) for place, patterns in listed.items()}
        kinds = self.fit.kinds()
        for kind in kinds:
            texts = [text for text in self.fit.texts if text.kind == kind]
            found = [self._text(now, listed, text, number) for number, text in enumerate(texts)]
            weight = 1.0 / len(kinds) / len(texts) / (FLOOR + sum(loss for _, _, loss in found) / len(texts))
            for one, other, _ in found:
                for place in slopes:
                    slopes[place] += weight * one[place]
                    bends[place] += weight * other[place]
        return slopes, bends

    def _text(
        self, now: Mapping[Place, Pattern], listed: Mapping[Place, Sequence[Pattern]], text: Text, number: int
    ) -> tuple[dict[Place, np.ndarray], dict[Place, np.ndarray], float]:
        """The terms on one text, and its loss."""
        now = self.fit.sized(now)
        listed = (
            listed if self.fit.growth <= 1 else {place: [grown(one, 1 / self.fit.growth) for one in ones] for place, ones in listed.items()}
        )
        calls, slopes, curves, loss = traced(self.fit, now, text, number)
        one: dict[Place, np.ndarray] = {}
        other: dict[Place, np.ndarray] = {}
        for module in self.fit.scope.topology.main:
            layer = int(module.layer or 0)
            places = [(layer, head) for head in range(module.heads)]
            found = weighed(calls.pop(module.name), slopes[module.name], curves[module.name], text.start, places, now, listed)
            for place, terms in zip(places, found, strict=True):
                one[place], other[place] = terms
        return one, other, max(0.0, loss)


def traced(
    trials: Trials, now: Mapping[Place, Pattern], text: Text, number: int
) -> tuple[dict[str, AttentionCall], dict[str, Tensor], dict[str, Tensor], float]:
    """(module -> its call under the plan, gradient of the loss at every head's output [1, N, Hq, Dv], gradient that the curvature is made
    of, the loss).
    """
    from headscope.probes.calls import main_modules
    from headscope.probes.duo_gates import frozen
    from headscope.probes.moa import Traced

    scope = trials.scope
    calls: dict[str, tuple[AttentionCall, Tensor]] = {}
    with frozen(scope.model), torch.enable_grad():
        with scope.executing(Planned(now, text.start)), scope.intervene(Traced(calls, main_modules(scope))):
            logits = logits_of(scope, text.ids)
        loss = text.cost(logits)
        found = torch.log_softmax(logits[text.rows].float(), -1)
        if text.kind == "recall":
            curve = odds_of(found, text.ids[text.rows + 1]) * ODDS**0.5
        else:
            draw = torch.Generator().manual_seed(number)
            wanted = torch.multinomial(found.detach().exp().cpu(), 1, generator=draw).to(found.device)
            curve = found.gather(1, wanted).sum() / len(found) ** 0.5
        names = [module.name for module in scope.topology.main]
        outputs = [calls[name][1] for name in names]
        slopes = torch.autograd.grad(loss, outputs, retain_graph=True)
        curves = torch.autograd.grad(curve, outputs)
    return (
        {name: detached(calls[name][0]) for name in names},
        dict(zip(names, slopes, strict=True)),
        dict(zip(names, curves, strict=True)),
        float(loss.detach()),
    )


def detached(call: AttentionCall) -> AttentionCall:
    """The call without its graph."""
    assert call.v is not None
    return replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach())


@torch.no_grad()
def weighed(
    call: AttentionCall,
    slope: Tensor,
    curve: Tensor,
    start: int | None,
    places: Sequence[Place],
    now: Mapping[Place, Pattern],
    listed: Mapping[Place, Sequence[Pattern]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per head the two terms of every candidate of its list, over the rows of one text."""
    from headscope.probes.pattern_cost import rows_of
    from headscope.probes.pattern_outputs import Outputs

    rows, share = rows_of(slope, ROWS_ON_DEVICE if slope.is_cuda else ROWS)
    outputs = Outputs(call, rows, start, decodes=True)
    g, h = (one[0, rows.to(one.device)].transpose(0, 1).to(outputs.dtype) for one in (slope, curve))
    many = share.to(device=g.device, dtype=torch.float64)
    before = torch.empty_like(g)
    for pattern in {rule(now[place]) for place in places}:
        mine = torch.tensor([at for at, place in enumerate(places) if rule(now[place]) == pattern], device=g.device)
        before[mine] = outputs.under(pattern)[0][mine]
    terms: list[Tensor] = []
    number = {pattern: at for at, pattern in enumerate(dict.fromkeys(rule(one) for place in places for one in listed[place]))}
    for pattern in number:
        delta = outputs.under(pattern)[0] - before
        first, second = ((one * delta).sum(-1).double() for one in (g, h))
        terms.append(torch.stack([first @ many, second.square() @ many / 2]))
    found = torch.stack(terms, 2).cpu().numpy()  # [2, H, patterns]
    chosen = [[number[rule(one)] for one in listed[place]] for place in places]
    return [(found[0, at, mine], found[1, at, mine]) for at, mine in enumerate(chosen)]


def rule(pattern: Pattern) -> Pattern:
    """What a pattern does, without what it was measured to keep."""
    return replace(pattern, expected=None) if isinstance(pattern, VerticalSlash | TopBlocks | Choosing) else pattern

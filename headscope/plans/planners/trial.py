"""Trying plans out: how far a live model moves under each from the model without a plan, on texts that no plan is judged by later.

As a model is used: a prompt is read under the plan, and what follows is decoded under it. A plan that drops keys after the prefill costs
nothing in a pass that has no decoded rows, and would always win there. What is compared is distributions, not losses on the words that
happened to follow: Kullback-Leibler divergences from the dense model have a far smaller spread over texts, and a plan cannot look better
than the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic import Budget, VerticalSlash
from headscope.plans.planners.planned import Planned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from headscope.plans.patterns import Pattern
    from headscope.plans.plan import Place
    from headscope.probes.pattern_cost import Kind
    from headscope.scope import Scope

LONGEST, LONGEST_ON_DEVICE = 2048, 8192
"""Tokens of a trial text, at most: on a CPU, and elsewhere."""
SEED = 7919
"""Of the trial texts that are drawn; probes draw theirs from other seeds."""
JUDGED = 512
"""Tokens of a text that are compared, at most, spread evenly."""
ODDS = 0.02
"""Weight of a nat of log-odds of a right answer beside a nat of divergence: it decides between plans under which a sure model is right."""
FLOOR = 0.005
"""Nats per token below which plans are as good as dense."""
RECALL = 4
"""Texts of recall for one of prose: they have few answers each."""
SURE = 0.5
"""Probability from which on a token of an answer is one that the model knows."""
ESSAYS = 8
"""Texts of prose that there are, at most."""


@dataclass(frozen=True, eq=False)
class Text:
    """`ids` [N]; `rows`: whose next token is compared; `start`: the first row that is decoded, None: none. `dense` [R, V]: log p there
    without a plan; `odds`: mean log p / (1 - p) of the tokens that follow, counted where `kind` is "recall".
    """

    kind: Kind
    ids: Tensor
    rows: Tensor
    start: int | None
    dense: Tensor
    odds: float

    def cost(self, logits: Tensor) -> Tensor:
        """Nats per compared token, from logits [N, V]; differentiable."""
        found = torch.log_softmax(logits[self.rows].float(), -1)
        cost = (self.dense.exp() * (self.dense - found)).sum(-1).mean()
        return cost if self.kind != "recall" else cost + ODDS * (self.odds - odds_of(found, self.ids[self.rows + 1]))


@dataclass(frozen=True, eq=False)
class Trials:
    """The texts of a model, kind by kind. `growth`: how many times as long as these are the texts that plans are for; rules that count keys
    are tried with so many times fewer.
    """

    scope: Scope
    texts: tuple[Text, ...]
    growth: float = 1.0

    @classmethod
    def of(cls, scope: Scope, length: int, count: int = 3, *, kinds: Sequence[Kind] = ("recall", "prose"), part: int = 0) -> Trials:
        """`count` texts of prose and RECALL times as many of recall, as `kinds` ask and the model can read, of at most `length` tokens. Of
        recall all answers are judged; with "written" the first alone, which is asked for where the prompt ends. `part` 0 and 1 draw from
        other seeds and begin with other essays, the odd and the even ones.
        """
        from headscope.data import natural_texts
        from headscope.probes.active import Work
        from headscope.probes.passkeys import PasskeyMaker, spells
        from headscope.probes.pattern_cost import WRITTEN
        from headscope.profile.journal import Journal

        most = LONGEST if scope.device.type == "cpu" else LONGEST_ON_DEVICE
        context = min(length, most, scope.max_length or most)
        work = Work(Journal(None), context=context, seed=SEED + part, progress=False)
        found = []
        if "recall" in kinds:
            maker = PasskeyMaker.of(scope, context)
            for number in range(RECALL * count):
                text = maker.text(maker.context, work.generator(1, number))
                begin, end = text.first or (text.start, len(text.ids))
                if "written" in kinds:  # what is asked after the prompt was read is what the prompt ends with
                    found.append(_text(scope, "recall", text.ids[:end], torch.arange(begin - 1, end - 1), begin))
                else:
                    found.append(_text(scope, "recall", text.ids, torch.arange(text.start - 1, len(text.ids) - 1), None))
        prose = [kind for kind in kinds if kind != "recall"]
        if prose and spells(scope):
            essays = natural_texts(scope.tokenizer, context, texts=ESSAYS)[1 - part :: 2][:count]
            for kind in prose:
                start = int(context * WRITTEN) if kind == "written" else None
                rows = torch.arange(context // 8 if start is None else start, context - 1)
                found += [_text(scope, kind, essay.ids, rows, start) for essay in essays]
        if not found:
            raise refusal(PlanError, f"trials on {', '.join(kinds)}", f"{scope.name} spells no prose", "aim at recall")
        return cls(scope, tuple(found), length / context)

    def kinds(self) -> list[Kind]:
        """In order."""
        return list(dict.fromkeys(text.kind for text in self.texts))

    def rung(self, number: int) -> list[Text]:
        """A part of the texts of every kind, 0 <= number < rungs."""
        found = []
        for kind in self.kinds():
            mine = [one for one in self.texts if one.kind == kind]
            found += mine[len(mine) * number // self.rungs : len(mine) * (number + 1) // self.rungs]
        return found

    @property
    def rungs(self) -> int:
        """Parts that all kinds come in: of recall RECALL texts each, of prose one."""
        counts = {kind: sum(one.kind == kind for one in self.texts) for kind in self.kinds()}
        return max(1, min(count // RECALL if kind == "recall" else count for kind, count in counts.items()))

    @torch.no_grad()
    def losses(self, patterns: Mapping[Place, Pattern], texts: Iterable[Text]) -> dict[Kind, list[float]]:
        """Kind -> nats per token lost on each of these texts."""
        out: dict[Kind, list[float]] = {}
        tried = self.sized(patterns)
        for text in texts:
            with self.scope.executing(Planned(tried, text.start)):
                out.setdefault(text.kind, []).append(float(text.cost(logits_of(self.scope, text.ids))))
        return out

    def sized(self, patterns: Mapping[Place, Pattern]) -> Mapping[Place, Pattern]:
        """The patterns as they are tried."""
        return patterns if self.growth <= 1 else {place: grown(one, 1 / self.growth) for place, one in patterns.items()}

    def loss(self, patterns: Mapping[Place, Pattern]) -> dict[Kind, float]:
        """Kind -> nats per token lost, the mean over its texts."""
        return {kind: sum(values) / len(values) for kind, values in self.losses(patterns, self.texts).items()}


def grown(pattern: Pattern, growth: float) -> Pattern:
    """A rule that counts keys, for texts `growth` times as long."""
    if isinstance(pattern, VerticalSlash):
        return replace(pattern, vertical=round(pattern.vertical * growth), slash=round(pattern.slash * growth))
    return replace(pattern, keep=round(pattern.keep * growth)) if isinstance(pattern, Budget) else pattern


def score(losses: Mapping[Any, float]) -> float:
    """Kinds into one number: the mean log of what is lost, so that a tenth less of any counts the same, whatever its size."""
    return sum(math.log(FLOOR + one) if one > 0 else math.log(FLOOR) + one / FLOOR for one in losses.values()) / len(losses)


def best(trials: Trials, plans: Sequence[Mapping[Place, Pattern]], *, halve: bool = True) -> tuple[list[int], list[dict[Kind, float]]]:
    """(numbers of the plans, best first; what each loses per kind). With `halve`, the worse half is left out after every rung of texts, so
    that a plan's numbers are those of the texts that it was tried on; plans left out stand behind those that stayed.
    """
    alive = list(range(len(plans)))
    out: list[int] = []
    kept: list[dict[Kind, list[float]]] = [{} for _ in plans]
    means: list[dict[Kind, float]] = [{} for _ in plans]
    for rung in range(trials.rungs):
        for number in alive:
            for kind, values in trials.losses(plans[number], trials.rung(rung)).items():
                kept[number].setdefault(kind, []).extend(values)
            means[number] = {kind: sum(values) / len(values) for kind, values in kept[number].items()}
        alive.sort(key=lambda number: (score(means[number]), number))
        if rung + 1 < trials.rungs:
            stay = max(3, -(-len(alive) // 2)) if halve else len(alive)
            out = alive[stay:] + out
            alive = alive[:stay]
    return alive + out, means


def logits_of(scope: Scope, ids: Tensor) -> Tensor:
    """[N, V] of one text in one pass."""
    inputs: dict[str, Any] = {"input_ids": ids[None].to(scope.device)}
    if "use_cache" in scope._forward_parameters:
        inputs["use_cache"] = False
    logits: Tensor = scope.model(**inputs).logits[0]
    return logits


def odds_of(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean of log p / (1 - p) from log p [R, V] and the tokens [R] that follow."""
    own = found.gather(1, wanted.to(found.device)[:, None])
    rest = torch.logsumexp(found.scatter(1, wanted.to(found.device)[:, None], -torch.inf), -1, keepdim=True)
    return (own - rest).mean()


@torch.no_grad()
def _text(scope: Scope, kind: Kind, ids: Tensor, rows: Tensor, start: int | None) -> Text:
    logits = logits_of(scope, ids)
    if kind == "recall":
        known = torch.log_softmax(logits[rows].float(), -1).gather(1, ids[rows + 1].to(logits.device)[:, None])[:, 0].exp().cpu() > SURE
        rows = rows[known] if bool(known.any()) else rows
    rows = rows[torch.linspace(0, len(rows) - 1, min(JUDGED, len(rows))).long()]
    dense = torch.log_softmax(logits[rows].float(), -1)
    return Text(kind, ids, rows, start, dense, float(odds_of(dense, ids[rows + 1])))

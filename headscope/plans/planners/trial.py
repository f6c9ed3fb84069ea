"""Trying plans out: how much worse a live model answers and writes under each, on texts that nothing was measured on.

As a model is used: the prompt is read under the plan, the answer is decoded token by token with the right tokens given. A plan that drops
keys after the prefill costs nothing in a single pass over prompt and answer, and would always win there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.plans.plan import SparsePlan

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

LONGEST = 2048
"""Tokens of a trial text, at most."""
SEED = 7919
"""Of the trial texts; probes draw theirs from other seeds."""
DECODED = 16
"""Answer tokens that are decoded, at most; of prose, the last ones."""
ODDS = 0.02
"""Weight of a nat of log-odds beside a nat of cross-entropy: it decides between plans under which a sure model is still right."""


@dataclass(frozen=True, eq=False)
class Trials:
    """Texts and the dense model's loss on them. `texts`: (kind, prompt [N], answer [a]); `dense`: what `_cost` gives without a plan."""

    scope: Scope
    texts: tuple[tuple[str, Tensor, Tensor], ...]
    dense: tuple[float, ...]

    @classmethod
    def of(cls, scope: Scope, length: int, count: int = 3) -> Trials:
        """`count` texts of each kind that `pattern_cost` reads, of at most `length` tokens."""
        from headscope.probes.active import Work
        from headscope.probes.pattern_cost import PatternCost
        from headscope.profile.journal import Journal

        context = min(length, LONGEST, scope.max_length or LONGEST)
        work = Work(Journal(None), context=context, seed=SEED, progress=False)
        texts = []
        for kind, ids, answer in PatternCost(texts=count).texts_for(scope, None, work):
            start = int(answer.int().argmax()) if kind == "recall" else len(ids) - DECODED
            texts.append((str(kind), ids[:start], ids[start : start + DECODED]))
        return cls(scope, tuple(texts), tuple(_cost(scope, *one) for one in texts))

    def loss(self, plan: SparsePlan) -> float:
        """Nats per token that the plan costs: the mean over kinds of the mean over their texts, log-odds counted by ODDS."""
        found: dict[str, list[float]] = {}
        for text, before in zip(self.texts, self.dense, strict=True):
            with self.scope.execute(plan, force=True):
                found.setdefault(text[0], []).append(_cost(self.scope, *text) - before)
        return sum(sum(values) / len(values) for values in found.values()) / len(found)


@torch.no_grad()
def _cost(scope: Scope, kind: str, prompt: Tensor, answer: Tensor) -> float:
    """Mean cost of the answer's tokens, and of prose also of the prompt's second half, in equal parts."""
    device = scope.device
    out: Any = scope.model(input_ids=prompt[None].to(device), use_cache=True)
    logits, cache = out.logits[0], out.past_key_values
    half = len(prompt) // 2
    read = _nats(logits[half:-1], prompt[half + 1 :].to(device))
    steps = [logits[-1]]
    for word in answer[:-1]:
        out = scope.model(input_ids=word.reshape(1, 1).to(device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0, -1])
    written = _nats(torch.stack(steps), answer.to(device))
    return (read + written) / 2 if kind == "prose" else written


def _nats(logits: Tensor, wanted: Tensor) -> float:
    """Mean of -log p - ODDS log(p / (1 - p)) over tokens: logits [n, V], wanted [n]."""
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    own = logits.gather(1, wanted[:, None])[:, 0]
    rest = torch.logsumexp(logits.scatter(1, wanted[:, None], -torch.inf), -1)
    return float(loss) - ODDS * float((own - rest).mean())


def best(trials: Trials, plans: Sequence[SparsePlan]) -> tuple[int, list[float]]:
    """(number of the plan that costs least, what each costs); the first of equals."""
    found = [trials.loss(plan) for plan in plans]
    return min(range(len(found)), key=lambda at: (found[at], at)), found

"""Causal checks of a ranking of heads: what a task loses without its top heads, against as many random ones.

A score says what a head does, not that anything depends on it. So the first k heads of a ranking are ablated, and then, as the control, k
heads drawn from all the others, several times. The control must leave the top heads out: a published script compares a pair with a list
of lists there, which is never equal, so that its "random" heads may hold the very heads that they are compared with.

    causal_check(scope, profile.top("retrieval", 20), NeedleTask(trials), k=5)

`copy_check` asks the other question: when a head looks into the needle, is what it looks at what the model writes?
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch.nn.functional import log_softmax

from headscope.errors import ProbeError, refusal
from headscope.probes.active import Work
from headscope.probes.answers import answer
from headscope.probes.retrieval import Retrieval, copies
from headscope.probes.streamed import Streamed
from headscope.probes.text import repeated_random
from headscope.probes.trials import Trial
from headscope.profile.journal import Journal, digest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.scope import Scope

Head = tuple[int, int]


class Task(Protocol):
    """What a model is asked to do: `measure(scope)` gives "accuracy" in [0, 1] and "loss" in nats, under whatever is active on the scope.

    A dataclass of plain values, tensors and dataclasses, so that a journal can tell one task from another.
    """

    name: str

    def measure(self, scope: Scope) -> dict[str, float]: ...


@dataclass(frozen=True, eq=False)
class NeedleTask:
    """Needle trials. With ids to follow known (`trial.follow`) an answer counts when each of them is the model's first choice behind those
    before it, which is greedy generation read off one pass; else it counts when its ROUGE-1 recall is above `accept`. "loss" is that of the
    answer's tokens: of the known ones, else of the needle's own words.
    """

    trials: Sequence[Trial]
    accept: float = 0.5
    answer_tokens: int = 50
    name: str = field(default="needle", init=False)

    def measure(self, scope: Scope) -> dict[str, float]:
        """Share of the trials that are answered; "tokens" is the share of the known answers' tokens that are right, "recall" the mean
        recall of answers that are generated.
        """
        hits, losses, recalls, tokens = [], [], [], []
        for trial in self.trials:
            known = trial.follow is not None
            wanted = trial.follow if trial.follow is not None else trial.ids[slice(*trial.answer)]
            logits = _logits(scope, torch.cat([trial.ids, wanted[:-1]])[None], len(wanted))[0]
            losses.append(-log_softmax(logits, -1).gather(1, wanted[:, None]).mean().item())
            if known:
                right = (logits.argmax(-1) == wanted).double()
                tokens.append(float(right.mean()))
                hits.append(bool(right.all()))
                continue
            recalls.append(answer(scope, trial, limit=self.answer_tokens).recall)
            hits.append(recalls[-1] > self.accept)
        found = {"accuracy": float(np.mean(hits)), "loss": float(np.mean(losses))}
        return found | {name: float(np.mean(each)) for name, each in (("tokens", tokens), ("recall", recalls)) if each}


@dataclass(frozen=True, eq=False)
class RepeatedTokens:
    """A block of random tokens said `repeats` times: from the second time on each token can be told from the first. Accuracy and loss over
    the last block."""

    block: int = 50
    repeats: int = 2
    sequences: int = 4
    seed: int = 0
    name: str = field(default="repeated tokens", init=False)

    def measure(self, scope: Scope) -> dict[str, float]:
        """Share of the last block's tokens that are the model's first choice. Its first token, which only says that the block goes round
        again, does not count."""
        hits, losses = [], []
        for number in range(self.sequences):
            text = repeated_random(scope, block=self.block, repeats=self.repeats, seed=self.seed + number)
            wanted = text.ids[-self.block + 1 :]
            logits = _logits(scope, text.ids[None, :-1], self.block - 1)[0]
            losses.append(-log_softmax(logits, -1).gather(1, wanted[:, None]).mean().item())
            hits.append((logits.argmax(-1) == wanted).double().mean().item())
        return {"accuracy": float(np.mean(hits)), "loss": float(np.mean(losses))}


@torch.no_grad()
def _logits(scope: Scope, ids: Tensor, last: int) -> Tensor:
    """Logits of the last `last` positions, [B, last, vocabulary] float32 on the CPU."""
    options: dict[str, Any] = {"logits_to_keep": last} if "logits_to_keep" in scope._forward_parameters else {}
    logits: Tensor = scope.model(input_ids=ids.to(scope.device), use_cache=False, **options).logits
    return logits[:, -last:].float().cpu()


@dataclass(frozen=True, eq=False)
class CausalCheck:
    """`table`: one row per condition ("all heads", "top", "random 0", ...) with `heads` ablated, accuracy, loss. `task`, `mode`, `k`."""

    table: pd.DataFrame
    task: str
    mode: str
    k: int

    def _mean(self, condition: str, what: str) -> float:
        rows = self.table["condition"].str.startswith(condition)
        return float(self.table.loc[rows, what].mean())

    @property
    def base(self) -> float:
        """Accuracy with all heads."""
        return self._mean("all heads", "accuracy")

    @property
    def top(self) -> float:
        """Accuracy without the top heads."""
        return self._mean("top", "accuracy")

    @property
    def random(self) -> float:
        """Mean accuracy without as many random heads."""
        return self._mean("random", "accuracy")

    @property
    def worst_random(self) -> float:
        """The lowest accuracy of a random set."""
        return float(self.table.loc[self.table["condition"].str.startswith("random"), "accuracy"].min())

    def __repr__(self) -> str:
        found = f"accuracy {self.base:.2f}, without the top {self.k} heads {self.top:.2f}"
        return (
            f"CausalCheck({self.task}, {self.mode}: {found}, without {self.k} random ones {self.random:.2f}, worst {self.worst_random:.2f})"
        )


def causal_check(
    scope: Scope,
    heads: Iterable[Head],
    task: Task,
    k: int | None = None,
    *,
    random_sets: int = 5,
    mode: str = "zero",
    exclude: Iterable[Head] = (),
    reference: Any = None,
    near: tuple[int, int] = (16, 64),
    seed: int = 0,
    journal: Journal | str | Any = None,
    progress: bool | None = None,
) -> CausalCheck:
    """Ablates the first `k` of `heads` (default: all given), and `random_sets` times k heads that are not among them.

    `mode`: as HeadMask: "zero", "uniform", "noise", or "mean" with `reference` data to take means over; or "streaming", which hides all
    keys but the first and the nearest, `near` (16, 64), from a head and leaves the rest of its work alone. `exclude`: further heads that
    no random set may hold, e.g. the next ones of the ranking. `journal`: a folder that keeps finished conditions. Raises ProbeError when a
    control cannot be drawn, or when the task is not done with all heads in place: then nothing can be lost.
    """
    from headscope.interventions import HeadMask

    ranking = list(dict.fromkeys((int(layer), int(head)) for layer, head, *_ in heads))
    count = len(ranking) if k is None else k
    every = [(int(module.layer or 0), head) for module in scope.topology.main for head in range(module.heads)]
    if not 1 <= count <= len(ranking):
        raise refusal(ProbeError, f"k={k}", f"{len(ranking)} heads are given", "pass k from 1 to that")
    top = ranking[:count]
    left = sorted(set(every) - set(top) - {(int(layer), int(head)) for layer, head, *_ in exclude})
    if count > len(left):
        raise refusal(
            ProbeError,
            f"k={count}",
            f"{len(left)} of {len(every)} heads are left to draw a control from",
            "pass a smaller k, or exclude fewer",
        )

    def masked(chosen: list[Head]) -> Any:
        if not chosen:
            return nullcontext()
        if mode == "streaming":
            return scope.intervene(Streamed(tuple(chosen), *near))
        if mode == "mean":
            return scope.intervene(HeadMask.calibrated(scope, reference, chosen))
        return scope.intervene(HeadMask(chosen, mode=cast(Any, mode)))

    sets: list[tuple[str, list[Head]]] = [("all heads", []), ("top", top)]
    for number in range(random_sets):
        drawn = np.random.default_rng([seed, number]).permutation(len(left))[:count]
        sets.append((f"random {number}", [left[place] for place in sorted(drawn)]))
    settings = digest(
        {"task": task, "mode": mode, "near": near if mode == "streaming" else None, "model": scope.fingerprint, "reference": reference}
    )
    work = Work(journal if isinstance(journal, Journal) else Journal(journal), None, seed, progress, f"causal-{settings}")
    rows = []
    for condition, chosen in work.each(sets, "causal check"):

        def run(chosen: list[Head] = chosen) -> dict[str, Any]:
            with masked(chosen):
                return dict(task.measure(scope))

        found = work.unit(repr(sorted(chosen)), run)
        if not chosen and not found["accuracy"] > 0:
            raise refusal(
                ProbeError,
                f"task {task.name!r} on {scope.name}",
                "nothing of it is done with all heads in place",
                "use an easier task, or another model",
            )
        rows.append({"condition": condition, "heads": " ".join(f"{layer}.{head}" for layer, head in chosen), **found})
    import pandas as pd

    return CausalCheck(pd.DataFrame(rows), task.name, mode, count)


def copy_check(
    scope: Scope,
    trials: Sequence[Trial],
    probe: Retrieval | None = None,
    *,
    journal: Journal | str | Any = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Whether looking at the needle is copying from it: one row per head over the accepted trials.

    `looks`: share of the answer's steps in which the head's strongest key lies in the needle's answer; `copies`: share of those in which
    that key's token is the one that is written (NaN without looks); `chance`: what that share would be had it looked at a random token of
    the span. A head that reads the needle for something else looks often and copies at chance.
    """
    import pandas as pd

    probe = Retrieval() if probe is None else probe
    work = probe.work(scope, list(trials), None, 0, progress, journal)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    steps = 0
    for number, trial in work.each(list(enumerate(trials))):
        unit = work.unit(f"{number}-{digest(trial)}", partial(probe.trial, scope, trial))
        if probe.accept is not None and not unit["recall"] > probe.accept:
            continue
        looks, copied = copies(unit["argmax"], trial, unit["ids"])
        span = trial.ids[slice(*trial.answer)]
        chance = (span[:, None] == unit["ids"]).double().mean(0)
        seen.append((looks.sum(-1), copied.sum(-1), (looks * chance).sum(-1)))
        steps += len(unit["ids"])
    if not seen:
        raise refusal(ProbeError, f"a copy check on {scope.name}", f"none of {len(trials)} trials was answered", "use easier trials")
    looks, copied, chance = (torch.stack(parts).sum(0).double() for parts in zip(*seen, strict=True))
    rows = [
        {
            "layer": module.layer,
            "head": head,
            "looks": float(looks[place, head]) / steps,
            "copies": float(copied[place, head] / looks[place, head]),
            "chance": float(chance[place, head] / looks[place, head]),
        }
        for place, module in enumerate(scope.topology.main)
        for head in range(module.heads)
    ]
    return pd.DataFrame(rows)

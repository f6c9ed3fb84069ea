"""R2, the retrieval-reasoning score of HeadKV: weight on an answer that first had to be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.data.needles import REASONING_NEEDLES
from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.answers import MODES, Mode, answer
from headscope.probes.base import Metric, stack
from headscope.probes.retrieval import source_of
from headscope.probes.trials import Trial, context_of, parts_of, trials_of
from headscope.profile.journal import digest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope


@dataclass(frozen=True)
class RetrievalReasoning(ActiveProbe):
    """R2: how much weight the head's strongest keys give to the right answer, where a rule in the needle says which answer is right.

    The needle is a rule, a wrong answer and the right one. With n the number of tokens of the right answer, in each of the first n steps
    of the model's own answer the n largest weights of a head are taken, and those that lie inside the right answer are summed:

        retrieval_reasoning = sum over the steps of (1 / n) sum of A[t, s], s in the right answer and among the n largest of row t

    averaged over the trials. 1 is a head that spends all of its weight on the right answer in all of n steps; one that looks there but
    writes nothing from it counts as well, since no token has to be equal. So it keeps its say where the model answers in other words.

    As in the official code no trial is left out; `accept` (a ROUGE-1 recall) keeps only those that were answered. Departures: the needle's
    place is exact for every tokenizer (there: the window of the largest overlap, led by a BOS that its construction leaves in the prompt);
    the needles are our own. Published R2 and retrieval scores of one model share 8 of their top 20 heads.
    """

    name: ClassVar[str] = "retrieval_reasoning"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("retrieval_reasoning", "probability", "looks at the right one of two answers while writing"),
    )
    data: ClassVar[str] = "reasoning needles"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "generation", "tokenizer")
    cost: ClassVar[str] = "one prefill and an answer no longer than the needle's a trial; 15 trials"
    source: ClassVar[str] = "HeadKV, arXiv:2410.19258, github.com/FYYFU/HeadKV"

    mode: Mode = "decode"
    accept: float | None = None
    stem: bool = True
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    per_cell: int = 1
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name(ProbeError, "mode", self.mode, MODES)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """Runs the trials."""
        import pandas as pd

        context = context_of(scope, work.context, 50)
        trials = trials_of(
            scope,
            data,
            context=context,
            lengths=self.lengths or parts_of(context, 5),
            depths=self.depths,
            per_cell=self.per_cell,
            needles=REASONING_NEEDLES,
            chat=self.chat,
            seed=work.seed,
        )
        units = [
            work.unit(f"{number}-{digest(trial)}", partial(self.trial, scope, trial)) for number, trial in work.each(enumerate(trials))
        ]
        kept = [unit for unit in units if self.accept is None or unit["recall"] > self.accept]
        if not kept:
            raise refusal(
                ProbeError,
                f"probe {self.name!r} on {scope.name}",
                f"none of {len(units)} trials was answered (ROUGE-1 recall > {self.accept:g}); it said {str(units[0]['text'])[:80]!r}",
                "use shorter lengths, or accept=None as published",
            )
        table = pd.DataFrame(
            {
                "needle": trial.name,
                "tokens": len(trial.ids),
                "depth": trial.depth,
                "answer": unit["text"],
                "recall": unit["recall"],
                "strongest": float(unit["score"].nan_to_num().max()),
            }
            for trial, unit in zip(trials, units, strict=True)
        )
        scores = torch.stack([unit["score"] for unit in kept]).mean(0)
        numbers = {"retrieval_reasoning_trials": float(len(kept))}
        tables = {"retrieval_reasoning_trials": table}
        return Findings({"retrieval_reasoning": scores}, numbers, [source_of("reasoning needles", trials)], tables)

    def trial(self, scope: Scope, trial: Trial) -> Unit:
        """One trial: what was written, and the score [L, H] of every head."""
        start, end = trial.answer
        count = end - start

        def inside(weights: Tensor) -> Tensor:
            strongest = weights.topk(min(count, weights.shape[-1]), dim=-1)
            here = (strongest.indices >= start) & (strongest.indices < end)
            return (strongest.values * here).sum(-1)

        found = answer(scope, trial, inside, mode=self.mode, limit=count, stem=self.stem)
        score = stack(rows.double().sum(-1) / count for rows in found.rows)
        return {"score": score, "text": found.text, "recall": found.recall}

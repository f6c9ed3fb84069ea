"""QRScore: how much a question's words look at the passage that answers it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.answers import reading
from headscope.probes.base import Metric, stack
from headscope.probes.retrieval import source_of
from headscope.probes.trials import DEPTHS, Span, Trial, context_of, trials_of
from headscope.profile.journal import digest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope


@dataclass(frozen=True)
class QueryRetrieval(ActiveProbe):
    """QRScore: attention from the words of a question to the passage that answers it, without any generation.

    With Q the question's tokens and d the passage (the needle's whole sentence):

        qr_raw = mean over t in Q of sum over s in d of A[t, s]
        qr     = qr_raw - the same with the question "N/A" in its place, which takes away what the head gives to d whatever is asked

    averaged over the trials; `calibrate=False` makes qr the same as qr_raw. A high value is a head that finds the relevant passage while
    the question is being read, before a word of the answer is written; such heads need not be those that then copy it.

    Prefill only, so a model that answers badly, or not at all, can be scored as well. Departures: passages are hidden sentences of a long
    text, not the documents of a retrieval benchmark; the null question is subtracted from the head's mean (the retriever of the paper
    subtracts it per token, and leaves out outliers).
    """

    name: ClassVar[str] = "qr"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("qr", "probability", "looks from the question at the passage that answers it", (-1.0, 1.0)),
        Metric("qr_raw", "probability", "the same, without what any question gets"),
    )
    data: ClassVar[str] = "needles"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "tokenizer")
    cost: ClassVar[str] = "two prefills a trial (one without calibration); 20 trials"
    source: ClassVar[str] = "QRHead, arXiv:2506.09944, github.com/princeton-pli/QRHead"

    calibrate: bool = True
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = DEPTHS
    per_cell: int = 1
    chat: bool | None = None

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """Runs the trials."""
        trials = trials_of(
            scope,
            data,
            context=context_of(scope, work.context, 0),
            lengths=self.lengths,
            depths=self.depths,
            per_cell=self.per_cell,
            chat=self.chat,
            seed=work.seed,
        )
        for trial in trials:
            if self.calibrate and (trial.null_ids is None or trial.null_question is None):
                raise refusal(
                    ProbeError,
                    repr(trial),
                    "it has no null prompt to calibrate with",
                    "give null_ids and null_question, or pass calibrate=False",
                )
        units = [
            work.unit(f"{number}-{digest(trial)}", partial(self.trial, scope, trial)) for number, trial in work.each(enumerate(trials))
        ]
        scores = {name: torch.stack([unit[name] for unit in units]).mean(0) for name in ("qr", "qr_raw")}
        return Findings(scores, {"qr_trials": float(len(trials))}, [source_of("needles", trials)])

    def trial(self, scope: Scope, trial: Trial) -> Unit:
        """One trial: [L, H] of both metrics."""
        raw = self._mass(scope, trial.ids, trial.question, trial.needle)
        if not self.calibrate or trial.null_ids is None or trial.null_question is None:
            return {"qr": raw, "qr_raw": raw}
        return {"qr": raw - self._mass(scope, trial.null_ids, trial.null_question, trial.needle), "qr_raw": raw}

    def _mass(self, scope: Scope, ids: Tensor, question: Span, passage: Span) -> Tensor:
        """[L, H]: mean weight of the question's rows on the passage. What stands behind the question is not run."""
        start, end = question
        with torch.no_grad(), reading(scope, start, end, lambda weights: weights[..., slice(*passage)].sum(-1)) as reader:
            scope._run_once({"input_ids": ids[None, :end].to(scope.device)})
        return stack(rows.double().mean(-1) for rows in reader.result(end - start))

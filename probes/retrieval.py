"""Retrieval heads: heads that look at the very word of the context that the model writes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.answers import MODES, Mode, answer
from headscope.probes.base import Metric
from headscope.probes.trials import DEPTHS, Trial, context_of, trials_of
from headscope.profile.journal import digest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.scope import Scope

COUNTS = ("set", "steps")
THRESHOLD = 0.1
"""The paper's: a head whose mean score is at least this is a retrieval head."""


@dataclass(frozen=True)
class Retrieval(ActiveProbe):
    """Copying from a needle: in each step of the answer, is the head's strongest key the token that is written, inside the needle?

    A prompt hides a sentence (the needle) in a long text and asks for it. The model answers greedily. In the step that writes token w,
    head h copies when the key j of its largest weight lies in the needle's answer span x and the token at j is w. With g_h the set of
    tokens it copied and k the set of tokens in the span:

        retrieval = |g_h & k| / |k|, mean over the accepted trials;  retrieval_active = share of them in which it is above 0

    A trial is accepted when the answer holds more than half of the words that were to be found (ROUGE-1 recall > `accept`); None accepts
    all. 1 is a head that copies every token of every needle; the paper calls a head with 0.1 or more a retrieval head. Trials lie on a grid
    of lengths (default: the quarters of the context) and `depths`.

    `count`: "set" is the paper's formula. "steps" is what its official code counts, steps / |x|: a model that says the answer twice has
    more than 1 there. `mode`: "decode" reads each step, "teacher_forced" reads one pass over prompt and answer; by causality they are the
    same. `exclude_sink`: leave so many first tokens out when looking for the largest weight (0, as published). `chat`: None asks through
    the chat template where the tokenizer has one.

    Departures: the needle's place is found from characters and is exact for every tokenizer (official code: the first
    window whose set of ids overlaps by 0.9, and no BOS ends up in front of the needle here); it goes between two sentences of the text
    (there: before fixed ids of one tokenizer, so that for others it slides to the beginning); an answer ends at a line break or the
    end-of-text token (there: at ids of two tokenizers, so that others repeat themselves); a run that goes on takes up finished trials and
    never mixes them with those of another setting; a model with no accepted trial is refused, where there an empty file is written; the
    needles are our own, and the grid is smaller: of published trials, 20 give .94 to .98 of the same top 20.
    """

    name: ClassVar[str] = "retrieval"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("retrieval", "share of the needle", "copies what stands in the needle, token by token", (0.0, None)),
        Metric("retrieval_active", "share of trials", "copies something in every trial"),
    )
    data: ClassVar[str] = "needles"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "generation", "tokenizer")
    cost: ClassVar[str] = "one prefill and an answer of up to 50 tokens a trial; 20 trials"
    source: ClassVar[str] = "Retrieval Head, arXiv:2404.15574, github.com/nightdessert/Retrieval_Head"

    count: Literal["set", "steps"] = "set"
    mode: Mode = "decode"
    accept: float | None = 0.5
    stem: bool = True
    exclude_sink: int = 0
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = DEPTHS
    per_cell: int = 1
    answer_tokens: int = 50
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.count not in COUNTS:
            raise unknown_name(ProbeError, "count", self.count, COUNTS)
        if self.mode not in MODES:
            raise unknown_name(ProbeError, "mode", self.mode, MODES)
        if self.answer_tokens < 1 or self.exclude_sink < 0:
            raise refusal(
                ProbeError,
                f"answer_tokens={self.answer_tokens}, exclude_sink={self.exclude_sink}",
                "they count tokens",
                "pass 1 and 0 or more",
            )

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """Runs the trials; see `retrieval_findings`."""
        trials = trials_of(
            scope,
            data,
            context=context_of(scope, work.context, self.answer_tokens),
            lengths=self.lengths,
            depths=self.depths,
            per_cell=self.per_cell,
            chat=self.chat,
            seed=work.seed,
        )
        return self.findings(scope, trials, work, "needles")

    def findings(self, scope: Scope, trials: Sequence[Trial], work: Work, kind: str) -> Findings:
        """Scores, numbers and the table of trials. ProbeError when no trial is accepted."""
        units = [
            work.unit(f"{number}-{digest(trial)}", partial(self.trial, scope, trial)) for number, trial in work.each(enumerate(trials))
        ]
        kept = [number for number, unit in enumerate(units) if self.accept is None or unit["recall"] > self.accept]
        if not kept:
            raise self._unanswered(scope, trials, units)
        each = torch.stack([copy_score(units[number]["argmax"], trials[number], units[number]["ids"], self.count) for number in kept])
        scores = {"retrieval": each.mean(0), "retrieval_active": (each > 0).double().mean(0).masked_fill(each[0].isnan(), float("nan"))}
        notes = (
            [] if len(kept) == len(units) else [f"{len(units) - len(kept)} of {len(units)} trials were answered wrongly and do not count"]
        )
        tables = {"retrieval_trials": self._table(trials, units, kept), "retrieval_by_trial": by_trial(scope, each, kept)}
        numbers = {"retrieval_trials": float(len(units)), "retrieval_accepted": float(len(kept))}
        return Findings(scores, numbers, [source_of(kind, trials)], tables, notes)

    def numbers(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """`retrieval_heads`: share of the heads that reach the paper's 0.1."""
        known = scores["retrieval"][scores["retrieval"].isfinite()]
        return {"retrieval_heads": float((known >= THRESHOLD).double().mean())}

    def trial(self, scope: Scope, trial: Trial) -> Unit:
        """One trial: what was written, and the strongest key [L, H, n] int32 of every head in each step (-1: no such head)."""

        def strongest(weights: Tensor) -> Tensor:
            if self.exclude_sink:
                weights = weights.clone()
                weights[..., : self.exclude_sink] = -1.0
            return weights.argmax(-1)

        found = answer(scope, trial, strongest, mode=self.mode, limit=self.answer_tokens, stem=self.stem)
        rows = torch.full((len(found.rows), max(map(len, found.rows)), len(found.ids)), -1, dtype=torch.int32)
        for place, layer in enumerate(found.rows):
            rows[place, : len(layer)] = layer.int()
        return {"argmax": rows, "ids": found.ids, "text": found.text, "recall": found.recall}

    def _table(self, trials: Sequence[Trial], units: Sequence[Unit], kept: Sequence[int]) -> pd.DataFrame:
        import pandas as pd

        rows = [
            {
                "trial": number,
                "needle": trial.name,
                "length": trial.length or len(trial.ids),
                "tokens": len(trial.ids),
                "depth": trial.depth,
                "answer": unit["text"],
                "recall": unit["recall"],
                "accepted": number in kept,
                "steps": len(unit["ids"]),
                "copying_heads": int((copy_score(unit["argmax"], trial, unit["ids"], self.count) > 0).sum()),
            }
            for number, (trial, unit) in enumerate(zip(trials, units, strict=True))
        ]
        return pd.DataFrame(rows)

    def _unanswered(self, scope: Scope, trials: Sequence[Trial], units: Sequence[Unit]) -> ProbeError:
        best = max(range(len(units)), key=lambda number: units[number]["recall"])
        said = " ".join(str(units[best]["text"]).split())[:80]
        wanted = trials[best].reference or f"ids {trials[best].ids[slice(*trials[best].answer)].tolist()}"
        return refusal(
            ProbeError,
            f"probe {self.name!r} on {scope.name}",
            f"none of {len(units)} trials was answered (ROUGE-1 recall > {self.accept:g}); the best answer, for {wanted!r}, "
            f"is {said!r} (recall {units[best]['recall']:.2f})",
            "use shorter lengths, the other chat=, a model that can do it, or accept=None to measure it all the same",
        )


def copies(argmax: Tensor, trial: Trial, written: Tensor) -> tuple[Tensor, Tensor]:
    """(looks, copied), bool [L, H, n]: the strongest key lies in the answer's span; and the token there is the one that is written."""
    start, end = trial.answer
    looks = (argmax >= start) & (argmax < end)
    seen = trial.ids[argmax.long().clamp(0, len(trial.ids) - 1)]
    return looks, looks & (seen == written)


def copy_score(argmax: Tensor, trial: Trial, written: Tensor, count: str) -> Tensor:
    """[L, H] float64 from the strongest keys [L, H, n] and the ids written [n]; NaN where there is no such head."""
    copied = copies(argmax, trial, written)[1]
    span = trial.ids[slice(*trial.answer)]
    if count == "steps":
        score = copied.sum(-1).double() / len(span)
    else:
        kinds = span.unique()
        score = (copied[..., None] & (written[:, None] == kinds)).any(-2).sum(-1).double() / len(kinds)
    return score.masked_fill((argmax < 0).all(-1), float("nan"))


def by_trial(scope: Scope, each: Tensor, kept: Sequence[int]) -> pd.DataFrame:
    """One row per head of the main stack: layer, head, and its score in every accepted trial, under the trial's number."""
    import pandas as pd

    heads = [(place, module.layer, head) for place, module in enumerate(scope.topology.main) for head in range(module.heads)]
    columns = {str(number): [float(each[row, place, head]) for place, _, head in heads] for row, number in enumerate(kept)}
    return pd.DataFrame({"layer": [layer for _, layer, _ in heads], "head": [head for _, _, head in heads], **columns})


def source_of(kind: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """The run card's entry for trials; the checksum is over all prompts in order."""
    import hashlib

    total = hashlib.sha256()
    for trial in trials:
        total.update(trial.ids.numpy().astype("<i8").tobytes())
    names = ", ".join(dict.fromkeys(trial.name for trial in trials if trial.name))
    return {
        "name": f"{len(trials)} prompts ({names or 'given'})",
        "kind": kind,
        "sha256": total.hexdigest(),
        "sequences": len(trials),
        "tokens": max(len(trial.ids) for trial in trials),
    }

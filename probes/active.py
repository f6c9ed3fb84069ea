"""ActiveProbe: a probe that runs the model itself.

It generates answers, ablates heads, patches activations, optimises gates or compares inputs, so it cannot share one forward pass with
others. What it shares with the passive probes is everything around: a name, metrics, a source, a check before anything runs, and a result
per (layer, head).

Its work is cut into units (a trial, a text, a head), each under a key that says all that the unit depends on beside the probe, and handed
to a `Work`, which shows progress and keeps finished units in a journal. So a run that was killed goes on where it stopped, and gives the
numbers that an unbroken run would have given: units are independent, and the score is made of them at the end.

The silent failure this avoids: an empty result. A model that cannot do what the probe asks of it (no needle found, no task solved) is
refused with what it answered, never scored 0 in all heads.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from tqdm.auto import tqdm

from headscope.errors import ProbeError, refusal
from headscope.probes.base import Described, Probe
from headscope.profile.journal import Journal

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.profile.result import ProbeResult
    from headscope.scope import Scope

Unit = dict[str, Any]
K_ = TypeVar("K_")


@dataclass(eq=False)
class Findings:
    """What an active probe measured. `scores`: metric -> [L, H] float64 over the main stack, NaN where a layer has fewer heads.
    `numbers`: about the whole model. `data`: what it was measured on, one dict {name, kind, sha256, sequences, tokens} a source, for the
    run card. `tables`: anything that is no number per head (a layer-by-layer matrix, a row per trial), as data frames. `notes`: what a
    reader must know, in sentences.
    """

    scores: dict[str, Tensor]
    numbers: dict[str, float] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Work:
    """Where an active probe does its units. `seed` is for whatever it draws; `context` a limit in tokens that the user set, or None."""

    journal: Journal
    context: int | None = None
    seed: int = 0
    progress: bool | None = None
    name: str = ""

    def unit(self, key: str, compute: Callable[[], Unit]) -> Unit:
        """The unit's result, from the journal when it is there: a dict of tensors and plain values."""
        return self.journal.unit(f"{self.name}/{key}", compute)

    def each(self, keys: Iterable[K_], what: str = "") -> Iterable[K_]:
        """The keys one by one, with a progress bar on stderr."""
        hidden = not sys.stderr.isatty() if self.progress is None else not self.progress
        listed = list(keys)
        return tqdm(listed, desc=what or self.name.rpartition("-")[0] or self.name, disable=hidden, file=sys.stderr, unit="unit")

    def generator(self, *more: int) -> torch.Generator:
        """A CPU generator that depends on the seed and on the numbers given, so that every unit draws for itself."""
        state = self.seed
        for number in more:
            state = (state * 1_000_003 + number + 1) % (1 << 62)
        return torch.Generator().manual_seed(state)


@dataclass(frozen=True)
class ActiveProbe(Described):
    """Base of the probes that run the model.

    `requires`, each checked before anything runs: "text" (a model that reads token ids), "tokenizer", "generation", "causal", "images" (a
    vision-language model with its processor), "rope" and whatever a probe checks by itself.
    """

    data: ClassVar[str] = "own"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str]

    @abstractmethod
    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """The method itself. `data`: what the user gave in place of the probe's own data, or None."""

    def unfit(self, scope: Scope) -> str | None:
        """Why this probe cannot say anything about this model, or None. Subclasses add their own reasons to `super().unfit(scope)`."""
        kind = scope.topology.model_class
        model = scope.model
        reads = scope.host.takes_text
        for need in self.requires:
            if need == "text" and not (reads and scope.topology.main):
                return f"{kind} does not read text"
            if need == "tokenizer" and (not reads or getattr(scope, "tokenizer", None) is None):
                return f"{scope.name} was scoped without a tokenizer"
            if need == "generation" and not (reads and model.can_generate()):
                return f"{kind} cannot generate"
            if need == "causal" and not all(module.causal for module in scope.topology.main):
                return f"the attention of {kind} looks both ways"
            if need == "images" and getattr(getattr(model, "config", None), "vision_config", None) is None:
                return f"{kind} reads no images"
        return None

    def check(self, scope: Scope) -> None:
        """Raises ProbeError when this probe cannot say anything about this model."""
        why = self.unfit(scope)
        if why is not None:
            raise refusal(
                ProbeError, f"probe {self.name!r} on {scope.name}", why, f"it needs {', '.join(self.requires)}; name other probes"
            )

    def run(
        self,
        scope: Scope,
        data: Any = None,
        *,
        context: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        journal: Journal | str | Path | None = None,
    ) -> ProbeResult:
        """This probe alone. `journal`: a folder that keeps finished units, so that a run that was killed can go on; `context`: the longest
        text in tokens. Raises ProbeError when the model does not fit, or cannot do what the probe needs to see.
        """
        from headscope.profile.result import ProbeResult

        self.check(scope)
        found = self.measure(scope, data, self.work(scope, data, context, seed, progress, journal))
        return ProbeResult(
            self, found.scores, scope.topology, (), {**found.numbers, **self.numbers(found.scores)}, found.tables, tuple(found.notes)
        )

    def work(
        self,
        scope: Scope,
        data: Any,
        context: int | None,
        seed: int,
        progress: bool | None,
        journal: Journal | str | Path | None,
    ) -> Work:
        """A Work whose units are keyed by this probe, its parameters, the model, the data, the context and the seed."""
        from headscope.profile.journal import digest

        kept = journal if isinstance(journal, Journal) else Journal(journal)
        settings = digest({"parameters": self.parameters(), "model": scope.fingerprint, "data": data, "context": context, "seed": seed})
        return Work(kept, context, seed, progress, f"{self.name}-{settings}")


AnyProbe = Probe | ActiveProbe

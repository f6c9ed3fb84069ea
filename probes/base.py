"""Probe: one method that says what a head does, as one small frozen dataclass.

There are two sorts, with one description (`Described`). A passive probe (`Probe`, here) never runs the model; an active one (`ActiveProbe`,
active.py) runs it itself: it generates, ablates, patches or optimises.

A passive probe never runs the model. It says which kind of text it wants (`data`) and which statistics of it (`needs`), and turns them into
one number per head (`score`). The runner builds the texts, merges what the probes of a text need into one request, and runs one forward
pass, so the twelfth passive probe costs next to nothing. Where two probes want different values of one parameter the runner makes a second
pass; it never lets one of them silently have the other's value.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.text import ProbeText, TextKind

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.profile.result import ProbeResult
    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(frozen=True, slots=True)
class Metric:
    """One number per head. `higher_is` says in words what a large value means; `range` is (lowest, highest), None where there is no
    bound. `per`: what the number belongs to; one of a key head or of a layer stands at every head that shares it.
    """

    name: str
    unit: str
    higher_is: str
    range: tuple[float | None, float | None] = (0.0, 1.0)
    per: Literal["head", "kv_head", "layer"] = "head"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"name": self.name, "unit": self.unit, "higher_is": self.higher_is, "range": list(self.range), "per": self.per}


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """What a probe adds to the request of its pass: statistics by name, single-valued parameters, named pairs (queries [P], keys [P]),
    segments [N].
    """

    names: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    segments: Tensor | None = None


@dataclass(frozen=True)
class Described(ABC):
    """What every probe says of itself: `name`; `metrics`; `data`, the kind of data it reads; `requires`; `cost` in words; `source`: paper,
    arXiv id, official code. Instance fields are the method's parameters and go into the run card.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    data: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    cost: ClassVar[str]
    source: ClassVar[str]

    def parameters(self) -> dict[str, Any]:
        """The method's parameters, for the run card."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def numbers(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """Numbers about the whole model, for the run card; most probes have none."""
        return {}

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """This probe as plain data, for lists and pages."""
        doc = (cls.__doc__ or "").strip()
        return {
            "name": cls.name,
            "title": doc.split("\n\n")[0].replace("\n    ", " "),
            "page": inspect.cleandoc(cls.__doc__ or ""),
            "metrics": [metric.to_dict() for metric in cls.metrics],
            "data": cls.data,
            "requires": list(cls.requires),
            "parameters": {item.name: _default(item) for item in fields(cls)},
            "cost": cls.cost,
            "source": cls.source,
        }


def _default(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else None if item.default is MISSING else item.default


@dataclass(frozen=True)
class Probe(Described):
    """Base of the passive probes. `data` is a kind of text; `requires`: of "statistics", "pairs", "segments", "causal"."""

    data: ClassVar[TextKind]
    requires: ClassVar[tuple[str, ...]] = ("statistics",)
    cost: ClassVar[str] = "shares the forward pass of its text"

    @abstractmethod
    def needs(self, text: ProbeText, topology: Topology) -> Needs:
        """What to measure on this text."""

    @abstractmethod
    def score(self, stats: HeadStatistics, text: ProbeText) -> dict[str, Tensor]:
        """Metric name -> [L, H] float64, L the layers of the main stack; NaN where a layer has fewer heads."""

    def tables(self, stats: HeadStatistics, text: ProbeText) -> dict[str, pd.DataFrame]:
        """What this probe says of a text that is no number per head, as data frames by name; most probes say nothing more."""
        return {}

    def minimum(self) -> int:
        """The fewest tokens of text with which the numbers mean anything."""
        return 2

    def unfit(self, topology: Topology) -> str | None:
        """Why this probe can say nothing about a model, whatever the text; None when it can."""
        if "causal" in self.requires and not all(module.causal for module in topology.main):
            return "it is defined for causal attention and this model looks both ways"
        return None

    def check(self, text: ProbeText, topology: Topology) -> None:
        """Raises ProbeError when this probe cannot say anything about this text or model."""
        if text.kind != self.data:
            raise refusal(ProbeError, f"probe {self.name!r} on {text}", f"it reads {self.data} text", f"pass a {self.data} text, or none")
        if len(text) < self.minimum():
            raise refusal(
                ProbeError,
                f"probe {self.name!r} on {len(text)} tokens of {text.kind} text",
                f"it needs {self.minimum()}",
                "raise the context, or name the other probes only",
            )
        why = self.unfit(topology)
        if why is not None:
            raise refusal(ProbeError, f"probe {self.name!r} on {topology.model_class}", why, "name the other probes only")
        if "segments" in self.requires and text.segments is None:
            raise refusal(
                ProbeError,
                f"probe {self.name!r} on {text}",
                "it averages over sentences and this text has none marked",
                "pass text to a Scope with a tokenizer, or ProbeText.natural(ids, segments=...)",
            )

    def run(self, scope: Any, data: Any = None, **options: Any) -> ProbeResult:
        """This probe alone. `data`: a ProbeText or several, or what `headscope.profile.profile` takes; `options` as there (context, texts,
        seed, ...).
        """
        from headscope.profile.runner import run_probe

        return run_probe(self, scope, data, **options)


def stack(rows: Iterable[Tensor]) -> Tensor:
    """One [H] tensor per layer as [L, H] float64; layers with fewer heads are filled with NaN."""
    listed = [row.to(torch.float64) for row in rows]
    width = max((len(row) for row in listed), default=0)
    out = torch.full((len(listed), width), float("nan"), dtype=torch.float64)
    for place, row in enumerate(listed):
        out[place, : len(row)] = row
    return out


def by_layer(stats: HeadStatistics, value: Callable[[int], Tensor]) -> Tensor:
    """[L, H] from a function of the layer number that gives [H], over the main stack in order."""
    return stack(value(layer) for layer in stats.topology.layers)


def mean_rows(values: Tensor) -> Tensor:
    """[B, H, N] -> [H]: mean over sequences and positions; NaN (padding) does not count."""
    return values.to(torch.float64).nanmean(dim=(0, 2))


def mean_pairs(stats: HeadStatistics, name: str) -> Tensor:
    """[L, H]: mean of the entries of a named list of pairs."""
    pairs = stats.pairs(name)
    return by_layer(stats, lambda layer: pairs[layer].to(torch.float64).mean(dim=(0, 2)))

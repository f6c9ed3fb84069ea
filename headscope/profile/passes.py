"""Which probes share which forward pass.

A request has one value per parameter. Probes that agree share a pass; a probe that wants another value of a parameter, or other places
under the same name, gets a pass of its own on the same text. That costs a forward pass and never a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.probes import Needs, Probe, ProbeText
    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology


@dataclass(slots=True, eq=False)
class Pass:
    """One forward pass: a text, the probes that read it, and their merged request."""

    text: ProbeText
    probes: list[Probe] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    segments: Tensor | None = None

    def agrees(self, needs: Needs) -> bool:
        """True when the needs can be added without changing what anyone else gets."""
        for name, value in needs.parameters.items():
            if name in self.parameters and self.parameters[name] != value:
                return False
        for name, places in needs.pairs.items():
            mine = self.pairs.get(name)
            if mine is not None and not all(torch.equal(a, b) for a, b in zip(mine, places, strict=True)):
                return False
        return self.segments is None or needs.segments is None or torch.equal(self.segments, needs.segments)

    def add(self, needs: Needs) -> None:
        """Adds needs that agree."""
        self.names += [name for name in needs.names if name not in self.names]
        self.parameters.update(needs.parameters)
        self.pairs.update(needs.pairs)
        if needs.segments is not None:
            self.segments = needs.segments

    def request(self) -> dict[str, Any]:
        """Keyword arguments of the capture."""
        out: dict[str, Any] = {"statistics": list(self.names), **self.parameters}
        if self.pairs:
            out["pairs"] = self.pairs
        if self.segments is not None:
            out["segments"] = self.segments
        return out

    def scores(self, stats: HeadStatistics) -> dict[str, Tensor]:
        """Every metric of this pass's probes."""
        out: dict[str, Tensor] = {}
        for probe in self.probes:
            out.update(probe.score(stats, self.text))
        return out


def plan_passes(probes: list[Probe], text: ProbeText, topology: Topology, base: Needs | None = None) -> list[Pass]:
    """The fewest passes over one text that serve these probes, `base` in the first of them."""
    first = Pass(text)
    if base is not None:
        first.add(base)
    passes = [first]
    for probe in probes:
        needs = probe.needs(text, topology)
        fitting = next((one for one in passes if one.agrees(needs)), None)
        if fitting is None:
            fitting = Pass(text)
            passes.append(fitting)
        fitting.add(needs)
        fitting.probes.append(probe)
    return passes

"""The active probes of a profile: one after another, each with its own units in one journal.

A probe that was named must give numbers or say why it cannot: its error ends the profile, and its finished units stay in the journal. A
probe that came along with a group ("active", "all") and does not fit the model, or that the model cannot answer, is left out with its
reason in the run card; hours of other probes are not thrown away for it, and its absence is never silent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import DataError, ProbeError, refusal
from headscope.profile.journal import Journal

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.probes.active import ActiveProbe
    from headscope.scope import Scope


@dataclass(slots=True, eq=False)
class ActiveFound:
    """What the active probes gave, merged; `left_out`: probe -> why it says nothing."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def measure_active(
    scope: Scope,
    probes: list[ActiveProbe],
    *,
    named: set[str],
    context: int | None,
    seed: int,
    progress: bool | None,
    journal: Journal | str | Path | None,
) -> ActiveFound:
    """Runs the probes. `named`: those whose refusal ends the run; the others are left out with their reason."""
    kept = journal if isinstance(journal, Journal) else Journal(journal)
    found = ActiveFound()
    ready: list[ActiveProbe] = []
    for probe in probes:  # every check before the first long measurement
        why = probe.unfit(scope)
        if why is None:
            ready.append(probe)
        elif probe.name in named:
            probe.check(scope)
        else:
            found.left_out[probe.name] = why
    for probe in ready:
        began = time.perf_counter()
        try:
            one = probe.measure(scope, None, probe.work(scope, None, context, seed, progress, kept))
        except (ProbeError, DataError) as error:
            if probe.name in named:
                raise
            found.left_out[probe.name] = str(error)
            continue
        finally:
            found.seconds[probe.name] = time.perf_counter() - began
        for metric in probe.metrics:
            if metric.name not in one.scores:
                raise refusal(ProbeError, f"probe {probe.name!r}", f"it gave no {metric.name!r}", "this is a bug of the probe")
            found.scores[metric.name] = one.scores[metric.name]
        found.numbers.update({**one.numbers, **probe.numbers(one.scores)})
        found.data += [row for row in one.data if row not in found.data]
        found.tables.update({f"{probe.name}.{name}": table for name, table in one.tables.items()})
        found.notes += [f"{probe.name}: {note}" for note in one.notes]
    return found

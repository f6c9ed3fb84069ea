"""Making a profile: build the texts, run one pass per text, let every probe score it, average over texts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from headscope.errors import ModelError, ProbeError, refusal
from headscope.probes import Needs, Probe, ProbeText, resolve
from headscope.probes.active import ActiveProbe, AnyProbe
from headscope.probes.registry import named
from headscope.probes.text import REPEATS, TextKind
from headscope.profile.active import measure_active
from headscope.profile.card import RunCard, intervention_facts, machine_facts, model_facts, now, version_facts
from headscope.profile.head_profile import HeadProfile
from headscope.profile.journal import Journal
from headscope.profile.maps import block_size, keeping
from headscope.profile.passes import Pass, plan_passes
from headscope.profile.result import ProbeResult, head_table
from headscope.profile.roles import assign_roles
from headscope.profile.texts import build_texts, data_facts, given_texts
from headscope.statistics import StatisticsRequest
from headscope.store.files import canonical_heads

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.data.natural import TextData
    from headscope.probes.registry import ProbeLike
    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics

KINDS: tuple[TextKind, ...] = ("natural", "repeated_random", "repeated_token")


@dataclass(slots=True, eq=False)
class Measured:
    """What the passes of a profile gave, before it is put together."""

    scores: dict[str, Tensor]
    numbers: dict[str, float]
    texts: dict[TextKind, list[ProbeText]]
    kernels: set[str] = field(default_factory=set)
    backend: str = ""
    requests: dict[str, StatisticsRequest] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[pd.DataFrame]] = field(default_factory=dict)
    shown: tuple[ProbeText, HeadStatistics] | None = None


def profile(
    scope: Scope,
    probes: str | ProbeLike | Iterable[ProbeLike] = "passive",
    *,
    context: int | None = 2048,
    data: TextData = None,
    texts: int = 1,
    seed: int = 0,
    repeats: int = REPEATS,
    maps: bool = True,
    keep_statistics: bool = True,
    block: int | None = None,
    keep: Sequence[int] | int | str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    beyond_context: bool = False,
    progress: bool | None = None,
    journal: Journal | str | Path | None = None,
) -> HeadProfile:
    """Profiles every head of the main stack.

    - `probes`: "passive", "active", "all", a name, or a list of names, classes and instances. A probe that came with a group and cannot
      say anything about this model is left out, with its reason in the card; one that was named is refused.
    - `context`: tokens per natural text; None takes 2,048 or the model's length, whichever is less. Repeated random text has R blocks of
      context / (R + 1) tokens.
    - `data`: natural text to use in place of the bundled essays: a .txt or .jsonl path, text, a list of texts, or token ids.
    - `texts`: how many texts of each kind to average over. `seed`: of the random tokens; text i is drawn with seed + i. `repeats`: R.
    - `maps`, `keep_statistics`: keep the block maps and the per-token statistics of the first natural text. `block`: tokens a side of a
      map's cell; None takes what gives 128 cells a side, and 128 from 16,384 to 131,072 tokens.
    - `keep`: layers whose q and k on that text are kept, or "all", so that any window of their maps can be recomputed exactly.
    - `out`: a run directory to write while measuring, a layer at a time, so that a long text's maps, q and k are never in memory together;
      the profile that comes back reads from it. `overwrite`: replace a run that is there.
    - `beyond_context`: allow a context longer than the model was made for.
    - `progress`: a bar on stderr; None shows it on a terminal only.
    - `journal`: a folder where active probes keep finished trials, so that a run that was killed goes on where it stopped.

    Raises ProbeError, DataError or CaptureError when a probe, a text or the model cannot be used; nothing is measured halfway.
    """
    started = time.perf_counter()
    asked = resolve(probes)
    passive = [probe for probe in asked if isinstance(probe, Probe)]
    left = {one.name: why for one in passive if one.name not in named(probes) and (why := one.unfit(scope.topology)) is not None}
    chosen = [probe for probe in passive if probe.name not in left]
    acting = [probe for probe in asked if isinstance(probe, ActiveProbe)]
    if not scope.topology.main:
        raise refusal(ModelError, f"{scope.topology.model_class}", "it has no attention layers in a main stack", "pass a transformer")
    if context is None:
        context = min(2048, scope.max_length or 2048)
    kinds = [kind for kind in KINDS if any(probe.data == kind for probe in chosen)]
    built = {
        kind: build_texts(scope, kind, context=context, data=data, texts=texts, seed=seed, repeats=repeats, beyond_context=beyond_context)
        for kind in kinds
    }
    shown = built[kinds[0]][0] if kinds else None
    size = block or block_size(len(shown) if shown is not None else context)
    readers = [probe for probe in chosen if probe.data == kinds[0]]
    with keeping(scope, shown, maps, keep_statistics, size, keep, readers=readers, out=out, overwrite=overwrite) as keeper:
        found = measure(scope, chosen, built, shown=shown, base=keeper.needs, beyond_context=beyond_context, progress=progress)
        acted = measure_active(scope, acting, named=named(probes), context=context, seed=seed, progress=progress, journal=journal)
        left.update(acted.left_out)
        if not found.scores and not acted.scores:
            why = "; ".join(f"{name}: {reason}" for name, reason in left.items())
            raise refusal(ProbeError, f"probes {probes!r} on {scope.name}", f"none of them could say anything ({why})", "name other probes")
        found.scores.update(acted.scores)
        found.numbers.update(acted.numbers)
        found.seconds.update(acted.seconds)

        table = head_table(scope.topology, found.scores)
        table["roles"], table["reasons"] = assign_roles(table)
        found.seconds |= keeper.seconds
        found.seconds["total"] = time.perf_counter() - started
        told = [probe for probe in asked if probe.name not in left]
        card = _card(scope, told, found, context, texts, seed, repeats, size)
        card.data += acted.data
        card.notes, card.left_out = acted.notes, left
        keeper.finish(canonical_heads(table), card, found.shown[1] if found.shown else None, {**joined(found.tables), **acted.tables})
    return keeper.profile()


def run_probe(
    probe: Probe,
    scope: Scope,
    data: Any = None,
    *,
    context: int | None = None,
    texts: int = 1,
    seed: int = 0,
    repeats: int = REPEATS,
    beyond_context: bool = False,
    progress: bool | None = None,
) -> ProbeResult:
    """One probe alone, on its own kind of text or on given ProbeTexts. `context` defaults to 2,048 tokens or the model's length, whichever
    is less.
    """
    ready = given_texts(data)
    if ready is None:
        if data is not None and probe.data != "natural":
            raise refusal(
                ProbeError,
                f"data for probe {probe.name!r}",
                f"it reads {probe.data} text, which is drawn and not given",
                "pass ProbeTexts, or no data",
            )
        length = min(2048, scope.max_length or 2048) if context is None else context
        ready = build_texts(
            scope, probe.data, context=length, data=data, texts=texts, seed=seed, repeats=repeats, beyond_context=beyond_context
        )
    found = measure(scope, [probe], {probe.data: ready}, beyond_context=beyond_context, progress=progress)
    tables = {name.partition(".")[2]: table for name, table in joined(found.tables).items()}
    return ProbeResult(probe, found.scores, scope.topology, tuple(ready), found.numbers, tables)


def joined(tables: dict[str, list[pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """One table per name; of several texts one below the other, with a column for the text's number."""
    import pandas as pd

    return {
        name: parts[0] if len(parts) == 1 else pd.concat([part.assign(text=number) for number, part in enumerate(parts)], ignore_index=True)
        for name, parts in tables.items()
    }


def measure(
    scope: Scope,
    probes: list[Probe],
    texts: dict[TextKind, list[ProbeText]],
    *,
    shown: ProbeText | None = None,
    base: Needs | None = None,
    beyond_context: bool = False,
    progress: bool | None = None,
) -> Measured:
    """Runs the passes and averages the scores over texts. Every probe's check comes before the first pass."""
    topology = scope.topology
    work: list[tuple[TextKind, list[Pass]]] = []
    for kind, listed in texts.items():
        readers = [probe for probe in probes if probe.data == kind]
        for text in listed:
            for probe in readers:
                probe.check(text, topology)
            work.append((kind, plan_passes(readers, text, topology, base if text is shown else None)))
    found = Measured({}, {}, texts)
    sums: dict[str, list[Tensor]] = {}
    total = sum(len(one.text) for _, passes in work for one in passes)
    hidden = not sys.stderr.isatty() if progress is None else not progress
    with tqdm(total=total, unit="tok", disable=hidden, desc="profile", file=sys.stderr) as bar:
        for kind, passes in work:
            for one in passes:
                bar.set_description(f"{kind.replace('_', ' ')} text")
                began = time.perf_counter()
                stats = scope.capture(one.text.ids, beyond_context=beyond_context, **one.request())
                captured = time.perf_counter()
                for name, values in one.scores(stats).items():
                    sums.setdefault(name, []).append(values)
                for probe in one.probes:
                    for name, table in probe.tables(stats, one.text).items():
                        found.tables.setdefault(f"{probe.name}.{name}", []).append(table)
                found.seconds[kind] = found.seconds.get(kind, 0.0) + captured - began
                found.seconds["scores"] = found.seconds.get("scores", 0.0) + time.perf_counter() - captured
                found.kernels |= set(stats.kernels)
                found.backend = stats.backend
                found.requests.setdefault(kind, stats.request)
                if one.text is shown and found.shown is None:
                    found.shown = (one.text, stats)
                bar.update(len(one.text))
    for probe in probes:
        mine = {metric.name: torch.stack(sums[metric.name]).nanmean(dim=0) for metric in probe.metrics}
        found.scores.update(mine)
        found.numbers.update(probe.numbers(mine))
    return found


def _card(scope: Scope, probes: list[AnyProbe], found: Measured, context: int, texts: int, seed: int, repeats: int, block: int) -> RunCard:
    from headscope import __version__

    parameters: dict[str, Any] = {"context": context, "texts": texts, "repeats": repeats, "map_block": block}
    random = found.texts.get("repeated_random")
    if random:
        parameters["random_block"] = random[0].block
    for kind, request in found.requests.items():
        for name in ("sink_tokens", "local_window", "waad_window", "fai_band"):
            used = {"sink_tokens": "sink_mass", "local_window": "local_mass", "waad_window": "waad", "fai_band": "fai"}[name]
            if used in request.names and kind == "natural":
                value = getattr(request, name)
                parameters[name] = list(value) if isinstance(value, tuple) else value
    metrics = {
        metric.name: {
            "probe": probe.name,
            "title": probe.describe()["title"],
            "unit": metric.unit,
            "higher_is": metric.higher_is,
            "range": list(metric.range),
            "per": metric.per,
            "data": probe.data,
        }
        for probe in probes
        for metric in probe.metrics
    }
    return RunCard(
        model=model_facts(scope),
        data=[data_facts(kind, listed) for kind, listed in found.texts.items()],
        probes=[{"name": probe.name, "parameters": probe.parameters(), "source": probe.source} for probe in probes],
        metrics=metrics,
        numbers=found.numbers,
        attention_kernels=sorted(found.kernels),
        statistics_kernel=found.backend,
        parameters=parameters,
        seeds={"texts": seed},
        versions=version_facts(),
        machine=machine_facts(str(scope.device)),
        seconds={name: round(value, 3) for name, value in found.seconds.items()},
        headscope_version=__version__,
        created=now(),
        interventions=intervention_facts(scope),
    )

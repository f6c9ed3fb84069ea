"""Quality against density: what every planner's plans cost a model that reads long texts, all measured under `scope.execute(plan)`.

Two questions, since methods act in two places. "prefill": x is the share of the causal entries that the prefill computed. "decode": x is
the share of the keys that a decode step reads; methods that drop keys for good are asked for that share of the cache. What was asked and
what was kept both stand in a row, and curves are drawn at what was kept.

`bundled:needle` is judged by whole answers right: the question is the end of the prompt, the answer is decoded word by word with the right
words given (an answer counts when every word is the model's first choice, which is what greedy decoding would say). Other models are
judged by perplexity: over the second half of a prompt for "prefill", over decoded tokens for "decode".

A method that cannot meet a density gives no point there, with its reason, rather than a point somewhere else; so does a method whose probe
cannot be run on the model. Rows are kept as they come, so that a run that was killed goes on where it stopped, and several processes can
share the rows of one bench.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.bench.quality_run import keys_read, run
from headscope.bench.quality_tasks import KINDS, Task, needle_task, shown_haystack, text_task
from headscope.errors import HeadscopeError, PlanError, refusal, unknown_name
from headscope.plans import SparsePlan
from headscope.plans.dynamic_curves import remembering

if TYPE_CHECKING:
    from headscope.profile import HeadProfile
    from headscope.scope import Scope

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7)
OVER_TEXT = ("minference", "map_similarity")
"""Active probes that read any text: a model of haystacks is shown one."""
ONE_BY_ONE = ("flex_blocks",)
"""Patterns that choose head by head on every device: their rows take fewer haystacks or texts."""


# ---- what planners stand on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shown:
    """What planners may look at: a profile, made of texts that nothing is judged by, the text that dials are set on (None: a bundled
    essay), and why probes are missing: `failed` probe -> reason.
    """

    profile: HeadProfile | None = None
    text: str | None = None
    failed: Mapping[str, str] = field(default_factory=dict)


def probes_of(methods: Iterable[str]) -> list[str]:
    """The probes that planners stand on: of alternatives the last, which is the one that a single pass can measure."""
    from headscope.plans.planners import PLANNERS
    from headscope.plans.planners.base import _probe_of

    found: dict[str, None] = {}
    for method in methods:
        needs = PLANNERS[method].requires
        if needs.metrics:
            chosen = needs.metrics[-1] if method != "headkv" else needs.metrics[0]
            found |= dict.fromkeys(_probe_of(name) for name in chosen)
        found |= dict.fromkeys(table.partition(".")[0] for table in needs.tables)
    return list(found)


def shown(scope: Scope, methods: Sequence[str], task: Task, say: Callable[[str], None] = lambda text: None) -> Shown:
    """What the methods stand on, measured now, probe by probe. A model of haystacks is shown a haystack where a probe reads any text."""
    ids = None if task.perplexity else shown_haystack(task.length)
    profile = base_profile(scope, task)
    failed: dict[str, str] = {}
    for name in probes_of(methods):
        start = time.perf_counter()
        try:
            profile = joined(profile, measured(scope, name, task))
            say(f"probe {name}: {time.perf_counter() - start:.0f} s")
        except HeadscopeError as error:
            failed[name] = " ".join(str(error).split())
            say(f"probe {name}: {failed[name]}")
    text = None if ids is None else str(scope.text_tokenizer.decode(ids))
    return Shown(profile, text, failed)


def base_profile(scope: Scope, task: Task) -> HeadProfile:
    """Block maps and one number a head, of the text that planners are shown."""
    ids = None if task.perplexity else shown_haystack(task.length)[None]
    return scope.profile(["entropy"], context=_context(scope, task), data=ids, block=tile(task.length))


def measured(scope: Scope, name: str, task: Task) -> HeadProfile:
    """A profile with one probe alone. Raises what the probe raises."""
    from headscope.probes.active import ActiveProbe
    from headscope.probes.registry import REGISTRY
    from headscope.profile.head_profile import HeadProfile

    ids = None if task.perplexity else shown_haystack(task.length)[None]
    if name not in OVER_TEXT or ids is None:
        return scope.profile([name], context=_context(scope, task), data=ids, maps=False, keep_statistics=False)
    probe = REGISTRY[name]()
    assert isinstance(probe, ActiveProbe)
    found = probe.run(scope, ids)
    profile = scope.profile(["entropy"], context=_context(scope, task), data=ids, maps=False, keep_statistics=False)
    table = profile.table.copy()
    for metric, values in found.scores.items():
        table[metric] = [float(values[profile.layers.index(int(one.layer)), int(one.head)]) for one in table.itertuples()]
    return HeadProfile(table, profile.card, tables={f"{name}.{part}": frame for part, frame in found.tables.items()})


def joined(one: HeadProfile, other: HeadProfile) -> HeadProfile:
    """The first profile with the second's metrics and tables."""
    from headscope.profile.head_profile import HeadProfile

    new = [name for name in other.metrics if name not in one.metrics]
    table = one.table.merge(other.table[["layer", "head", *new]], on=["layer", "head"], how="left")
    card = replace(one.card, data=[*one.card.data, *(row for row in other.card.data if row not in one.card.data)])
    return HeadProfile(table, card, one._content, tables={**one.tables, **other.tables})


def tile(length: int) -> int:
    """Tokens of a tile: 128, but 32 tiles and more a side, as the methods have at their lengths."""
    return min(128, max(16, 1 << max(0, (length // 32).bit_length() - 1)))


def _context(scope: Scope, task: Task) -> int:
    """Tokens that probes read: all of a shown haystack."""
    return min(task.length, scope.max_length or task.length) if task.perplexity else len(shown_haystack(task.length))


# ---- plans --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """One model, its task and what planners may look at. `few`: sequences of each kind for methods that choose head by head."""

    scope: Scope
    task: Task
    shown: Shown = field(default_factory=Shown)
    size: int = 4
    few: int | None = None
    say: Callable[[str], None] = field(default=lambda text: None)

    def options(self, method: str, phase: Phase, target: float) -> dict[str, Any]:
        """The planner's options for one point. PlanError where the method does not act in this phase."""
        from headscope.plans.planners import PLANNERS

        cls, length = PLANNERS[method], len(self.task.prompts[0]) if phase == "prefill" else self.task.length
        known = {item.name for item in fields(cls)}
        options: dict[str, Any] = {"length": length}
        if "block" in known:
            options["block"] = tile(self.task.length)
        if "stride" in known and method == "xattention":
            options["stride"] = min(16, options["block"] // 4)
        if method == "anchor":
            options["step"] = 4
        if method in ("duo", "task_kv"):  # windows in proportion: those of the papers are made for longer texts
            options["recent"] = min(256, max(8, length // 32))
            options["sink"] = min(128 if method == "duo" else 16, max(4, length // 128))
        if "aim" in known and self.task.perplexity:
            options["aim"] = "prose"
        if "text" in known and self.shown.text is not None:
            options["text"] = self.shown.text
        bound = {"prefill": "density", "decode": "cache"}[phase]
        if method in ("tidal", "hylra"):
            if phase == "prefill":
                raise PlanError(f"{method} decodes sparsely and prefills dense")
            if method == "hylra":  # half of what is read goes to full layers, one at least
                options["full"] = max(1, round(target / 2 * len(self.scope.topology.main)))
            return options | {"keep": self._keep(method, target, options)}
        if not cls.causal or bound not in cls.bounds:
            raise PlanError(f"{method} does not act in the {phase}")
        return options | {bound: target}

    def _keep(self, method: str, target: float, options: dict[str, Any]) -> int:
        """Keys of a choice with which a decode step reads `target` of all keys."""
        made = self.plan(method, keep=1, **options)
        reading = [keys_read(one, self.task.length) for one in made.patterns.values()]
        full = sum(one == self.task.length for one in reading)
        keep = (target * len(reading) - full) / max(1, len(reading) - full) * self.task.length - 1
        if keep < 1:
            raise PlanError(f"{full / len(reading):.2f} of the heads read every key")
        return int(keep)

    def plan(self, method: str, **options: Any) -> SparsePlan:
        """A planner's plan from the profile and the live model, whichever it asks for."""
        from headscope.plans.planners import plan

        profile = self.shown.profile
        return plan(self.scope, method, **options) if profile is None else plan(profile, method, scope=self.scope, **options)

    def point(self, method: str, phase: Phase, target: float) -> dict[str, Any]:
        """One row: what was asked, what was kept, how good the answers are; or why there is none."""
        row: dict[str, Any] = {"method": method, "phase": phase, "target": target}
        start = time.perf_counter()
        try:
            options = self.options(method, phase, target)
            for probe in probes_of([method]):
                if probe in self.shown.failed:
                    raise PlanError(f"probe {probe}: {self.shown.failed[probe]}")
            made = self.plan(method, **options)
        except HeadscopeError as error:
            return row | {"reason": " ".join(str(error).split())}
        slow = any(one.kind in ONE_BY_ONE for one in made.patterns.values())
        task = self.task.part(self.few) if slow and self.few is not None else self.task
        planned = time.perf_counter() - start
        row |= run(self.scope, task, made, size=self.size, phase=phase)
        return row | {"planned_s": round(planned, 1), "ran_s": round(time.perf_counter() - start - planned, 1), "notes": list(made.notes)}

    def dense(self, phase: Phase) -> dict[str, Any]:
        """The row of the model without a plan."""
        return {"method": "dense", "phase": phase, "target": 1.0} | run(self.scope, self.task, None, size=self.size)

    def table(
        self,
        methods: Sequence[str],
        densities: Sequence[float],
        phases: Sequence[Phase] = PHASES,
        *,
        keep: Path | None = None,
        part: tuple[int, int] = (1, 1),
    ) -> list[dict[str, Any]]:
        """Dense first, then every method in every phase at every density, the smallest densities last.

        `keep`: a folder where rows are written as they come and from which finished ones are taken; `part` (i, n): of the rows that are
        not dense, every n-th from the i-th on, 1 <= i <= n, beside what the folder has.
        """
        first: list[Key] = [("dense", phase, 1.0) for phase in phases]
        asked: list[Key] = [(method, phase, target) for target in sorted(densities, reverse=True) for method in methods for phase in phases]
        rows = Rows(keep, f"{self.scope.name}: {self.task.data}", part[0])
        dense: dict[str, Any] = {}
        with remembering():
            for key in [*first, *asked[part[0] - 1 :: part[1]]]:
                if key in rows.found:
                    continue
                if key[0] != "dense":
                    row = self.point(*key)
                else:
                    dense = dense or run(self.scope, self.task, None, size=self.size)
                    row = {"method": "dense", "phase": key[1], "target": 1.0} | dense
                rows.add(key, row)
                self.say(describe(row))
        order = [*first, *((method, phase, target) for method in methods for phase in phases for target in sorted(densities))]
        return [rows.found[key] for key in order if key in rows.found]


Key = tuple[str, Phase, float]


class Rows:
    """Rows by (method, phase, target), kept in a folder as they come: one JSON object a line, a file per process."""

    def __init__(self, folder: Path | None, title: str, part: int = 1) -> None:
        self.title = title
        self.found: dict[Key, dict[str, Any]] = {}
        self._file = None if folder is None else folder / f"rows-{part}.jsonl"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("rows-*.jsonl")):
                self._read(path)

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a process that was killed
                continue
            if row.pop("of", None) == self.title:
                self.found[row["method"], row["phase"], float(row["target"])] = row

    def add(self, key: Key, row: dict[str, Any]) -> None:
        """Keeps a row, on disk first."""
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"of": self.title} | row) + "\n")
        self.found[key] = row


def describe(row: Mapping[str, Any]) -> str:
    """One row in words."""
    head = f"{row['method']} {row['phase']} {row['target']:g}: "
    if "reason" in row:
        return head + str(row["reason"])
    names = ("density", "read", "cache", *KINDS, "accuracy", "nll_prefill", "nll_decode")
    values = [f"{name} {row[name]:.4f}" for name in names if row.get(name) is not None]
    return head + ", ".join(values) + f", n {row['n']}, {row['kernels']}"


def causal_methods() -> list[str]:
    """Every planner that plans causal models, ours first."""
    from headscope.plans.planners import PLANNERS

    return sorted((name for name, cls in PLANNERS.items() if cls.causal), key=lambda name: name != "allocate")


def check_methods(methods: Iterable[str]) -> list[str]:
    """The names as a list. PlanError for one that is no planner of causal models."""
    known = causal_methods()
    listed = list(methods)
    for name in listed:
        if name not in known:
            raise unknown_name(PlanError, "planner", name, known)
    return listed


def bench(
    models: Sequence[str],
    methods: Sequence[str] | None,
    densities: Sequence[float],
    phases: Sequence[str],
    *,
    length: int,
    count: int,
    batch: int = 4,
    few: int | None = None,
    kinds: Sequence[str] = ("code", "entry"),
    texts: Path | None = None,
    run_path: Path | None = None,
    keep: Path | None = None,
    part: tuple[int, int] = (1, 1),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The whole measurement, as plain data: {"results": [{model, task, rows}], ...}. PlanError for unknown methods, phases or densities."""
    import headscope as hs

    chosen = causal_methods() if methods is None else check_methods(methods)
    for phase in phases:
        if phase not in PHASES:
            raise unknown_name(PlanError, "phase", phase, PHASES)
    for one in densities:
        if not 0 < one <= 1:
            raise refusal(PlanError, f"density {one}", "it is a share", "use 0 < density <= 1")
    if not 1 <= part[0] <= part[1]:
        raise refusal(PlanError, f"part {part[0]}/{part[1]}", "parts count from 1", "use 1/4, 2/4, 3/4 and 4/4")
    results = []
    for name in models:
        scope = hs.load(name)
        haystacks = name == "bundled:needle"
        task = needle_task(length, count, tuple(kinds)) if haystacks else text_task(scope, length, count, texts)
        if run_path is None:
            found = shown(scope, chosen, task, say)
        else:
            text = None if task.perplexity else str(scope.text_tokenizer.decode(shown_haystack(task.length)))
            found = Shown(hs.HeadProfile.load(run_path), text)
        made = Bench(scope, task, found, batch, few, say)
        rows = made.table(chosen, densities, [one for one in PHASES if one in phases], keep=keep, part=part)
        device = torch.cuda.get_device_name() if scope.device.type == "cuda" else "cpu"
        about = {"model": name, "task": task.name, "data": task.data, "length": length, "count": count, "device": device}
        results.append(about | {"rows": rows})
    return {"benchmark": "quality", "results": results}

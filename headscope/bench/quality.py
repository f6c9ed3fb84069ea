"""Quality against density: what every planner's plans cost a model that reads long texts, all measured under `scope.execute(plan)`.

Two questions, since methods act in two places. "prefill": x is the share of the causal entries that the prefill computed. "decode": x is
the share of the keys that a decode step reads; methods that drop keys for good are asked for that share of the cache. Both are counted from
the patterns that really ran, chosen ones included, and not taken from what a plan promised.

`bundled:needle` is judged by whole answers right: the question is the end of the prompt, the answer is decoded word by word with the right
words given (an answer counts when every word is the model's first choice, which is what greedy decoding would say). Other models are
judged by perplexity on the bundled essays: over the second half of a prefill for "prefill", over decoded tokens for "decode".

The silent failure this avoids: a plan that in truth ran dense. A row says what was kept, and a method that cannot meet a density gives no
point there, with its reason, rather than a point somewhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.errors import HeadscopeError, PlanError, refusal, unknown_name
from headscope.plans import Budget, Dense, Pattern, SparsePlan, TopKeys
from headscope.plans.dynamic_curves import remembering
from headscope.plans.indices import choose, element

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.profile import HeadProfile
    from headscope.scope import Scope

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
DENSITIES = (0.1, 0.2, 0.3, 0.5, 0.7)
SEED = 4242
"""Of the held-out haystacks, which are those of the model's card."""
DECODED = 32
"""Tokens that are decoded one by one for a perplexity."""
OVER_TEXT = ("minference", "map_similarity")
"""Active probes that read any text: a model of haystacks is shown one."""


@dataclass(frozen=True, eq=False)
class Task:
    """What a model is judged by. `prompts` [n][N_i] ids, `answers` [n][a] ids that follow, in groups of one answer length; `kinds` [n]."""

    name: str
    prompts: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    kinds: tuple[str, ...]
    length: int
    perplexity: bool = False


def needle_task(length: int, count: int) -> Task:
    """`count` held-out haystacks of codes and as many of entries, one question each."""
    from headscope.models.bundled import data_needle
    from headscope.models.bundled.training import generator

    prompts, answers, kinds = [], [], []
    for kind in ("code", "entry"):
        source = generator(SEED + length, "cpu")
        for one in (data_needle.batch(1, length, kind, 8, 1, source) for _ in range(count)):
            places = one.answers[0, 0]
            prompts.append(one.ids[0, : int(places[0])])
            answers.append(one.ids[0, places])
            kinds.append(kind)
    return Task(f"needle {length}", tuple(prompts), tuple(answers), tuple(kinds), length)


def text_task(scope: Scope, length: int, count: int) -> Task:
    """`count` texts of exactly `length` tokens from the bundled essays, the last DECODED of which are decoded."""
    from headscope.data import natural_texts

    texts = [one.ids for one in natural_texts(scope.tokenizer, length, texts=count)]
    decoded = min(DECODED, length // 4)
    return Task(
        f"text {length}",
        tuple(ids[:-decoded] for ids in texts),
        tuple(ids[-decoded:] for ids in texts),
        ("text",) * count,
        length,
        perplexity=True,
    )


@dataclass(eq=False)
class Meter:
    """Counts what a plan's patterns keep, from the calls of the model under that plan: one sequence of a batch. Computes nothing."""

    plan: SparsePlan
    kept: float = 0.0
    entries: float = 0.0
    read: float = 0.0
    keys: float = 0.0

    def execute(self, call: AttentionCall) -> Tensor | None:
        """None: the call goes on to the plan's executor."""
        if call.layer is None or not call.mask.causal:
            return None
        one = element(call, 0)
        start = 0 if one.first_token is None else int(one.first_token[0])
        length = call.k.shape[2] + call.key_offset - start
        for head in range(call.q.shape[1]):
            pattern = self.plan.patterns[call.layer, head]
            if call.q.shape[2] == 1 and call.query_offset > 0:
                self.read += keys_read(pattern, length)
                self.keys += length
            elif call.query_offset == 0:
                late = isinstance(pattern, Budget | TopKeys)
                chosen = Dense() if late else choose(one, head, pattern)
                self.kept += chosen.kept(length)
                self.entries += length * (length + 1) / 2
        return None

    @property
    def density(self) -> float:
        """Share of the prefill's entries."""
        return self.kept / self.entries if self.entries else math.nan

    @property
    def share(self) -> float:
        """Share of the keys that a decode step reads."""
        return self.read / self.keys if self.keys else math.nan


def keys_read(pattern: Pattern, length: int) -> float:
    """Keys that the last of `length` tokens reads when it is decoded."""
    if isinstance(pattern, TopKeys):
        return length if pattern.full else min(length, pattern.keep + pattern.window)
    if pattern.static:
        return float(pattern.visible(torch.tensor([length - 1]), torch.arange(length)).sum())
    return min(length, pattern.cached(length))


# ---- running ----------------------------------------------------------------------------------------------------------


def batches(task: Task, size: int, only: int | None = None) -> Iterable[list[int]]:
    """Numbers of sequences to run together: of one kind, `size` at a time."""
    numbers = range(len(task.prompts) if only is None else only)
    for kind in dict.fromkeys(task.kinds):
        mine = [number for number in numbers if task.kinds[number] == kind]
        for first in range(0, len(mine), size):
            yield mine[first : first + size]


@torch.no_grad()
def run(scope: Scope, task: Task, plan: SparsePlan | None, *, size: int = 4) -> dict[str, Any]:
    """Accuracy per kind, or nll of the prefill's second half and of the decoded tokens, with what the plan kept."""
    hits: dict[str, list[bool]] = {}
    late: list[float] = []
    second: list[float] = []
    meter = None if plan is None else Meter(plan)
    metered: set[str] = set()
    for numbers in batches(task, size):
        kind = task.kinds[numbers[0]]
        with ExitStack() as stack:
            if plan is not None and meter is not None:
                stack.enter_context(scope.execute(plan, fallback=False))
                if kind not in metered:
                    stack.enter_context(scope.executing(meter))
                    metered.add(kind)
            prompts, answers = [task.prompts[n] for n in numbers], torch.stack([task.answers[n] for n in numbers]).to(scope.device)
            found, nll = _decode(scope, prompts, answers, rows=task.perplexity)
        if task.perplexity:
            late += found.flatten().tolist()
            second += nll
        else:
            hits.setdefault(kind, []).extend(bool(one) for one in (found == 0).all(1))
    row: dict[str, Any] = {"density": 1.0, "read": 1.0, "cache": 1.0}
    if plan is not None and meter is not None:
        row = {"density": meter.density, "read": meter.share, "cache": plan.kv_share(task.length)}
    if task.perplexity:
        return row | {"nll_prefill": sum(second) / len(second), "nll_decode": sum(late) / len(late), "tokens": len(late)}
    right = {kind: sum(one) / len(one) for kind, one in hits.items()}
    return row | right | {"accuracy": sum(map(sum, hits.values())) / len(task.prompts), "haystacks": len(task.prompts)}


def _decode(scope: Scope, prompts: Sequence[Tensor], answers: Tensor, *, rows: bool) -> tuple[Tensor, list[float]]:
    """([B, a]: rank beyond the first (0 or 1) of every answer word, or its nll with `rows`; nll of the prompts' second halves)."""
    longest = max(len(one) for one in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, one in enumerate(prompts):  # padding on the left, so that all answers begin at one place
        ids[number, longest - len(one) :] = one
        mask[number, longest - len(one) :] = 1
    ids, mask = ids.to(scope.device), mask.to(scope.device)
    whole = bool(mask.all())
    half = longest // 2
    out = scope.model(
        input_ids=ids, attention_mask=None if whole else mask, use_cache=True, logits_to_keep=longest - half + 1 if rows else 1
    )
    nll = []
    if rows:
        logits = out.logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, half:].flatten(), reduction="none")
        nll = losses.tolist()
    found = []
    cache, logits = out.past_key_values, out.logits[:, -1].float()
    for place in range(answers.shape[1]):
        word = answers[:, place]
        found.append(torch.nn.functional.cross_entropy(logits, word, reduction="none") if rows else (logits.argmax(-1) != word).long())
        if place + 1 < answers.shape[1]:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = scope.model(input_ids=word[:, None], attention_mask=None if whole else mask, past_key_values=cache, use_cache=True)
            cache, logits = step.past_key_values, step.logits[:, -1].float()
    return torch.stack(found, 1).cpu(), nll


# ---- plans ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """One model, its task and what planners may look at."""

    scope: Scope
    task: Task
    profile: HeadProfile | None = None
    text: str | None = None
    size: int = 4
    say: Callable[[str], None] = field(default=lambda text: None)

    def options(self, method: str, phase: Phase, target: float) -> dict[str, Any]:
        """The planner's options for one point. PlanError where the method does not act in this phase."""
        from headscope.plans.planners import PLANNERS

        cls, length = PLANNERS[method], self.task.length
        known = {item.name for item in fields(cls)}
        options: dict[str, Any] = {"length": length}
        small = max(16, 1 << max(0, (length // 32).bit_length() - 1))  # 32 tiles and more a side, as the methods have at their lengths
        if "block" in known:
            options["block"] = min(128, small)
        if "stride" in known and method == "xattention":
            options["stride"] = min(16, options["block"] // 4)
        if method == "anchor":
            options["step"] = 4
        if method in ("duo", "task_kv"):  # windows in proportion: those of the papers are made for longer texts
            options["recent"] = min(256, max(8, length // 32))
            options["sink"] = min(128 if method == "duo" else 16, max(4, length // 128))
        if "text" in known and self.text is not None:
            options["text"] = self.text
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

        return plan(self.scope, method, **options) if self.profile is None else plan(self.profile, method, scope=self.scope, **options)

    def point(self, method: str, phase: Phase, target: float) -> dict[str, Any]:
        """One row: what was asked, what was kept, how good the answers are; or why there is none."""
        row: dict[str, Any] = {"method": method, "phase": phase, "target": target}
        try:
            made = self.plan(method, **self.options(method, phase, target))
        except HeadscopeError as error:
            return row | {"reason": " ".join(str(error).split())}
        return row | run(self.scope, self.task, made, size=self.size)

    def table(self, methods: Sequence[str], densities: Sequence[float], phases: Sequence[Phase] = PHASES) -> list[dict[str, Any]]:
        """Dense first, then every method in every phase at every density."""
        rows = [{"method": "dense", "phase": phase, "target": 1.0} | run(self.scope, self.task, None, size=self.size) for phase in phases]
        self.say(describe(rows[0]))
        with remembering():
            for method in methods:
                for phase in phases:
                    for target in densities:
                        rows.append(self.point(method, phase, target))
                        self.say(describe(rows[-1]))
        return rows


def describe(row: dict[str, Any]) -> str:
    """One row in words."""
    head = f"{row['method']} {row['phase']} {row['target']:g}: "
    if "reason" in row:
        return head + row["reason"]
    values = [
        f"{name} {row[name]:.4f}"
        for name in ("density", "read", "cache", "code", "entry", "accuracy", "nll_prefill", "nll_decode")
        if name in row
    ]
    return head + ", ".join(values)


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


def evidence(scope: Scope, methods: Sequence[str], task: Task, say: Callable[[str], None] = lambda text: None) -> HeadProfile:
    """A profile with what the methods stand on. A model of haystacks is shown a haystack where a probe reads any text."""
    from headscope.probes.active import ActiveProbe
    from headscope.probes.registry import REGISTRY
    from headscope.profile.head_profile import HeadProfile

    names = probes_of(methods)
    say(f"measuring {', '.join(names) or 'block maps'}")
    ids = None if task.perplexity else task.prompts[0][None]
    over = [name for name in names if name in OVER_TEXT and ids is not None]
    context = min(task.length, scope.max_length or task.length) if ids is None else ids.shape[1]
    profile = scope.profile(["entropy", *(name for name in names if name not in over)], context=context, data=ids)
    for name in over:
        probe = REGISTRY[name]()
        assert isinstance(probe, ActiveProbe)
        found = probe.run(scope, ids)
        table = profile.table.copy()
        for metric, values in found.scores.items():
            table[metric] = [float(values[profile.layers.index(int(one.layer)), int(one.head)]) for one in table.itertuples()]
        tables = {**profile.tables, **{f"{name}.{part}": frame for part, frame in found.tables.items()}}
        profile = HeadProfile(table, profile.card, profile._content, tables=tables)
    return profile


def bench(
    models: Sequence[str],
    methods: Sequence[str] | None,
    densities: Sequence[float],
    phases: Sequence[str],
    *,
    length: int,
    count: int,
    batch: int = 4,
    run_path: Any = None,
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
    results = []
    for name in models:
        scope = hs.load(name)
        task = needle_task(length, count) if name == "bundled:needle" else text_task(scope, length, count)
        found = evidence(scope, chosen, task, say) if run_path is None else hs.HeadProfile.load(run_path)
        text = None if task.perplexity else str(scope.text_tokenizer.decode(task.prompts[0]))
        rows = Bench(scope, task, found, text, batch, say).table(chosen, densities, [one for one in PHASES if one in phases])
        device = torch.cuda.get_device_name() if scope.device.type == "cuda" else "cpu"
        results.append({"model": name, "task": task.name, "length": length, "count": count, "device": device, "rows": rows})
    return {"benchmark": "quality", "results": results}

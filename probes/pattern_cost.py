"""What every sparse pattern would cost every head: the measurement that plans are allocated from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch

from headscope.circuits import head_weights
from headscope.errors import CaptureError, ProbeError, refusal, unknown_name
from headscope.plans.dynamic import Budget, TopBlocks, VerticalSlash
from headscope.plans.dynamic_anchor import Stripes
from headscope.plans.patterns import Pattern, Span, Streaming
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import context_of, main_modules, not_differentiable, not_readable, texts_of
from headscope.probes.duo_gates import frozen
from headscope.probes.duo_surrogate import given_passkeys
from headscope.probes.moa import Traced
from headscope.probes.passkeys import PasskeyMaker, PasskeyText, spells
from headscope.probes.pattern_outputs import Outputs

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

COLUMNS = ("layer", "head", "pattern", "kind", "text", "tokens", "loss", "squares", "error", "whole", "mass", "kept")
ENOUGH = 0.05
"""Share of the output's energy that a pattern may lose and still count as enough for the head."""
EVEN = 48
"""Rows that the share of entries of a choice is counted on."""
WRITTEN = 3 / 4
"""Where the end begins that "written" judges."""
BUDGETS = (0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.27, 0.35, 0.45, 0.55, 0.7, 0.85)
"""Shares of the text that budgets keep."""
ROWS = 96
"""Rows with the largest gradients that are read, and as many others, where not all are."""
Kind = Literal["recall", "prose", "written"]
KINDS: tuple[Kind, ...] = ("recall", "prose", "written")


@dataclass(frozen=True)
class PatternCost(ActiveProbe):
    """For every head and every candidate pattern: how much of the output changes, and how much that changes the answers.

    Candidates are sink-and-window of `sinks` first keys and windows of 8, 16, 32 ... tokens up to a sixteenth of the text and of an eighth,
    a quarter and a half of it; with `compensate`, those of the first sink also with RazorAttention's compensation token; with `dynamic`,
    also vertical-slash, block and stripe choices of several sizes, and budgets of keys chosen at the end of a prefill (SnapKV), which are
    all of the cache or half of it beside the last keys.

    Each is judged on texts whose answer lies far back ("recall": passkeys, the needle model's haystacks, or random tokens said twice; see
    `headscope.probes.passkeys`) and, where the tokenizer can spell it, on prose: retrieval heads look local on plain text, and heads that
    write prose well find no passkey. "prose" judges every token after the first eighth, as a text that is read; "written" the last quarter
    alone, as a text that is written after the rest was read, which is what a cache must serve. A text of recall ends with its first answer.
    Budgets are chosen before that answer begins, or where the last quarter does (of prose that is read: the last eighth), and change the
    rows after it alone.

    With o the output of a head in row t, o_c that under candidate c (exact, renormalised), delta = o - o_c and g = dL/do:

        loss = sum_t g . delta (first-order change of L, signed)      squares = sum_t (g . delta)^2
        error = sum_t ||delta W_O||^2     whole = sum_t ||o W_O||^2     mass: mean weight kept     kept: share of the causal entries

    over the `rows` rows of the layer with the largest gradients and as many spread over the others, which count for all of those (None: all
    rows on a GPU, 96 on a CPU). L is minus the sum of the answers' logit margins (log p / (1 - p)) over the answer tokens that the model
    gets right, since the gradient of log p itself vanishes where a model is sure; on prose it is the sum of the cross-entropies.

    `pattern_need`: share of the causal entries that the leanest candidate keeps which loses less than 5 % of the output's energy on every
    text. The table `candidates` has a row per head, candidate and text; planner "allocate" shares out a budget from it.

    Departures: not a method of any paper; it joins DuoAttention's question (arXiv:2410.10819), MoA's influence (arXiv:2406.14909) and
    MInference's candidates (arXiv:2407.02490). Cost: per text a forward and a backward pass, and small attention of the rows per candidate.
    """

    texts: int = 3
    sinks: tuple[int, ...] = (4, 32)
    dynamic: bool = True
    compensate: bool = False
    rows: int | None = None
    task: str = "auto"
    kinds: tuple[Kind, ...] = KINDS

    name: ClassVar[str] = "pattern_cost"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("pattern_need", "share of the entries", "needs many keys to write what it writes"),)
    data: ClassVar[str] = "passkeys"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "per text a forward and a backward pass, and attention of some rows per candidate"
    source: ClassVar[str] = "headscope, after arXiv:2410.10819, arXiv:2406.14909 and arXiv:2407.02490"

    def unfit(self, scope: Scope) -> str | None:
        missing = next((module.name for module in scope.topology.main if module.output is None), None)
        reason = f"{missing} has no output projection W_O" if missing else None
        return super().unfit(scope) or not_readable(scope) or not_differentiable(scope) or reason

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown_name(ProbeError, "kind of text", kind, KINDS)
        if self.texts < 1 or (self.rows is not None and self.rows < 1) or not self.sinks or not self.kinds:
            raise refusal(ProbeError, f"{self!r}", "it needs texts, rows, sinks and a kind of text", "pass one of each at least")
        texts = self.texts_for(scope, data, work)
        patterns = self.candidates(max(len(ids) for _, ids, _ in texts))  # the same for every text, or their losses would not add up
        units = []
        for number in work.each(range(len(texts)), "candidates"):
            units.append(work.unit(f"text {number}", partial(self._unit, scope, *texts[number], number, patterns)))
        table = pd.concat([pd.DataFrame(unit["table"], columns=list(COLUMNS)) for unit in units], ignore_index=True)
        ids = texts[0][1]
        facts = {"name": "recall and prose", "kind": "own", "sha256": _digest(ids), "sequences": len(texts), "tokens": len(ids)}
        notes = [", ".join(f"{sum(one[0] == kind for one in texts)} of {kind}" for kind in dict.fromkeys(one[0] for one in texts))]
        return Findings({"pattern_need": need(scope, table)}, data=[facts], tables={"candidates": table}, notes=notes)

    def candidates(self, tokens: int) -> list[Pattern]:
        """The patterns that are tried on texts of `tokens`."""
        windows = [8 * 2**step for step in range(32) if 8 * 2**step <= max(8, tokens // 16)]
        found: list[Pattern] = [Streaming(sink, window) for sink in self.sinks for window in windows]
        found += [Span(0.0, share, sink) for sink in self.sinks for share in (0.125, 0.25, 0.5)]
        if self.compensate:
            found += [replace(one, compensate=True) for one in found if isinstance(one, Streaming | Span) and one.sink == self.sinks[0]]
        if self.dynamic:
            unit = max(8, tokens // 64)
            found += [VerticalSlash(columns * unit, lines * unit, 64, 4, unit) for columns in (1, 2, 4, 8, 16) for lines in (1, 4)]
            block = min(128, max(16, 1 << max(0, (tokens // 32).bit_length() - 1)))
            found += [TopBlocks(share=share, rule="pooled", block=block) for share in (0.1, 0.2, 0.4, 0.6)]
            stride = min(16, block // 4)
            found += [
                TopBlocks(mass=mass, rule="antidiagonal", block=block, stride=stride) for mass in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
            ]
            found += [Stripes(theta=theta, block=block, step=4) for theta in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)]
            sizes = [round(tokens * part) for part in BUDGETS if round(tokens * part) > 32]
            found += [Budget(keep - 32, 32, 5) for keep in sizes]
            found += [Budget(keep - keep // 2, 32, 5, 4, keep // 2) for keep in sizes if keep >= 64]
        return list(dict.fromkeys(found))

    def texts_for(self, scope: Scope, data: Any, work: Work) -> list[tuple[Kind, Tensor, Tensor]]:
        """(kind, ids [N], bool [N] the tokens whose prediction is judged) of every text."""
        found: list[tuple[Kind, Tensor, Tensor]] = []
        if "recall" in self.kinds:
            given = given_passkeys(self.name, data)
            if given is None:
                maker = PasskeyMaker.of(scope, context_of(scope, work), self.task)
                given = [maker.text(maker.context, work.generator(1, number)) for number in range(self.texts)]
            found += [("recall", *_ended(text)) for text in given]
        if spells(scope):
            essays = texts_of(scope, None, work, texts=self.texts) if {"prose", "written"} & set(self.kinds) else []
            begin: dict[Kind, float] = {"prose": 1 / 8, "written": WRITTEN}
            for kind in (one for one in begin if one in self.kinds):
                found += [(kind, text.ids, torch.arange(len(text.ids)) >= int(len(text.ids) * begin[kind])) for text in essays]
        if not found:
            raise refusal(ProbeError, f"kinds={self.kinds}", "this model's tokenizer spells no prose", "add 'recall'")
        return found

    def _unit(self, scope: Scope, kind: Kind, ids: Tensor, answer: Tensor, number: int, patterns: Sequence[Pattern]) -> dict[str, Any]:
        calls, gradients = traced(scope, ids, answer, margins=kind == "recall")
        start = len(ids) - len(ids) // 8 if kind == "prose" else int(answer.int().argmax())
        rows: list[list[Any]] = []
        words = [json.dumps(pattern.to_dict()) for pattern in patterns]
        for module in scope.topology.main:
            call, gradient = calls.pop(module.name), gradients.pop(module.name)
            at, share = rows_of(gradient, len(ids) if self.rows is None and call.q.is_cuda else self.rows or ROWS)
            found = judge(scope, call, gradient, at, patterns, start, share)
            for head in range(module.heads):
                for place, word in enumerate(words):
                    rows.append([module.layer, head, word, kind, number, len(ids), *found[head, place].tolist()])
        return {"table": rows}


def rows_of(gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(indices ascending, how many rows each stands for): the `count` rows with the largest gradients [1, N, H, D], each for itself, and as
    many spread over the others, for all of those.
    """
    size = gradient[0].double().square().sum((1, 2)).cpu()
    if 2 * count >= len(size):
        return torch.arange(len(size)), torch.ones(len(size), dtype=torch.float64)
    order = size.sort(descending=True, stable=True).indices
    others = order[count:].sort().values
    spread = others[torch.linspace(0, len(others) - 1, count).long()].unique()
    rows = torch.cat([order[:count], spread])
    share = torch.cat([torch.ones(count), torch.full((len(spread),), len(others) / len(spread))]).double()
    rows, place = rows.sort()
    return rows, share[place]


@torch.no_grad()
def judge(
    scope: Scope,
    call: AttentionCall,
    gradient: Tensor,
    rows: Tensor,
    patterns: Sequence[Pattern],
    start: int,
    share: Tensor | None = None,
) -> Tensor:
    """[H, patterns, 6] float64: loss, squares, error, whole, mass of every head under every pattern, over rows [R] of one sequence that
    each count `share` [R] times (once), and the share of the entries kept, of choices over EVEN rows spread over the text. Budgets are
    chosen from the rows before `start` and leave those as they are.
    """
    length, device = call.q.shape[2], call.q.device
    found = torch.zeros(call.q.shape[1], len(patterns), 6, dtype=torch.float64, device=device)
    even = torch.linspace(0, length - 1, min(EVEN, length)).long()
    outputs = Outputs(call, rows, start)
    many = (torch.ones(len(rows)) if share is None else share).to(device=device, dtype=torch.float64)
    weights = _weights(scope, call.layer).to(device=device, dtype=outputs.dtype)
    gram = weights @ weights.transpose(-1, -2)
    g = gradient[0, rows.to(device)].transpose(0, 1).to(outputs.dtype)
    full = outputs.whole()
    found[:, :, 3] = (((full @ gram) * full).sum(-1).double() @ many)[:, None]
    for place, pattern in enumerate(patterns):
        out, kept = outputs.under(pattern)
        delta = full - out
        change = (g * delta).sum(-1).double()
        energy = ((delta @ gram) * delta).sum(-1).double()
        numbers = torch.stack([-change @ many, change.square() @ many, energy @ many])
        found[:, place, :3] = numbers.T
        found[:, place, 4] = kept.double() @ (many / many.sum())
        found[:, place, 5] = outputs.masks.shares(pattern, even)
    return found.cpu()


def _ended(text: PasskeyText) -> tuple[Tensor, Tensor]:
    """(ids [n], bool [n]): the text up to the end of its first answer, and which tokens are that answer; all where it is not known."""
    if text.first is None:
        return text.ids, text.answer
    begin, end = text.first
    return text.ids[:end], torch.arange(end) >= begin


def traced(scope: Scope, ids: Tensor, answer: Tensor, *, margins: bool) -> tuple[dict[str, AttentionCall], dict[str, Tensor]]:
    """(module -> its call, module -> dL/do [1, N, Hq, Dv]) of one text; L as in `PatternCost`."""
    calls: dict[str, tuple[AttentionCall, Tensor]] = {}
    inputs: dict[str, Any] = {"input_ids": ids[None].to(scope.device)}
    if "use_cache" in scope._forward_parameters:
        inputs["use_cache"] = False
    with frozen(scope.model):
        with torch.enable_grad(), scope.intervene(Traced(calls, main_modules(scope))):
            logits = scope.model(**inputs).logits[0, :-1].float()
            loss = objective(logits, ids[1:].to(logits.device), answer[1:].to(logits.device), margins=margins)
        names = [module.name for module in scope.topology.main]
        gradients = torch.autograd.grad(loss, [calls[name][1] for name in names])
    found = dict(zip(names, gradients, strict=True))
    for name, one in found.items():
        if not bool(one.isfinite().all()):
            raise refusal(ProbeError, f"the gradient at {name}", "it is not finite", "load the model in float32 or bfloat16")
    return {name: calls[name][0] for name in names}, found


def objective(logits: Tensor, wanted: Tensor, answer: Tensor, *, margins: bool) -> Tensor:
    """L: with `margins` minus the sum of log p / (1 - p) over the answer tokens that are the model's first choice (over all of them where
    none is), else the sum of the cross-entropies. logits [N, V], wanted [N], answer [N] bool.
    """
    logits, wanted = logits[answer], wanted[answer]
    if not margins:
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    own = logits.gather(1, wanted[:, None])[:, 0]
    rest = torch.logsumexp(logits.scatter(1, wanted[:, None], -torch.inf), -1)
    right = logits.argmax(-1) == wanted
    return -(own - rest)[right if bool(right.any()) else slice(None)].sum()


def need(scope: Scope, table: pd.DataFrame) -> Tensor:
    """[L, H] the density of the leanest candidate that loses at most ENOUGH of the output's energy on every text; 1 where none does."""
    sums = table.assign(share=table["error"] / table["whole"].clip(lower=1e-300))
    worst = sums.groupby(["layer", "head", "pattern"], sort=False)[["share", "kept"]].agg({"share": "max", "kept": "mean"}).reset_index()
    least = worst[worst["share"] <= ENOUGH].groupby(["layer", "head"])["kept"].min()
    layers = [
        torch.tensor([float(least.get((module.layer, head), 1.0)) for head in range(module.heads)], dtype=torch.float64)
        for module in scope.topology.main
    ]
    return stack(layers)


def _weights(scope: Scope, layer: int | None) -> Tensor:
    """[Hq, Dv, d] W_O by head."""
    try:
        return head_weights(scope, layer if layer is not None else "").o
    except CaptureError as error:
        raise ProbeError(f"pattern costs on {scope.name}: {error}") from None


def _digest(ids: Tensor) -> str:
    import hashlib

    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()

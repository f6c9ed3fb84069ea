"""What every sparse pattern would cost every head: the measurement that plans are allocated from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch

from headscope.call import MaskFacts
from headscope.circuits import head_weights
from headscope.errors import CaptureError, ProbeError, refusal, unknown_name
from headscope.kernels.gather import window_scores
from headscope.plans.dynamic import Budget, TopBlocks, VerticalSlash
from headscope.plans.dynamic_anchor import Stripes
from headscope.plans.indices import choose
from headscope.plans.patterns import Pattern, Span, Streaming
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import context_of, main_modules, not_differentiable, not_readable, texts_of
from headscope.probes.duo_gates import frozen
from headscope.probes.duo_surrogate import given_passkeys
from headscope.probes.moa import Traced
from headscope.probes.passkeys import PasskeyMaker, PasskeyText, spells

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

COLUMNS = ("layer", "head", "pattern", "kind", "text", "tokens", "loss", "squares", "error", "whole", "mass", "kept")
ENOUGH = 0.05
"""Share of the output's energy that a pattern may lose and still count as enough for the head."""
EVEN = 48
"""Rows that the share of entries of a choice is counted on."""
Kind = Literal["recall", "prose"]


@dataclass(frozen=True)
class PatternCost(ActiveProbe):
    """For every head and every candidate pattern: how much of the output changes, and how much that changes the answers.

    Candidates are sink-and-window of `sinks` first keys and windows of 8, 16, 32 ... tokens up to a sixteenth of the text and of an eighth,
    a quarter and a half of it; with `compensate`, those of the first sink also with RazorAttention's compensation token; with `dynamic`,
    also vertical-slash, block and stripe choices of several sizes, and budgets of keys chosen at the end of a prefill (SnapKV).

    Each is judged on texts whose answer lies far back ("recall": passkeys, the needle model's haystacks, or random tokens said twice; see
    `headscope.probes.passkeys`) and on prose ("prose", where the tokenizer can spell it): retrieval heads look local on plain text, and
    heads that write prose well find no passkey. A text of recall ends with its first answer. Budgets are chosen before that answer begins
    (on prose, before the last eighth) and change the rows after it alone.

    With o the output of a head in row t, o_c that under candidate c (exact, renormalised), delta = o - o_c and g = dL/do:

        loss = sum_t g . delta (first-order change of L, signed)      squares = sum_t (g . delta)^2
        error = sum_t ||delta W_O||^2     whole = sum_t ||o W_O||^2     mass: mean weight kept     kept: share of the causal entries

    over the `rows` rows of the layer with the largest gradients and as many spread over the text. L is minus the sum of the answers' logit
    margins (log p / (1 - p)) over the answer tokens that the model gets right, since the gradient of log p itself vanishes where a model is
    sure; on prose it is the sum of the cross-entropies.

    `pattern_need`: share of the causal entries that the leanest candidate keeps which loses less than 5 % of the output's energy on every
    text. The table `candidates` has a row per head, candidate and text; planner "allocate" shares out a budget from it.

    Departures: not a method of any paper; it joins DuoAttention's question (arXiv:2410.10819), MoA's influence (arXiv:2406.14909) and
    MInference's candidates (arXiv:2407.02490). Cost: per text a forward and a backward pass, and small attention of the rows per candidate.
    """

    texts: int = 3
    sinks: tuple[int, ...] = (4, 32)
    dynamic: bool = True
    compensate: bool = False
    rows: int = 96
    task: str = "auto"
    kinds: tuple[Kind, ...] = ("recall", "prose")

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
            if kind not in ("recall", "prose"):
                raise unknown_name(ProbeError, "kind of text", kind, ("recall", "prose"))
        if self.texts < 1 or self.rows < 1 or not self.sinks or not self.kinds:
            raise refusal(ProbeError, f"{self!r}", "it needs texts, rows, sinks and a kind of text", "pass one of each at least")
        texts = self.texts_for(scope, data, work)
        patterns = self.candidates(max(len(ids) for _, ids, _ in texts))  # the same for every text, or their losses would not add up
        units = []
        for number in work.each(range(len(texts)), "candidates"):
            units.append(work.unit(f"text {number}", partial(self._unit, scope, *texts[number], number, patterns)))
        table = pd.concat([pd.DataFrame(unit["table"], columns=list(COLUMNS)) for unit in units], ignore_index=True)
        ids = texts[0][1]
        facts = {"name": "recall and prose", "kind": "own", "sha256": _digest(ids), "sequences": len(texts), "tokens": len(ids)}
        notes = [f"{sum(one[0] == 'recall' for one in texts)} texts of recall, {sum(one[0] == 'prose' for one in texts)} of prose"]
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
            found += [VerticalSlash(columns * unit, unit, 64, 4, unit) for columns in (1, 2, 4, 8)]
            block = min(128, max(16, 1 << max(0, (tokens // 32).bit_length() - 1)))
            found += [TopBlocks(share=share, rule="pooled", block=block) for share in (0.1, 0.2, 0.4)]
            stride = min(16, block // 4)
            found += [TopBlocks(mass=mass, rule="antidiagonal", block=block, stride=stride) for mass in (0.5, 0.7, 0.85, 0.95)]
            found += [Stripes(theta=theta, block=block, step=4) for theta in (1.0, 2.5, 4.0, 6.0)]
            found += [Budget(keep - 32, 32, 5) for keep in (tokens // part for part in (20, 12, 8, 5, 3, 2)) if keep > 32]
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
        if "prose" in self.kinds and spells(scope):
            for text in texts_of(scope, None, work, texts=self.texts):
                found.append(("prose", text.ids, torch.arange(len(text.ids)) >= len(text.ids) // 8))
        if not found:
            raise refusal(ProbeError, f"kinds={self.kinds}", "this model's tokenizer spells no prose", "add 'recall'")
        return found

    def _unit(self, scope: Scope, kind: Kind, ids: Tensor, answer: Tensor, number: int, patterns: Sequence[Pattern]) -> dict[str, Any]:
        calls, gradients = traced(scope, ids, answer, margins=kind == "recall")
        start = int(answer.int().argmax()) if kind == "recall" else len(ids) - len(ids) // 8
        rows: list[list[Any]] = []
        words = [json.dumps(pattern.to_dict()) for pattern in patterns]
        for module in scope.topology.main:
            call, gradient = calls.pop(module.name), gradients.pop(module.name)
            at = _rows(gradient, self.rows)
            found = judge(scope, call, gradient, at, patterns, start)
            for head in range(module.heads):
                for place, word in enumerate(words):
                    rows.append([module.layer, head, word, kind, number, len(ids), *found[head, place].tolist()])
        return {"table": rows}


def _rows(gradient: Tensor, count: int) -> Tensor:
    """Indices of the `count` rows with the largest gradients [1, N, H, D], and as many spread over the text, ascending."""
    size = gradient[0].double().square().sum((1, 2)).cpu()
    largest = size.sort(descending=True, stable=True).indices[:count]
    spread = torch.linspace(len(size) // 8, len(size) - 1, min(count, len(size))).long()
    return torch.cat([largest, spread]).unique()


@torch.no_grad()
def judge(scope: Scope, call: AttentionCall, gradient: Tensor, rows: Tensor, patterns: Sequence[Pattern], start: int) -> Tensor:
    """[H, patterns, 6] float64: loss, squares, error, whole, mass of every head under every pattern, over rows [R] of one sequence, and
    the share of the entries kept, of choices over EVEN rows spread over the text. Budgets are chosen from the rows before `start` and leave
    those as they are.
    """
    assert call.v is not None
    device, length = call.q.device, call.q.shape[2]
    keys = torch.arange(length)
    fixed = [pattern.fixed(length) for pattern in patterns]
    seen = {pattern: pattern.visible(rows, keys).to(device) for pattern in set(fixed) if pattern.static}
    outputs = _weights(scope, call.layer).to(device=device, dtype=torch.float64)
    found = torch.zeros(call.q.shape[1], len(patterns), 6, dtype=torch.float64)
    even = torch.linspace(0, length - 1, min(EVEN, length)).long()
    causal = keys <= even[:, None]
    for head in range(call.q.shape[1]):
        scores = window_scores(call, head, rows.to(device), keys.to(device))[0]
        values = call.v[0, head // call.group].double()
        sink = None if call.sink_logits is None else call.sink_logits[head].double()
        total = _total(scores, sink)
        full = torch.exp(scores - total) @ values
        gram = outputs[head] @ outputs[head].T
        g = gradient[0, rows.to(device), head].double()
        whole = ((full @ gram) * full).sum()
        for place, pattern in enumerate(fixed):
            density = pattern.density(length) if pattern.static else 1.0
            if pattern.static:
                visible = seen[pattern]
            else:
                both = _chosen(call, head, pattern, torch.cat([rows, even]), keys, start)
                visible = both[: len(rows)].to(device)
                if not isinstance(pattern, Budget):
                    density = float((both[len(rows) :] & causal).sum() / causal.sum())
            masked = scores.masked_fill(~visible, -torch.inf)
            kept = torch.exp(masked - total).sum(-1).mean()
            delta = full - _output(call, head, rows, masked, values, sink, visible if getattr(pattern, "compensate", False) else None)
            change = (g * delta).sum(-1)
            numbers = (-change.sum(), change.square().sum(), ((delta @ gram) * delta).sum(), whole, kept)
            found[head, place] = torch.tensor([*(float(one) for one in numbers), density], dtype=torch.float64)
    return found


def _total(scores: Tensor, sink: Tensor | None) -> Tensor:
    total = torch.logsumexp(scores, -1, keepdim=True)
    return total if sink is None else torch.logaddexp(total, sink)


def _chosen(call: AttentionCall, head: int, pattern: Pattern, rows: Tensor, keys: Tensor, start: int) -> Tensor:
    """[R, N] bool: what rows see under a rule that chooses keys from this call."""
    if not isinstance(pattern, Budget):
        return choose(call, head, pattern).visible(rows, keys)
    before = replace(call, q=call.q[:, :, :start], k=call.k[:, :, :start], v=None, mask=MaskFacts(True, call.mask.window))
    return choose(before, head, pattern).visible(rows, keys) | (rows < start)[:, None]


def _ended(text: PasskeyText) -> tuple[Tensor, Tensor]:
    """(ids [n], bool [n]): the text up to the end of its first answer, and which tokens are that answer; all where it is not known."""
    if text.first is None:
        return text.ids, text.answer
    begin, end = text.first
    return text.ids[:end], torch.arange(end) >= begin


def _output(
    call: AttentionCall, head: int, rows: Tensor, scores: Tensor, values: Tensor, sink: Tensor | None, seen: Tensor | None
) -> Tensor:
    """[R, Dv] of rows with scores [R, N]; with `seen` [R, N], the visible keys that it leaves out are one key more, their mean."""
    if seen is None:
        return torch.exp(scores - _total(scores, sink)) @ values
    device = scores.device
    dropped = ((torch.arange(seen.shape[1], device=device) <= rows.to(device)[:, None]) & ~seen).double()
    count = dropped.sum(-1, keepdim=True)
    share = dropped / count.clamp(min=1)
    mean = share @ call.k[0, head // call.group].double()
    score = (call.q[0, head, rows.to(device)].double() * mean).sum(-1, keepdim=True) * call.scale
    score = call.softcap * torch.tanh(score / call.softcap) if call.softcap is not None else score
    whole = torch.cat([scores, score + torch.log(count)], -1)
    weights = torch.exp(whole - _total(whole, sink))
    return weights[:, :-1] @ values + weights[:, -1:] * (share @ values)


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

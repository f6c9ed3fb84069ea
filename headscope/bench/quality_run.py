"""One row of the quality bench: a model runs under a plan, and what the plan kept is counted while it runs.

What is kept is counted from the patterns that ran, chosen ones included, on the first sequence of every kind; not from what a plan
promised. Which kernels ran is in the row too, and no call is left to the model where dense attention would be faster: a plan that in truth
ran dense would pass for a good one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from headscope.kernels.sparse_dynamic import chosen_on_device
from headscope.plans import Budget, Dense, Pattern, SparsePlan, TopKeys
from headscope.plans.indices import choose, element
from headscope.probes.pattern_masks import Masks

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.bench.quality_tasks import Task
    from headscope.call import AttentionCall
    from headscope.scope import Scope


@dataclass(eq=False)
class Meter:
    """Counts what a plan's patterns keep, from the calls of the model under that plan: one sequence of a batch. Computes nothing."""

    plan: SparsePlan
    kept: float = 0.0
    entries: float = 0.0
    read: float = 0.0
    keys: float = 0.0
    masked: Masked | None = None

    def execute(self, call: AttentionCall) -> Tensor | None:
        """None: the call goes on to the plan's executor."""
        if call.layer is None or not call.mask.causal:
            return None
        if self.masked is not None and self.masked.takes(call):  # counted there, with its own masks
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
                self.kept += _kept(chosen, length) if pattern.static else chosen.kept(length)
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


@dataclass(eq=False)
class Masked:
    """Runs the prefill calls for which no kernel chooses, under the plan's masks: those of all heads of a layer made at once on the device
    (`headscope.probes.pattern_masks`), then dense attention under them. What head-by-head choosing gives, in a tenth of the time.
    """

    plan: SparsePlan
    kept: float = 0.0
    entries: float = 0.0
    calls: int = 0

    def takes(self, call: AttentionCall) -> bool:
        """Whether a call is run here: a whole prefill without padding, with rules that the device's kernels do not know and none that
        chooses at its end.
        """
        if call.layer is None or call.query_offset or call.q.shape[2] < 2 or call.first_token is not None or not call.mask.causal:
            return False
        patterns = [self.plan.patterns[call.layer, head] for head in range(call.q.shape[1])]
        if all(one.static for one in patterns) or any(isinstance(one, Budget | TopKeys) for one in patterns):
            return False
        plain = call.softcap is None and call.sink_logits is None and call.mask.window is None and call.mask.key_valid is None
        return plain and (not call.q.is_cuda or bool(chosen_on_device(call, patterns)))

    def execute(self, call: AttentionCall) -> Tensor | None:
        """[B, N, Hq, Dv], or None for a call that goes on to the plan's executor."""
        if not self.takes(call):
            return None
        assert call.v is not None
        batch, heads, length, _ = call.q.shape
        groups: dict[Pattern, list[int]] = {}
        for head in range(heads):
            groups.setdefault(self.plan.patterns[int(call.layer or 0), head], []).append(head)
        rows = torch.arange(length, device=call.q.device)
        causal = rows <= rows[:, None]
        k, v = (one.repeat_interleave(call.group, 1) for one in (call.k, call.v))
        out = []
        for b in range(batch):
            masks = Masks(element(call, b))
            seen = torch.empty(heads, length, length, dtype=torch.bool, device=call.q.device)
            for pattern, members in groups.items():
                index = torch.tensor(members, device=call.q.device)
                seen[index] = masks.of(pattern, rows, index) & causal
            self.kept += float(seen.sum(dtype=torch.float64))
            self.entries += heads * length * (length + 1) / 2
            part = slice(b, b + 1)
            out.append(
                torch.nn.functional.scaled_dot_product_attention(call.q[part], k[part], v[part], attn_mask=seen[None], scale=call.scale)
            )
        self.calls += 1
        return torch.cat(out).transpose(1, 2)


@lru_cache(maxsize=4096)
def _kept(pattern: Pattern, length: int) -> float:
    return pattern.kept(length)


@lru_cache(maxsize=4096)
def keys_read(pattern: Pattern, length: int) -> float:
    """Keys that the last of `length` tokens reads when it is decoded."""
    if isinstance(pattern, TopKeys):
        return length if pattern.full else min(length, pattern.keep + pattern.window)
    if pattern.static:
        return float(pattern.visible(torch.tensor([length - 1]), torch.arange(length)).sum())
    return min(length, pattern.cached(length))


def batches(task: Task, size: int) -> Iterable[list[int]]:
    """Numbers of sequences to run together: of one kind, `size` at a time."""
    for kind in dict.fromkeys(task.kinds):
        mine = [number for number in range(len(task.prompts)) if task.kinds[number] == kind]
        for first in range(0, len(mine), size):
            yield mine[first : first + size]


@torch.no_grad()
def run(
    scope: Scope, task: Task, plan: SparsePlan | None, *, size: int = 4, phase: str | None = None, masks: bool | None = None
) -> dict[str, Any]:
    """What the plan kept, which kernels ran, and how the model did, sequence by sequence. `phase` "prefill": of texts, nothing is decoded.
    `masks`: whether `Masked` runs what it can; None: on a device.

    `right`: kind -> "0110..", one digit a haystack, `accuracy` and `n`; or `prefill` and `decode`, the nll of each text's second half of
    the prompt and of its decoded tokens, their means `nll_prefill`, `nll_decode` and `n`, the texts.
    """
    hits: dict[str, str] = {}
    late: list[float] = []
    second: list[float] = []
    fast = Masked(plan) if plan is not None and (scope.device.type != "cpu" if masks is None else masks) else None
    meter = None if plan is None else Meter(plan, masked=fast)
    decoding = not (task.perplexity and phase == "prefill")
    metered: set[str] = set()
    ran: dict[str, int] = {}
    for numbers in batches(task, size):
        kind = task.kinds[numbers[0]]
        with ExitStack() as stack:
            if plan is not None and meter is not None:
                executor = stack.enter_context(scope.execute(plan, fallback=False))
                if fast is not None:
                    stack.enter_context(scope.executing(fast))
                if kind not in metered:
                    stack.enter_context(scope.executing(meter))
                    metered.add(kind)
            prompts, answers = [task.prompts[n] for n in numbers], torch.stack([task.answers[n] for n in numbers]).to(scope.device)
            found, nll = _decode(scope, prompts, answers if decoding else answers[:, :0], rows=task.perplexity)
        if plan is not None:
            for name, calls in executor.ran.items():
                ran[name] = ran.get(name, 0) + calls
        if task.perplexity:
            late += found.mean(1).tolist() if decoding else []
            second += nll
        else:
            hits[kind] = hits.get(kind, "") + "".join(str(int(one)) for one in (found == 0).all(1))
    row: dict[str, Any] = {"density": 1.0, "read": 1.0, "cache": 1.0, "kernels": "the model's own"}
    if plan is not None and meter is not None:
        if fast is not None and fast.calls:
            meter.kept, meter.entries = meter.kept + fast.kept, meter.entries + fast.entries
            ran["masks"] = fast.calls
        row = {"density": meter.density, "read": meter.share if decoding else None, "cache": plan.kv_share(task.length)}
        row["kernels"] = ", ".join(sorted(ran)) or "the model's own"
    row["dtype"] = str(scope.dtype).removeprefix("torch.")
    row["data"] = task.data
    if task.perplexity:
        row |= {"nll_prefill": sum(second) / len(second), "prefill": _short(second), "n": len(second)}
        return row | ({"nll_decode": sum(late) / len(late), "decode": _short(late)} if decoding else {})
    right = {kind: one.count("1") / len(one) for kind, one in hits.items()}
    total = sum(len(one) for one in hits.values())
    return row | right | {"accuracy": sum(one.count("1") for one in hits.values()) / total, "right": hits, "n": total}


def _short(values: list[float]) -> list[float]:
    return [round(one, 6) for one in values]


def _decode(scope: Scope, prompts: Sequence[Tensor], answers: Tensor, *, rows: bool) -> tuple[Tensor, list[float]]:
    """([B, a]: rank beyond the first (0 or 1) of every answer word, or its nll with `rows`; [B] nll of the prompts' second halves)."""
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
    nll: list[float] = []
    if rows:
        nll = [float(_losses(one[:-1], ids[number, half:]).mean()) for number, one in enumerate(out.logits)]
    found = []
    cache, logits = out.past_key_values, out.logits[:, -1].float()
    del out
    for place in range(answers.shape[1]):
        word = answers[:, place]
        found.append(_losses(logits, word) if rows else (logits.argmax(-1) != word).long())
        if place + 1 < answers.shape[1]:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = scope.model(input_ids=word[:, None], attention_mask=None if whole else mask, past_key_values=cache, use_cache=True)
            cache, logits = step.past_key_values, step.logits[:, -1].float()
    return (torch.stack(found, 1).cpu() if found else torch.empty(len(prompts), 0)), nll


def _losses(logits: Tensor, words: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), words, reduction="none")

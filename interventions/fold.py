"""Fold: what is known of one attention call's weights while edits are folded into the output of its fused kernel.

The kernel gives z; the statistics kernels give lse, for the edited heads only; sums over key sets follow from the two (`kernels.partial`).
Edits that come one after the other each meet the weights that the earlier ones left, so every edit of weights is kept as a stage: a
factor on A_ij that later sums apply. A stage that scales whole scores also moves the row's normaliser.

A fold lives as long as its call. The silent failure this avoids is the second edit of a stack being computed on the first one's unedited
attention, which looks right as long as only one of them is tested.

Folding is a difference of the kernel's rounded z and a sum; where little is left of a row, rounding is all that is left. Rows that keep
less than `LIMIT` of their mass are summed up directly instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.head_edit import Rows
from headscope.kernels.partial import head_index, partial_attention, row_lse, select_heads
from headscope.kernels.shifted import Gate, fused

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.triton_keys import KeyLists

LIMIT = {torch.float64: 1e-5, torch.float32: 5e-2, torch.float16: 0.1, torch.bfloat16: 0.25}
"""Mass of a row, per dtype of z, below which what is left is summed directly: the error is the dtype's rounding divided by it."""


@dataclass(slots=True, eq=False)
class Stage:
    """One edit of weights. `log_factor(scores [B, h, R, X], local heads, rows, keys)`: ln of the factor, for heads `heads` of the call."""

    heads: tuple[int, ...]
    log_factor: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True, eq=False)
class Fold:
    """The weights of one call as edited so far."""

    call: AttentionCall
    stages: list[Stage] = field(default_factory=list)
    closed: dict[int, str] = field(default_factory=dict)
    """Head -> the edit after which its weights are no longer known entry by entry."""
    _shift: dict[int, Tensor] = field(default_factory=dict)
    _lse: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _subs: dict[tuple[int, ...], AttentionCall] = field(default_factory=dict)

    @classmethod
    def of(cls, call: AttentionCall) -> Fold:
        """The fold of a call, made when it is first asked for."""
        found = call.facts.get("fold")
        if not isinstance(found, Fold) or found.call is not call:
            found = call.facts["fold"] = cls(call)
        return found

    def sub(self, heads: list[int]) -> AttentionCall:
        """The call of these heads alone."""
        key = tuple(heads)
        if key not in self._subs:
            self._subs[key] = select_heads(self.call, heads)
        return self._subs[key]

    def lse(self, heads: list[int]) -> Tensor:
        """[B, len(heads), Nq] normalisers of the rows as edited; NaN on rows that do not count."""
        self.refuse_closed(heads)
        known = self._lse.get(tuple(heads))
        if known is not None and not any(head in self._shift for head in heads):
            return known
        missing = [head for head in heads if self._row(head) is None]
        if missing:
            self.know_lse(missing, row_lse(self.sub(missing)))
            return self.lse(heads)
        found = [(head, self._row(head)) for head in heads]
        return torch.stack([lse + self._shift[head] if head in self._shift else lse for head, lse in found if lse is not None], 1)

    def know_lse(self, heads: list[int], lse: Tensor) -> None:
        """Normalisers [B, len(heads), Nq] of the unedited rows, measured elsewhere with other statistics."""
        self._lse[tuple(heads)] = lse

    def _row(self, head: int) -> Tensor | None:
        """[B, Nq] normalisers of a head's unedited rows, None where they are not known yet."""
        return next((lse[:, heads.index(head)] for heads, lse in self._lse.items() if head in heads), None)

    def fused(self, heads: list[int]) -> bool:
        """Whether the fold kernels can take the next edit of these heads: the first edit of their weights, on a device that has them."""
        return not any(set(stage.heads) & set(heads) for stage in self.stages) and fused(self.sub(heads))

    def total(self, heads: list[int]) -> Tensor:
        """[B, len(heads), Nq] mass on keys: 1, less what a sink logit takes."""
        lse = self.lse(heads)
        sinks = self.call.sink_logits
        if sinks is None:
            return torch.ones_like(lse)
        return 1.0 - torch.exp(sinks[heads].to(lse.dtype)[:, None] - lse)

    def partial(
        self,
        heads: list[int],
        keys: Tensor,
        rows: Tensor | None = None,
        extra: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(mass [B, h, R], sum [B, h, R, Dv]) of the edited weights over a key set, bool [1 or B, 1 or h, Nk]; `rows`: indices.

        `extra` is one more log factor. The sums cost O(R |X| d), X being the keys that any head or sequence names.
        """
        sub = self.sub(heads)
        named = keys.flatten(0, 1).any(0)
        columns = named.nonzero().flatten()
        everyone = bool((keys == named).all())
        stages = [(stage, self._local(stage, heads)) for stage in self.stages if set(stage.heads) & set(heads)]

        def log_factor(scores: Tensor, part: Tensor, at: Tensor) -> Tensor:
            out = torch.zeros((), dtype=scores.dtype, device=scores.device)
            for stage, local in stages:
                out = out + stage.log_factor(scores, local, part, at)
            if extra is not None:
                out = out + extra(scores, part, at)
            return out if everyone else out + _log(keys[:, :, at], scores.dtype)[:, :, None]

        plain = everyone and not stages and extra is None
        return partial_attention(sub, self.lse(heads), columns, log_factor=None if plain else log_factor, rows=rows)

    def _local(self, stage: Stage, heads: list[int]) -> Tensor:
        """Where each of `heads` stands in a stage's own list; -1 where it is none of its."""
        place = {head: index for index, head in enumerate(stage.heads)}
        return torch.tensor([place.get(head, -1) for head in heads], device=self.call.q.device)

    def push(self, heads: list[int], log_factor: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], shift: Tensor | None = None) -> None:
        """Enter an edit. `shift` [B, h, Nq]: what it adds to the normalisers."""
        self.stages.append(Stage(tuple(heads), log_factor))
        if shift is not None:
            for index, head in enumerate(heads):
                self._shift[head] = self._shift[head] + shift[:, index] if head in self._shift else shift[:, index]

    def close(self, heads: list[int], by: str) -> None:
        """After this edit, sums over keys of these heads are not known any more."""
        self.closed.update(dict.fromkeys(heads, by))

    def refuse_closed(self, heads: list[int]) -> None:
        """InterventionError when an edit of weights follows one that closed a head."""
        for head in heads:
            if head in self.closed:
                raise refusal(
                    InterventionError,
                    f"an edit of the weights of head {self.call.layer}.{head} after {self.closed[head]}",
                    "that edit leaves an output whose weights are not kept key by key",
                    f"let it come before {self.closed[head]} (order=), or edit other heads",
                )

    def limit(self, output: Tensor) -> float:
        """`LIMIT` of an output's dtype."""
        return LIMIT.get(output.dtype, 0.25)


def shift(
    fold: Fold,
    output: Tensor,
    heads: list[int],
    keys: KeyLists,
    *,
    keep: float,
    others: bool,
    rows: Rows = True,
    gate: Tensor | Gate | None = None,
    limit: float | None = None,
) -> Tensor:
    """A redistribution by its kernel, on a copy of `output`, entered into the fold: from the first set of `keys` to the second, or, with
    `others`, to all keys in neither. Only where `fold.fused(heads)`; nothing waits for the device."""
    from headscope.kernels.triton_partial import redistributed

    refuse_gradients(output, "redistribute")
    index = head_index(tuple(heads), output.device)
    new, kept, grown = redistributed(
        fold.sub(heads),
        fold.lse(heads),
        output,
        index,
        keys,
        keep=keep,
        others=others,
        limit=fold.limit(output) if limit is None else limit,
        gate=gate,
        rows=None if rows is True else rows,
    )
    codes = keys.codes

    def parts() -> list[tuple[Tensor, Tensor]]:
        return [(codes & 1 != 0, kept), (codes == 0 if others else codes & 2 != 0, grown)]

    fold.push(heads, table_stage(parts, rows))
    return new


def own_outputs(output: Tensor, heads: list[int], dtype: torch.dtype) -> Tensor:
    """[B, h, Nq, Dv] of an output [B, Nq, Hq, Dv], to compute with."""
    return output[:, :, head_index(tuple(heads), output.device)].transpose(1, 2).to(dtype)


def put(output: Tensor, heads: list[int], rows: Rows, new: Tensor, counts: Tensor) -> Tensor:
    """`output` with `new` [B, h, Nq, Dv] for these heads, on a copy, where `rows` and `counts` [B, h, Nq] say so."""
    keep = counts.transpose(1, 2) if rows is True else counts.transpose(1, 2) & rows[:, :, None]
    changed = output.clone()
    index = head_index(tuple(heads), output.device)
    changed[:, :, index] = torch.where(keep[..., None], new.transpose(1, 2).to(output.dtype), output[:, :, index])
    return changed


def refuse_gradients(output: Tensor, what: str) -> None:
    """InterventionError where gradients would have to pass a fold, which does not carry them."""
    if torch.is_grad_enabled() and output.requires_grad:
        raise refusal(
            InterventionError,
            f"{what} under autograd",
            "its sums over keys carry no gradients, so these would be wrong",
            "use torch.no_grad()",
        )


def as_set(keys: Tensor) -> Tensor:
    """A key set as bool [1 or B, 1 or h, Nk] from [Nk], [B, Nk] or that."""
    if keys.dim() == 1:
        return keys[None, None]
    return keys[:, None] if keys.dim() == 2 else keys


def _log(mask: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, -math.inf))


Parts = Callable[[], list[tuple["Tensor", "Tensor"]]]


def table_stage(parts: Parts, rows: Rows) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A stage that multiplies disjoint key sets, bool [1 or B, 1 or h, Nk], by row factors [B, h, Nq] at the rows that are edited.

    `parts` gives them when a later edit asks: most edits are the last of their heads.
    """
    logs: list[tuple[Tensor, Tensor]] = []

    def log_factor(scores: Tensor, local: Tensor, part: Tensor, at: Tensor) -> Tensor:
        for keys, factor in () if logs else parts():
            value = factor if rows is True else torch.where(rows[:, None], factor, torch.ones((), dtype=factor.dtype, device=factor.device))
            logs.append((keys, value.log()))
        out = torch.zeros((), dtype=scores.dtype, device=scores.device)
        known = (local >= 0)[None, :, None, None]
        index = local.clamp_min(0)
        for keys, value in logs:
            members = keys[:, index] if keys.shape[1] > 1 else keys
            inside = members[:, :, None, at] & known
            out = out + torch.where(inside, value[:, index][:, :, part, None].to(scores.dtype), torch.zeros_like(out))
        return out

    return log_factor


__all__ = ["LIMIT", "Fold", "Rows", "Stage", "as_set", "own_outputs", "put", "refuse_gradients", "shift", "table_stage"]

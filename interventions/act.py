"""ACT: take attention off the sinks in the middle of a text, head by head, and give it to the other tokens.

A token t that is not the first is a sink of a head when the attention it receives from itself and later tokens is, on average, more than
alpha / N. In every row its weight is multiplied by beta, and what is freed goes to the other tokens in proportion to their weights. Only
some heads gain by it; `ACT.calibrated` finds them on a few examples, one head at a time.

Column means need every row, and a decode step has only one. They are kept here as running sums per layer, for as long as a sequence lasts,
so that step i edits with the sinks of rows 0..i. The silent failures this avoids: a threshold applied to a single row, padding counted
among the rows, and a first token that is spared only if it passes the threshold itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import register
from headscope.interventions.fold import Fold, shift
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.keys import OTHERS, key_set, read_keys, refuse_classes
from headscope.interventions.p_site import redistribute
from headscope.interventions.score_edits import _number
from headscope.interventions.where import positions_json
from headscope.kernels.dispatch import measure
from headscope.statistics.request import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope
    from headscope.sweeps import Sweep

NOT_FIRST = "others_not_first"
_SUMS = StatisticsRequest(("lse", "column_sum"))


@dataclass(slots=True, eq=False)
class Received:
    """Attention received so far in one layer, by absolute position: `sums` [B, h, P], `rows` [B, P] how many rows could give it, `real`
    [B, P] what is no padding, None: everything."""

    sums: Tensor
    rows: Tensor
    real: Tensor | None

    @property
    def end(self) -> int:
        """The position that comes next."""
        return self.sums.shape[2]


@register("act")
@dataclass(frozen=True)
class ACT(HeadEdit):
    """Attention calibration (Yu et al. 2024, arXiv 2406.15765; github.com/GATECH-EIC/ACT, read for its formulas).

    - `alpha`: a sink receives more than alpha / N on average (paper: 5; 3 to 7 tried), N the real tokens so far. `threshold`: an absolute
      number instead (official code: 0.1, which is alpha = 5 at N = 50 only).
    - `beta`: what a sink keeps of its attention (0.4). `target`: who gets the rest, "others" (every token that is no sink, the first one
      included, as in the paper), "others_not_first", or a key set.

    Departures from the official code: the first real token is always spared, not the first one that passes the threshold; padding is
    neither row nor column; decode steps use running column sums over all rows so far (the code applies the threshold to the one row it has,
    and its rows then do not sum to one); rows with nothing to give to stay as they are.
    """

    alpha: float = 5.0
    beta: float = 0.4
    threshold: float | None = None
    target: Any = OTHERS

    site: ClassVar[Site] = "P"
    folds: ClassVar[bool] = True
    always_written: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _number("alpha", self.alpha) > 0:
            raise refusal(InterventionError, f"alpha={self.alpha}", "every token would be a sink", "pass alpha=5")
        if not 0 <= _number("beta", self.beta) <= 1:
            raise refusal(InterventionError, f"beta={self.beta}", "it is the share that a sink keeps", "pass a number from 0 to 1")
        if self.threshold is not None and not 0 < _number("threshold", self.threshold) < 1:
            raise refusal(InterventionError, f"threshold={self.threshold}", "it is a mean attention", "pass a number between 0 and 1")
        if self.target != NOT_FIRST:
            object.__setattr__(self, "target", read_keys(self.target, others=True))

    def bind(self, scope: Scope) -> ACT:
        """A copy that knows its heads by module; InterventionError for a model that does not read from left to right."""
        refuse_classes(self.target, scope)
        bound = super().bind(scope)
        for name in bound.bound.heads:
            if not scope.topology[name].causal:
                raise refusal(
                    InterventionError, f"ACT in {name}", "received attention is a mean over later tokens", "use it in causal attention"
                )
        return bound

    def passes_over(self, module: str) -> bool:
        """For modules without one of its heads."""
        return module not in self.bound.heads

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The outputs with the sinks calibrated. Sums are kept in every phase, also where nothing is edited."""
        heads = self.heads_in(call)
        if not heads or self.beta == 1.0:
            return output
        received = self._received(call, heads)
        rows = self.rows_in(call)
        if rows is None:
            return output
        to_others, fold = isinstance(self.target, str) and self.target in (OTHERS, NOT_FIRST), Fold.of(call)
        if to_others and received.real is None and call.first_token is None and fold.fused(heads):
            return self._at_once(fold, output, heads, received, rows)
        sinks = self.sinks(received, call)
        if to_others:
            spared = key_set(call, "first", None) if self.target == NOT_FIRST else None
            return redistribute(call, output, heads, sinks, keep=float(self.beta), rows=rows, spare=spared)
        target = key_set(call, self.target, self.bound.image_token)[:, None] & ~sinks
        return redistribute(call, output, heads, sinks, target, keep=float(self.beta), rows=rows, apart=True)

    def _at_once(self, fold: Fold, output: Tensor, heads: list[int], received: Received, rows: Rows) -> Tensor:
        """The same by two kernels, without padding: one finds the sinks and lists them, one calibrates them."""
        from headscope.kernels.triton_keys import sinks_listed

        call, apart = fold.call, self.target == NOT_FIRST
        limit = self.limit(received.end)
        keys = sinks_listed(received.sums, received.rows, limit, call.key_offset, call.k.shape[2], first=0, apart=apart)
        return shift(fold, output, heads, keys, keep=float(self.beta), others=True, rows=rows)

    def limit(self, tokens: int) -> float:
        """The mean attention above which a token is a sink among so many."""
        return float(self.alpha / tokens if self.threshold is None else self.threshold)

    def sinks(self, received: Received, call: AttentionCall) -> Tensor:
        """Bool [B, h, Nk]: the call's keys that are sinks of each head."""
        mean = received.sums / received.rows.clamp_min(1)[:, None]
        span = slice(call.key_offset, call.key_offset + call.k.shape[2])
        if received.real is None:
            found = mean > self.limit(received.end)
            found[:, :, 0] = False
            return found[:, :, span]
        length = received.real.sum(1).clamp_min(1)[:, None, None]
        limit = torch.full_like(mean, self.threshold) if self.threshold is not None else self.alpha / length.to(mean.dtype)
        first = received.real.int().argmax(1, keepdim=True)
        spared = torch.arange(received.end, device=first.device) == first  # no assignment of a number, which would wait for the device
        found = (mean > limit) & (received.real & ~spared)[:, None]
        return found[:, :, span]

    def _received(self, call: AttentionCall, heads: list[int]) -> Received:
        """The layer's sums, with this call's rows added."""
        fold = Fold.of(call)
        part = measure(fold.sub(heads), _SUMS)
        fold.know_lse(heads, part.rows["lse"])
        batch, rows = call.q.shape[0], call.q.shape[2]
        start, end = call.query_offset, call.query_offset + rows
        known: Received | None = self.bound.state.get(call.module)
        if start == 0:
            known = None
        elif known is None or known.end != start or known.sums.shape[0] != batch:
            raise refusal(
                InterventionError,
                f"ACT in {call.module} from position {start} on",
                "the attention that earlier tokens received is not known (the block was opened, or the batch changed, in the middle)",
                "open the block before the text is read",
            )
        sums = part.columns["column_sum"]
        around = (call.key_offset, end - call.key_offset - call.k.shape[2])
        counts = part.counts["row_count"]
        more, counts = (torch.nn.functional.pad(one, around) if any(around) else one for one in (sums, counts))
        real = call.mask.query_valid
        if known is not None:
            more = more + torch.nn.functional.pad(known.sums, (0, rows))
            counts = counts + torch.nn.functional.pad(known.rows, (0, rows))
            if real is not None or known.real is not None:
                real = torch.cat([_whole(known.real, counts, slice(0, start)), _whole(real, counts, slice(start, end))], 1)
        self.bound.state[call.module] = Received(more, counts, real)
        found: Received = self.bound.state[call.module]
        return found

    @classmethod
    def calibrated(
        cls,
        scope: Scope,
        items: list[Any],
        metric: Callable[[Tensor, int], Any],
        *,
        heads: Any = "all",
        keep: int | None = None,
        journal: str | Path | None = None,
        name: str | None = None,
        **options: Any,
    ) -> tuple[ACT, Sweep]:
        """ACT on the heads that gain by it, found one head at a time on a few examples, and the sweep that found them.

        `items`: inputs; `metric(output [1, N, V], index)`: how well input `index` is answered, larger is better (mean log probability of
        the right answer tells more than accuracy on few items). `keep`: how many heads, by gain; None: every head that gains, as in the
        paper. `options`: ACT's own. Each item is run once, then from the edited layer on; `journal` and `name` as in `hs.sweep`.
        """
        from headscope.sweeps import sweep

        found = sweep(scope, lambda head: cls([head], **options), heads, metric, data=list(items), journal=journal, name=name)
        gaining = found.table[found.table["change"] > 0].sort_values("change", ascending=False, kind="stable")
        chosen = [(layer, int(head)) for layer, head in zip(gaining["layer"], gaining["head"], strict=True)][:keep]
        if not chosen:
            raise refusal(
                InterventionError,
                "ACT's head filter",
                f"no head of {len(found.table)} gains on these items",
                "use more items, or another metric",
            )
        return cls(chosen, **options), found

    def settings(self) -> dict[str, Any]:
        """The fields as they go into JSON."""
        return {**super().settings(), "target": positions_json(self.target)}

    def algebra(self) -> str:
        """It meets what earlier redistributions left."""
        return "redistribute"

    def what(self) -> str:
        """In words."""
        limit = f"more than {self.alpha:g}/N" if self.threshold is None else f"more than {self.threshold:g}"
        return f"let tokens that receive {limit} attention on average, but the first, keep {self.beta:.0%} of it"

    def cost(self) -> str:
        """In words."""
        return "one sweep of the statistics kernel over these heads for column sums, and one pass over the sinks, O(N |S| d)"


def _whole(real: Tensor | None, like: Tensor, span: slice) -> Tensor:
    """[B, n] bool of a span of positions; all of them where nothing is padding."""
    return torch.ones_like(like[:, span], dtype=torch.bool) if real is None else real


__all__ = ["ACT", "NOT_FIRST", "Received"]

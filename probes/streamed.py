"""Streamed: heads that see no far keys, for causal checks.

Zeroing a head takes all of its work away, also what it does nearby; in a small model, where one head is the previous-token head of all
others, random heads then cost as much as the right ones. A head that keeps its first keys and a recent window loses what makes it a
retrieval head, and nothing else (the same cut that DuoAttention, arXiv:2410.10819, and RazorAttention make to save memory).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import Intervention, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall, MaskFacts
    from headscope.scope import Scope

ROWS = 256
"""Rows computed at a time."""


@dataclass(frozen=True)
class Streamed(Intervention):
    """The heads (layer, head) attend to the first `sink` keys and the `recent` nearest ones alone, their own included. Exact, O(N^2) per
    head; it has no JSON form.
    """

    heads: tuple[tuple[int | str, int], ...]
    sink: int = 16
    recent: int = 64
    _at: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise refusal(
                InterventionError, f"sink={self.sink}, recent={self.recent}", "a row sees itself at least", "pass 0 and 1 or more"
            )

    def bind(self, scope: Scope) -> Streamed:
        """A copy that knows its heads by module; InterventionError for heads that the model does not have."""
        return replace(self, _at=resolve(self.heads, scope.topology))

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The outputs [B, Nq, Hq, Dv], those of the heads computed anew."""
        from headscope.kernels import attention_rows

        heads = self._at.get(call.module)
        if not heads or call.v is None:
            return output
        shared = [head // call.group for head in heads]
        own = replace(call, q=call.q[:, heads], k=call.k[:, shared], v=call.v[:, shared])
        if call.sink_logits is not None:
            own = replace(own, sink_logits=call.sink_logits[heads])
        pieces = []
        for rows in torch.arange(call.q.shape[2], device=call.q.device).split(ROWS):
            part = replace(own, q=own.q[:, :, rows], query_offset=call.query_offset + int(rows[0]), mask=self._mask(call, heads, rows))
            pieces.append(attention_rows(part, torch.arange(len(rows), device=rows.device)))
        changed = output.clone()
        changed[:, :, heads] = torch.cat(pieces, 2).nan_to_num(nan=0.0).transpose(1, 2).to(output.dtype)
        return changed

    def _mask(self, call: AttentionCall, heads: list[int], rows: Tensor) -> MaskFacts:
        """The call's mask for these heads and rows, far keys hidden."""
        mask = call.mask
        t = (rows + call.query_offset)[:, None]
        s = (torch.arange(call.k.shape[2], device=rows.device) + call.key_offset)[None]
        first = torch.zeros(1, dtype=torch.int64, device=rows.device) if call.first_token is None else call.first_token.to(rows.device)
        near = ((t - s).abs() < self.recent)[None] | ((s < first[:, None] + self.sink)[:, None] & (s >= first[:, None])[:, None])
        allowed = near[:, None]
        cut = {}
        for name in ("allowed", "bias"):
            table = getattr(mask, name)
            if table is not None:
                table = table[:, heads] if table.shape[1] > 1 else table
                cut[name] = table[:, :, rows]
        if "allowed" in cut:
            allowed = allowed & cut["allowed"]
        of_rows = {name: getattr(mask, name)[:, rows] for name in ("query_valid", "query_segments") if getattr(mask, name) is not None}
        return replace(mask, **{**cut, "allowed": allowed, **of_rows})

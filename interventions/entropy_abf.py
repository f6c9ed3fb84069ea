"""EntropyABF: scores that grow with the logarithm of what a row can see, so that attention stays as sharp beyond the trained length.

    q_i := max(1, ln(i + 1) / ln c) q_i,      i + 1 the number of real tokens up to the row, c the trained length

A softmax over more keys is flatter; the entropy of a row grows like the logarithm of its length. The factor is on q, so the model's own
kernel runs. The silent failures this avoids: rows counted from the padding's first position, and decode steps that are all row 0 of their
own call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import register
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.s_site import with_queries

if TYPE_CHECKING:
    from headscope.call import AttentionCall
    from headscope.scope import Scope


@register("entropy_abf")
@dataclass(frozen=True)
class EntropyABF(HeadEdit):
    """Row-wise temperature by position (Zhang et al. 2024, arXiv 2401.07004; github.com/GAIR-NLP/Entropy-ABF).

    `trained`: c in tokens, 4096 in the official code; rows up to it are left alone, to the bit. `layers` restricts it. The change of the
    rotary base that goes by the same name belongs to the model's config and is not made here. A constant temperature is `Temperature`.
    With a soft cap, bias or sink logits, q.k alone is scaled, as in the official code.
    """

    trained: int = 4096

    site: ClassVar[Site] = "S"
    always_written: ClassVar[tuple[str, ...]] = ("trained",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trained, int) or isinstance(self.trained, bool) or self.trained < 2:
            raise refusal(InterventionError, f"trained={self.trained!r}", "it is a length in tokens", "pass e.g. trained=4096")

    def bind(self, scope: Scope) -> EntropyABF:
        """A copy that knows its heads by module; InterventionError where rows do not grow with position."""
        bound = super().bind(scope)
        for name in bound.bound.heads:
            if not scope.topology[name].causal:
                given = f"EntropyABF in {name}"
                raise refusal(InterventionError, given, "every row sees the whole sequence there", "use Temperature, or causal attention")
        return bound

    def edit_call(self, call: AttentionCall, heads: list[int], rows: Rows) -> AttentionCall:
        """Queries scaled; the very call where no row is beyond the trained length."""
        count, device = call.q.shape[2], call.q.device
        seen = (torch.arange(count, device=device, dtype=torch.float64) + call.query_offset + 1)[None]
        if call.first_token is not None:
            seen = seen - call.first_token.to(device)[:, None]
        factor = (seen.clamp_min(1).log() / math.log(self.trained)).clamp_min(1.0)
        if not bool((factor > 1.0).any()):
            return call
        return with_queries(call, heads, call.q[:, heads] * factor[:, None, :, None].to(call.q.dtype), rows)

    def algebra(self) -> str:
        """Its factor differs by row, so it does not commute with other changes of queries."""
        return "row temperature"

    def what(self) -> str:
        """In words."""
        return f"multiply the scores of rows beyond {self.trained} tokens by ln(row) / ln {self.trained}"

    def cost(self) -> str:
        """In words."""
        return "a copy of q"


__all__ = ["EntropyABF"]

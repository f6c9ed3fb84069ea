"""Which calls the redistribution kernel (`triton_partial`) takes, the gates it knows, and its naive twin.

The kernel does in one pass over a few keys what `partial_attention` does with row-by-key blocks in memory. The choice follows the one of
the statistics kernels (`dispatch`), so `use_backend("blocked")` turns it off as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.dispatch import backend_for
from headscope.kernels.naive import naive_weights
from headscope.statistics.request import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

_LSE = StatisticsRequest(("lse",))


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Which rows are edited, by their masses t on the target and w on the watched keys of the source: t + w >= `floor`, and

        t >= share * (t + w)                  or, with `watched`,       w / (t + w + extra) <= share

    `extra`: [B], a sequence's addition to the denominator. Called with t and w [B, h, Nq] it gives the rows, bool.
    """

    floor: float
    share: float
    watched: bool = False
    extra: Tensor | None = None

    def __call__(self, target: Tensor, watched: Tensor) -> Tensor:
        both = target + watched
        if not self.watched:
            return (both >= self.floor) & (target >= self.share * both)
        extra = 0.0 if self.extra is None else self.extra.to(both)[:, None, None]
        return (both >= self.floor) & (watched / (both + extra) <= self.share)


def runs_triton(x: Tensor) -> bool:
    """Whether a tensor [B, N, d] that is no call is a Triton kernel's to read."""
    if x.dtype not in {torch.bfloat16, torch.float16, torch.float32} or x.shape[-1] > 16384:
        return False
    one = x[:1, None, :1, :1]
    return backend_for(AttentionCall("", None, one, one, None, 1.0, MaskFacts(causal=False)), _LSE) == "triton"


def fused(call: AttentionCall) -> bool:
    """Whether the kernel takes a call."""
    if call.v is None or call.v.dtype != call.q.dtype or call.v.shape[3] > 256:
        return False
    return backend_for(call, _LSE) == "triton"


def naive_redistributed(
    call: AttentionCall, codes: Tensor, keep: float, others: bool, gate: Tensor | Gate | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The dense twin of `triton_partial.redistributed`, float64 on the CPU: (output [B, Nq, Hq, Dv], which rows change [B, Hq, Nq])."""
    assert call.v is not None
    a, codes = naive_weights(call).nan_to_num(), codes.cpu().long()[:, :, None]
    source, second, seen = ((codes >> bit & 1).bool() for bit in range(3))
    target = codes == 0 if others else second
    m_s, m_t, m_w = ((a * one).sum(-1) for one in (source, target, seen))
    changes = (m_t >= 1e-12) & (m_s > 0)
    if gate is not None:
        changes &= gate.cpu() if isinstance(gate, torch.Tensor) else gate(m_t, m_w)
    if rows is not None:
        changes &= rows.cpu()[:, None]
    grown = 1 + (1 - keep) * m_s / m_t.clamp_min(1e-12)
    factor = torch.where(source, keep, torch.where(target, grown[..., None], 1.0))
    v = call.v.cpu().double().nan_to_num().repeat_interleave(call.group, 1)
    return ((a * torch.where(changes[..., None], factor, 1.0)) @ v).transpose(1, 2), changes


__all__ = ["Gate", "fused", "naive_redistributed", "runs_triton"]

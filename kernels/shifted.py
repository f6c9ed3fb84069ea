"""Which calls the fold kernels (`triton_partial`) take, and their naive twins.

The kernels do in two passes over a few keys what `partial_attention` does with row-by-key blocks in memory. The choice follows the one of
the statistics kernels (`dispatch`), so `use_backend("blocked")` turns them off as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.kernels.dispatch import backend_for
from headscope.kernels.naive import naive_weights
from headscope.statistics.request import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def fused(call: AttentionCall) -> bool:
    """Whether the fold kernels take a call."""
    if call.v is None or call.v.dtype != call.q.dtype or call.v.shape[3] > 256:
        return False
    return backend_for(call, StatisticsRequest(("lse",))) == "triton"


def naive_masses(call: AttentionCall, codes: Tensor, sets: int) -> Tensor:
    """The dense twin of `triton_partial.masses`, float64 on the CPU."""
    a = naive_weights(call)
    bits = [(codes.cpu() >> bit & 1).double()[:, :, None] for bit in range(sets)]
    return torch.stack([(a * bit).sum(-1) for bit in bits])


def naive_shifted(call: AttentionCall, output: Tensor, heads: Tensor, base: Tensor, factors: tuple[Tensor, ...], codes: Tensor) -> Tensor:
    """The dense twin of `triton_partial.shifted`, float64 on the CPU."""
    assert call.v is not None
    a, base = naive_weights(call).nan_to_num(), base.cpu().double()
    f = base[..., None].expand_as(a)
    for bit in reversed(range(len(factors))):
        f = torch.where((codes.cpu() >> bit & 1).bool()[:, :, None], factors[bit].cpu().double()[..., None], f)
    v = call.v.cpu().double().nan_to_num().repeat_interleave(call.group, 1)
    out, at = output.cpu().double().clone(), heads.cpu()
    new = ((a * f.nan_to_num()) @ v).transpose(1, 2)
    out[:, :, at] = torch.where(base.isnan().transpose(1, 2)[..., None], out[:, :, at], new)
    return out


__all__ = ["fused", "naive_masses", "naive_shifted"]

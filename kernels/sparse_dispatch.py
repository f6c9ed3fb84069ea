"""The one place that chooses how attention under a sparse plan is computed.

Gluon kernels on Hopper, plain Triton on other CUDA devices, split-KV kernels for the last rows of a text, `sparse_blocked` on a CPU and for
the calls that the kernels do not take. The choice is by what a kernel says it supports, never by a try and a fallback, and a backend asked
for by name that cannot run a call is an error: a benchmark that silently ran something else proves nothing.

`worth_it` is the other half: from lengths and densities alone, measured beforehand, it says when the model's own dense kernel would be
faster. Whoever executes a plan asks it first and reports the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from headscope.errors import CaptureError, UnavailableError, refusal, unknown_name
from headscope.kernels.sparse_blocked import blocked_sparse_attention

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans import Pattern

BACKENDS = ("blocked", "decode", "gluon", "naive", "triton")


def sparse_attention(call: AttentionCall, patterns: Sequence[Pattern], *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(output [B, Nq, Hq, Dv] in q's dtype, lse [B, Hq, Nq] float32, or float64 where q is) of one call under one pattern per query head.

    Dynamic patterns of a prefill choose their keys here, per sequence and head. Rows that see no key (padding) give 0 and -inf.
    `backend`: one of BACKENDS, None for the best that runs the call. Raises CaptureError for a call without values or with another number
    of heads than patterns, UnavailableError for a backend that cannot run the call.
    """
    if call.v is None:
        raise refusal(CaptureError, repr(call), "it has no values, so there is no output to compute", "capture v as well")
    if len(patterns) != call.q.shape[1]:
        given = f"{len(patterns)} patterns for {call.q.shape[1]} query heads"
        raise refusal(CaptureError, given, "each head needs one", "pass one per head")
    if backend is not None and backend not in BACKENDS:
        raise unknown_name(UnavailableError, "sparse backend", backend, BACKENDS)
    if backend in ("blocked", "naive"):
        return _plain(call, patterns, backend)
    if backend == "decode" or (backend is None and _is_decode(call, patterns)):
        from headscope.kernels.sparse_decode_call import decode_attention, decode_refuses

        why = decode_refuses(call, patterns)
        if why:
            raise refusal(UnavailableError, "the decode backend", why, "leave the choice to headscope")
        return decode_attention(call, patterns)
    reason = _no_kernel(call, patterns, backend)
    if reason and backend is None:
        return _plain(call, patterns, "blocked")
    if reason:
        raise refusal(UnavailableError, f"the {backend} backend", reason, "leave the choice to headscope")
    from headscope.kernels.sparse_prefill import prefill

    return prefill(call, patterns, backend)


def sparse_backend(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """Name of the backend that `sparse_attention` takes when none is named."""
    if _is_decode(call, patterns):
        return "decode"
    if _no_kernel(call, patterns, None):
        return "blocked"
    from headscope.kernels.sparse_prefill import best

    return best(call, patterns)


def worth_it(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "" when running the call sparse is at least as fast as the model's own dense kernel, or the reason why it is not.

    On a CPU always "": there the plan's result is what is asked for.
    """
    if not call.q.is_cuda:
        return ""
    if _is_decode(call, patterns):
        from headscope.kernels.sparse_decode_call import decode_worth_it

        return decode_worth_it(call, patterns)
    reason = _no_kernel(call, patterns, None)
    if reason:
        return f"no sparse kernel runs it: {reason}"
    from headscope.kernels.sparse_prefill import slower_than_dense

    return slower_than_dense(call, patterns)


def _no_kernel(call: AttentionCall, patterns: Sequence[Pattern], backend: str | None) -> str:
    """ "" when a kernel runs the call, or why it is left to `sparse_blocked`. Triton's interpreter, on a CPU, runs when it is asked for."""
    if not call.q.is_cuda and backend is None:
        return "it is not on a CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed"
    from headscope.kernels.sparse_prefill import supports

    return supports(call, patterns)


def _is_decode(call: AttentionCall, patterns: Sequence[Pattern]) -> bool:
    """Whether the split-KV kernels take the call: the last row or rows of a text, on a device."""
    if not call.q.is_cuda or find_spec("triton") is None:
        return False
    from headscope.kernels.sparse_decode_call import decode_refuses

    return not decode_refuses(call, patterns)


def _plain(call: AttentionCall, patterns: Sequence[Pattern], name: str) -> tuple[Tensor, Tensor]:
    """Without a kernel; sequence by sequence where dynamic patterns choose their keys."""
    from headscope.kernels.sparse_naive import naive_sparse_attention
    from headscope.plans.indices import choose, element

    run = naive_sparse_attention if name == "naive" else blocked_sparse_attention
    if all(pattern.static for pattern in patterns):
        return run(call, patterns)
    parts = []
    for b in range(call.q.shape[0]):
        one = element(call, b)
        parts.append(run(one, [choose(one, head, pattern) for head, pattern in enumerate(patterns)]))
    return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts])

"""The one place that chooses how statistics are computed: Triton on CUDA, blocked PyTorch elsewhere, the dense twin when told to.

The choice is by what a kernel says it supports, never by a try and a fallback: a kernel that fails must be seen to fail. An explicit choice
(`use_backend`) that cannot be honoured is an error, since a test or a benchmark that silently ran something else proves nothing. The
context is a context variable, so threads and tasks do not see each other's choice.

A Triton backend is a module `headscope.kernels.triton_measure` with `measure(call, request)` and `supports(call, request)`, which
returns "" or the reason why it cannot run them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from headscope.errors import CaptureError, StatisticError, UnavailableError, refusal, unknown_name
from headscope.kernels.blocked import measure_blocked
from headscope.kernels.naive import naive_measure
from headscope.statistics.request import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.partial import PartialStatistics

BACKENDS = ("blocked", "naive", "triton")
TRITON = "headscope.kernels.triton_measure"

_forced: ContextVar[str | None] = ContextVar("headscope_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, `measure` runs "blocked", "naive" or "triton" and nothing else."""
    if name not in BACKENDS:
        raise unknown_name(UnavailableError, "statistics backend", name, BACKENDS)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def measure(call: AttentionCall, request: StatisticsRequest) -> PartialStatistics:
    """Measures one attention call: exactly the statistics that `request` names, in O(N) memory (naive: O(N^2)).

    Raises CaptureError for a call whose parts do not fit each other, StatisticError for a request that does not fit the call,
    UnavailableError when `use_backend` names a backend that cannot run it.
    """
    check(call, request)
    name = backend_for(call, request)
    if name == "naive":
        return naive_measure(call, request)
    if name == "blocked":
        return measure_blocked(call, request)
    return import_module(TRITON).measure(call, request)


def backend_for(call: AttentionCall, request: StatisticsRequest | None = None) -> str:
    """Name of the backend that `measure` uses for a call (and a request; None: the passive statistics)."""
    request = StatisticsRequest() if request is None else request
    forced = _forced.get()
    if forced in {"blocked", "naive"}:
        return str(forced)
    if forced is None and not call.q.is_cuda:
        return "blocked"
    reason = _triton_refuses(call, request)
    if not reason:
        return "triton"
    if forced is None:
        return "blocked"
    raise refusal(UnavailableError, "the triton backend", reason, "leave the choice to headscope, or use_backend('blocked')")


def _triton_refuses(call: AttentionCall, request: StatisticsRequest) -> str:
    """ "" when the Triton kernels run this call, else why not."""
    missing = _missing_triton()
    return missing or import_module(TRITON).supports(call, request)


@lru_cache(maxsize=1)
def _missing_triton() -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    return "" if find_spec(TRITON) is not None else "this build has no Triton statistics kernel"


def check(call: AttentionCall, request: StatisticsRequest) -> None:
    """Raises CaptureError or StatisticError when shapes do not fit each other; what passes here no kernel has to question."""
    if call.q.dim() != 4 or call.k.dim() != 4:
        raise refusal(
            CaptureError, f"q {list(call.q.shape)}, k {list(call.k.shape)}", "attention needs [B, H, N, D]", "bring them to that layout"
        )
    batch, heads, rows, width = call.q.shape
    kv_heads, keys = call.k.shape[1], call.k.shape[2]
    mask = call.mask
    if call.k.shape[0] != batch or call.k.shape[3] != width or kv_heads == 0 or heads % kv_heads:
        why = "they must share batch and width, and the query heads must divide evenly over the key heads"
        raise refusal(CaptureError, f"q {list(call.q.shape)}, k {list(call.k.shape)}", why, "pass k as the model has it, not repeated")
    if 0 in (batch, heads, rows, keys, width):
        raise refusal(
            CaptureError, f"q {list(call.q.shape)}, k {list(call.k.shape)}", "there is nothing to attend to", "leave empty calls out"
        )
    if not call.q.is_floating_point() or not math.isfinite(call.scale):
        raise refusal(
            CaptureError, f"q of {call.q.dtype}, scale {call.scale}", "scores need real numbers", "pass floating point q, k and scale"
        )
    if call.softcap is not None and not call.softcap > 0:
        raise refusal(CaptureError, f"softcap={call.softcap}", "scores are divided by it", "pass a positive softcap, or None")
    if mask.window is not None and mask.window < 1:
        raise refusal(CaptureError, f"window={mask.window}", "a query would not even see itself", "pass a window of 1 or more, or None")
    if (mask.query_segments is None) != (mask.key_segments is None):
        raise refusal(
            CaptureError, "segments of one side only", "they are compared with each other", "pass query_segments and key_segments"
        )
    for name, value, shape in (
        ("key_valid", mask.key_valid, (batch, keys)),
        ("query_valid", mask.query_valid, (batch, rows)),
        ("query_segments", mask.query_segments, (batch, rows)),
        ("key_segments", mask.key_segments, (batch, keys)),
        ("sink_logits", call.sink_logits, (heads,)),
        ("first_token", call.first_token, (batch,)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise refusal(CaptureError, f"{name} {list(value.shape)}", f"this call needs {list(shape)}", "pass it in that shape")
    for name, value in (("key_valid", mask.key_valid), ("query_valid", mask.query_valid), ("allowed", mask.allowed)):
        if value is not None and value.dtype != torch.bool:
            raise refusal(CaptureError, f"{name} of {value.dtype}", "its meaning would be a guess", "pass a bool tensor, True for visible")
    for name, value in (("allowed", mask.allowed), ("bias", mask.bias)):
        if value is not None and not (
            value.dim() == 4 and value.shape[0] in (1, batch) and value.shape[1] in (1, heads) and value.shape[2:] == (rows, keys)
        ):
            need = f"[{batch} or 1, {heads} or 1, {rows}, {keys}]"
            raise refusal(CaptureError, f"mask.{name} {list(value.shape)}", f"this call needs {need}", "pass it in that shape")
    _check_request(request, batch)


def _check_request(request: StatisticsRequest, batch: int) -> None:
    tables: list[tuple[str, Tensor | None]] = [("labels", request.labels), ("segments", request.segments), ("rows", request.rows)]
    for name, (queries, columns) in request.pairs.items():
        if queries.shape[-1] != columns.shape[-1]:
            given = f"pairs {name!r}: {queries.shape[-1]} queries, {columns.shape[-1]} keys"
            raise refusal(StatisticError, given, "they go together one by one", "pass two tensors of one length")
        tables += [(f"pairs {name!r} queries", queries), (f"pairs {name!r} keys", columns)]
    for name, value in tables:
        if value is not None and not (value.dim() == 1 or (value.dim() == 2 and value.shape[0] in (1, batch))):
            raise refusal(StatisticError, f"{name} {list(value.shape)}", f"the call's batch is {batch}", f"pass one row, or {batch} rows")

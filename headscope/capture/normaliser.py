"""The rows' lse from the host's own kernel, where it can be had without changing a bit of the model's output.

torch's scaled_dot_product_attention computes every row's log-sum-exp on the way and throws it away. The kernels behind it hand it out when
they are asked directly, and with it the statistics need one pass over the keys instead of two. So while a call is observed on CUDA, the
host's call of that function is carried out by the kernel that torch would have chosen (`torch._fused_sdp_choice`), asked for the lse as
well. The output must stay the host's to the bit, and that is not taken on trust: the first call of every kind (kernel, shapes,
strides, dtype) runs both ways, and where one bit differs, or the lse is not the one of these scores, that kind is left alone from then on.

What happens otherwise is what happened before: the host's function runs as it is, and the statistics find the lse themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

FUNCTION = functional.scaled_dot_product_attention
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
FLASH, CUDNN = 1, 3
"""torch's numbers of its kernels (SDPBackend)."""
FEWEST = 128
"""Fewest rows for which it is worth while; a decode step has one, and another number of keys each time."""
MOST = 4096
"""Kinds of calls remembered."""

_trusted: dict[tuple[object, ...], bool] = {}
"""Per kind of call: the kernel asked directly gives the same bits and the right lse."""


class Listening(TorchFunctionMode):
    """Carries out the host's scaled_dot_product_attention within the block, keeping the lse in `lse` [B, Hq, Nq] where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.lse: Tensor | None = None
        self.causal = False
        self.keys = 0
        self.scale = 0.0
        self._calls = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not FUNCTION:
            return func(*args, **kwargs)
        self._calls += 1
        self.lse = None
        given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
        if self._calls > 1 or not _plain(given):
            return func(*args, **kwargs)
        found = _direct(given)
        if found is None:
            return func(*args, **kwargs)
        kernel, run = found
        kind = (kernel, *_kind(given))
        if kind not in _trusted:
            want = func(*args, **kwargs)
            out, lse = run()
            same = out.shape == want.shape and out.stride() == want.stride() and torch.equal(out, want)
            if len(_trusted) >= MOST:
                _trusted.clear()
            _trusted[kind] = same and _right(given, lse)
            if not _trusted[kind]:
                return want
        elif _trusted[kind]:
            want, lse = run()
        else:
            return func(*args, **kwargs)
        query = given["query"]
        self.lse, self.causal, self.keys = lse.reshape(query.shape[:3]), bool(given.get("is_causal")), given["key"].shape[2]
        self.scale = query.shape[3] ** -0.5 if given.get("scale") is None else float(given["scale"])
        return want

    def lse_of(self, call: AttentionCall) -> Tensor | None:
        """The lse if it is this call's: of the same rows and keys under the mask that the call was read to have."""
        mask = call.mask
        facts = (mask.window, mask.key_valid, mask.query_valid, mask.query_segments, mask.allowed, mask.bias, call.softcap)
        if self.lse is None or call.sink_logits is not None or any(fact is not None for fact in facts):
            return None
        if not math.isclose(self.scale, call.scale, rel_tol=1e-6):
            return None
        rows, keys = call.q.shape[2], call.k.shape[2]
        if self.lse.shape != call.q.shape[:3] or keys != self.keys or (mask.causal and rows > 1) != self.causal:
            return None
        # torch counts a causal mask from the first query and key; a query behind the last key is another thing
        return self.lse if not mask.causal or rows == 1 or call.query_offset == call.key_offset else None


def _plain(given: dict[str, Any]) -> bool:
    """A forward-only call in half precision on CUDA with no mask of its own."""
    parts = [x for x in (given.get(name) for name in NAMES[:3]) if isinstance(x, torch.Tensor)]
    if len(parts) < 3 or not all(x.is_cuda and x.dim() == 4 and x.dtype in {torch.float16, torch.bfloat16} for x in parts):
        return False
    query, key, value = parts
    if given.get("attn_mask") is not None or given.get("dropout_p") or query.shape[2] < FEWEST or query.shape[3] % 8:
        return False
    if key.shape[2] != query.shape[2] or value.shape[3] != query.shape[3]:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in parts))


def _kind(given: dict[str, Any]) -> tuple[object, ...]:
    """What torch and its kernels choose their code by."""
    parts = [given[name] for name in NAMES[:3]]
    shapes = [(tuple(x.shape), x.stride(), x.data_ptr() % 16) for x in parts]
    return (*shapes, parts[0].dtype, parts[0].device, bool(given.get("is_causal")), given.get("scale"), bool(given.get("enable_gqa")))


def _direct(given: dict[str, Any]) -> tuple[int, Callable[[], tuple[Tensor, Tensor]]] | None:
    """The number of the kernel that torch would choose, and a call of it that also returns the lse; None for the others."""
    query, key, value = (given[name] for name in NAMES[:3])
    causal, scale, grouped = bool(given.get("is_causal")), given.get("scale"), bool(given.get("enable_gqa"))
    choice = getattr(torch, "_fused_sdp_choice", None)  # torch's own, and not public: without it the lse is found by a sweep
    if choice is None:
        return None
    kernel = int(choice(query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped))

    def cudnn() -> tuple[Tensor, Tensor]:
        both = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, False, scale=scale)
        return both[0], both[1]

    def flash() -> tuple[Tensor, Tensor]:
        both = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return both[0], both[1]

    found = {CUDNN: cudnn, FLASH: flash}.get(kernel)
    return None if found is None else (kernel, found)


def _right(given: dict[str, Any], lse: Tensor) -> bool:
    """Whether a few rows of the lse are what the scores give: natural logarithms, of these rows, unpadded."""
    query, key = given["query"], given["key"]
    batch, heads, rows, width = query.shape
    if lse.dtype != torch.float32 or lse.numel() != batch * heads * rows:
        return False
    lse = lse.reshape(batch, heads, rows)
    scale = width**-0.5 if given.get("scale") is None else float(given["scale"])
    group = heads // key.shape[1]
    for b, h, row in {(0, 0, 0), (0, heads - 1, rows - 1), (batch - 1, heads // 2, rows // 2), (batch - 1, 0, rows - 1)}:
        end = row + 1 if given.get("is_causal") else key.shape[2]
        scores = (key[b, h // group, :end].double() @ query[b, h, row].double()) * scale
        want = float(torch.logsumexp(scores, 0))
        if not math.isclose(float(lse[b, h, row]), want, rel_tol=1e-4, abs_tol=1e-3):
            return False
    return True

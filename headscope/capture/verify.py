"""The self-check of a capture: our reading of a call must reproduce the output that the host's function really returned.

A mask in a new format, a keyword argument that a new model adds, a window applied inside a kernel: each would make statistics that look
right and are wrong. So on the first call of every module, and again whenever the kind of call changes (prefill to decode, another mask),
a few query rows are computed from q, k, v and the facts, exactly, and compared with the host's output. It costs a few rows, not a matrix.
On a GPU the comparison is queued like everything else and read when the forward pass has ended (`Comparison.settle`), before anything
measured is handed out: reading it at once would make the GPU wait for Python at every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import CaptureError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

ROWS, FEW = 8, 3
MUCH = 1 << 25
"""Scores of ROWS rows beyond which a call on a GPU is checked on FEW."""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest error of a row's output, relative to the row's length (Euclidean); float32 on a GPU may run in TF32 and gets 2e-3. Errors of
reading are of order 1; those of a float64 model are its eager softmax's, which runs in float32."""


def signature(call: AttentionCall) -> tuple[object, ...]:
    """Calls of equal signature are read by the same rules, so one of them is enough to check."""
    mask = call.mask
    return (
        call.module,
        call.kernel,
        call.q.shape[2] > 1,
        call.query_offset > 0,
        call.key_offset > 0,
        mask.causal,
        mask.window,
        *(tensor is not None for tensor in (mask.key_valid, mask.query_valid, mask.query_segments, mask.allowed, mask.bias)),
    )


def as_heads(output: Tensor, call: AttentionCall) -> Tensor:
    """The host's output as [B, Nq, Hq, Dv], however the host shaped it."""
    batch, heads, rows, _ = call.q.shape
    return output.reshape(batch, rows, heads, -1)


@dataclass(slots=True, eq=False)
class Comparison:
    """The outcome of comparing one call's output with ours, as tensors on the call's device.

    - `worst`: the largest error of a row's output, relative to the row's length. `unread`: there are rows that count for which neither
      we nor the host have a number; `finite`: q, k and v are finite.
    """

    worst: Tensor
    unread: Tensor
    finite: Tensor
    limit: float
    where: str
    kernel: str
    facts: str
    named: str

    def settle(self) -> None:
        """Raises CaptureError when the outputs differ; waits for the device."""
        worst, unread, finite = torch.stack([self.worst.double(), self.unread.double(), self.finite.double()]).tolist()
        if unread and not finite:
            raise refusal(
                CaptureError,
                self.where,
                "its queries, keys or values hold NaN or infinity, so its attention is no number (damaged weights, or an overflow in half "
                "precision)",
                "load the model in float32 or bfloat16 and check its weights; verify=False measures what there is",
            )
        if worst <= self.limit:
            return
        raise refusal(
            CaptureError,
            f"{self.where} under attention {self.kernel!r}",
            f"recomputing its output from our reading of the call gives a relative error of {worst:.2g} (limit {self.limit:g}): something "
            f"in the call is not understood. It came with {self.facts}; keyword arguments: {self.named}",
            "the statistics would be wrong, so none are given; try model.set_attn_implementation('eager' or 'sdpa')",
        )


def check_output(call: AttentionCall, output: Tensor, kwargs: dict[str, Any]) -> None:
    """Compare a few rows of the host's output [B, Nq, Hq, Dv] with ours. Raises CaptureError when they differ."""
    compare_output(call, output, kwargs).settle()


@torch.no_grad()
def compare_output(call: AttentionCall, output: Tensor, kwargs: dict[str, Any]) -> Comparison:
    """The comparison of a few rows of the host's output [B, Nq, Hq, Dv] with ours, not read yet."""
    from headscope.kernels import attention_rows

    rows = _chosen_rows(call)
    ours = attention_rows(call, rows).transpose(1, 2).double()  # [B, R, Hq, Dv]
    rows = rows.to(ours.device, non_blocking=True)
    theirs = as_heads(output, call)[:, rows].to(ours.device).double()
    counted = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device)
    if call.mask.query_valid is not None:
        counted &= call.mask.query_valid[:, rows].to(ours.device)
    unknown = ours.isnan().any(-1).any(-1)
    unread = (counted & unknown & ~theirs.isfinite().all(-1).all(-1)).any()
    counted &= ~unknown  # rows that see no key have no output to agree on
    length = theirs.norm(dim=-1).masked_fill(~counted[..., None], 0.0)
    error = (ours - theirs).norm(dim=-1) / (length + 0.05 * length.mean() + 1e-30)
    worst = torch.where(counted[..., None], error, error.new_zeros(())).nan_to_num(nan=float("inf")).max()
    finite = _finite(call) if call.q.is_cuda or bool(unread) else ~unread
    limit = TOLERANCE.get(call.q.dtype, 6e-2)
    if call.q.is_cuda and call.q.dtype == torch.float32:
        limit = 2e-3
    named = ", ".join(sorted(name for name, value in kwargs.items() if value is not None)) or "none"
    where = f"{call.module} (layer {call.layer})"
    return Comparison(worst, unread, finite, limit, where, call.kernel, _facts(call), named)


def _finite(call: AttentionCall) -> Tensor:
    """Whether q, k and v hold neither NaN nor infinity: their sums would show it."""
    parts = [part for part in (call.q, call.k, call.v) if part is not None]
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return torch.stack([part.sum(dtype=wide).isfinite() for part in parts]).all()


def _chosen_rows(call: AttentionCall) -> Tensor:
    """Up to ROWS row numbers: the first and last, evenly between, and, where there is padding, from the real tokens of each sequence."""
    count = call.q.shape[2]
    most = FEW if call.q.is_cuda and ROWS * call.q.shape[0] * call.q.shape[1] * call.k.shape[2] > MUCH else ROWS
    rows = set(torch.linspace(0, count - 1, min(most, count)).long().tolist())
    valid = call.mask.query_valid
    if valid is not None:
        for one in valid[: ROWS // 2].cpu():
            real = one.nonzero().flatten()
            if real.numel():
                rows |= {int(real[0]), int(real[real.numel() // 2]), int(real[-1])}
    return torch.tensor(sorted(rows))


def _facts(call: AttentionCall) -> str:
    mask = call.mask
    parts = [f"q {list(call.q.shape)} at {call.query_offset}", f"k {list(call.k.shape)} at {call.key_offset}", f"scale {call.scale:.4g}"]
    parts += ["causal" if mask.causal else "bidirectional"]
    parts += [f"window {mask.window}"] if mask.window is not None else []
    parts += [f"softcap {call.softcap:g}"] if call.softcap is not None else []
    parts += ["sink logits"] if call.sink_logits is not None else []
    named = (("padding", mask.key_valid), ("packed sequences", mask.query_segments), ("a mask matrix", mask.allowed), ("a bias", mask.bias))
    return ", ".join([*parts, *(name for name, value in named if value is not None)])

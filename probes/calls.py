"""What active probes read at the attention seam: each layer's call of one forward pass, exact rows of A, the output of a sparse mask.

Probes that search for a pattern, follow a gradient or compare outputs need more of a layer than its statistics, but never the whole matrix:
a few rows at a time are enough. One layer's q, k and v are alive while its call is served, so such a probe reads them there and keeps only
its numbers. Everything here is plain torch and differentiable, and every fact of a call's mask is applied at the place itself.

The silent failure this avoids: scores rebuilt from q and k alone. A soft cap, a sink logit, a sliding window or a position bias each change
the weights, and a probe that forgot one would describe a model that was never run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from headscope.errors import DataError, ProbeError, refusal
from headscope.interventions.base import Intervention
from headscope.kernels.gather import visible_at
from headscope.probes.text import REPEATS, ProbeText, block_for, natural_probe_text, repeated_random

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.active import Work
    from headscope.scope import Scope

ROWS = 128
"""Query rows of A that are made at a time."""

See = Callable[["AttentionCall", "Tensor"], None]


@dataclass(frozen=True)
class EachCall(Intervention):
    """Shows every call of the main stack and its output [B, N, Hq, Dv], and changes nothing."""

    see: See
    modules: frozenset[str]

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        if call.module in self.modules:
            self.see(call, output)
        return output


def each_call(scope: Scope, ids: Tensor, see: See) -> None:
    """One forward pass over ids [N] without gradients; `see(call, output)` at each layer of the main stack, B = 1."""
    from headscope.interventions.running import run_once

    with scope.intervene(EachCall(see, main_modules(scope))):
        run_once(scope, ids[None])


def main_modules(scope: Scope) -> frozenset[str]:
    """Names of the modules of the main stack."""
    return frozenset(module.name for module in scope.topology.main)


def not_readable(scope: Scope) -> str | None:
    """Why a layer's calls cannot be read at the seam, or None."""
    return next((f"{module.name}: {module.capturable}" for module in scope.topology.main if module.capturable), None)


def not_differentiable(scope: Scope) -> str | None:
    """Why gradients cannot be taken through a model, or None."""
    if scope.host.kind != "transformers":
        return f"gradients are taken through a transformers model, and this one came through {scope.host.kind}"
    if getattr(scope.model, "is_quantized", False) or any(parameter.is_meta for parameter in scope.model.parameters()):
        return "its weights are quantised or offloaded, and gradients are not taken through those"
    return None


def context_of(scope: Scope, work: Work, longest: int = 2048) -> int:
    """Tokens of a probe's own text: the user's context, else `longest` or the model's length, whichever is less. DataError beyond it."""
    limit = scope.max_length
    if work.context is None:
        return longest if limit is None else min(longest, limit)
    if limit is not None and work.context > limit:
        raise refusal(DataError, f"a context of {work.context} tokens", f"{scope.name} was made for {limit}", f"use {limit} or less")
    return work.context


def texts_of(scope: Scope, data: Any, work: Work, *, texts: int = 1) -> list[ProbeText]:
    """The texts of a probe that reads any text: the user's data, else natural text, else (no tokenizer) random tokens four times over.

    `data`: a ProbeText or several, ids [N] or [B, N] (each row one text), or what `headscope.data.natural_texts` takes.
    """
    from headscope.data import natural_texts
    from headscope.profile.texts import given_texts

    given = given_texts(data)
    if given is not None:
        return given
    if isinstance(data, torch.Tensor) and data.ndim in (1, 2) and not data.is_floating_point():
        return [ProbeText.natural(row) for row in (data[None] if data.ndim == 1 else data)]
    context = context_of(scope, work)
    tokenizer = getattr(scope, "tokenizer", None)
    if data is None and tokenizer is None:
        block = block_for(context, int(scope.vocabulary or 0), REPEATS)
        return [repeated_random(scope, block=block, seed=work.seed + number) for number in range(texts)]
    return [natural_probe_text(text, tokenizer) for text in natural_texts(tokenizer, context, texts=texts, data=data)]


def long_enough(name: str, text: ProbeText, least: int, why: str) -> None:
    """ProbeError for a text that is too short for a probe."""
    if len(text) < least:
        raise refusal(ProbeError, f"probe {name!r} on {len(text)} tokens", f"{why}, and needs {least}", "raise the context")


# ---- rows of A ------------------------------------------------------------------------------------------------------


def score_rows(call: AttentionCall, start: int, stop: int, columns: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scores of query rows start..stop on all keys, or on `columns` [K] by index: [B, Hq, rows, keys] in `dtype`, -inf where hidden."""
    batch, heads, _, width = call.q.shape
    kv_heads, count = call.k.shape[1], stop - start
    device = call.q.device
    k = call.k if columns is None else call.k[:, :, columns]
    columns = torch.arange(call.k.shape[2], device=device) if columns is None else columns
    q = call.q[:, :, start:stop].to(dtype).reshape(batch, kv_heads, call.group * count, width)
    scores = (q @ k.to(dtype).transpose(-1, -2)).view(batch, heads, count, -1) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask.bias is not None:
        scores = scores + call.mask.bias[:, :, start:stop][..., columns].to(dtype)
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[None, :, None, None]
    rows = torch.arange(start, stop, device=device)[None, None, :, None]
    return scores.masked_fill(~visible_at(call, b, h, rows, columns[None, None, None, :]), -math.inf)


def normalised(call: AttentionCall, scores: Tensor) -> Tensor:
    """Scores to weights, with the call's sink logit in the denominator; a row that sees nothing is 0."""
    lse = torch.logsumexp(scores, -1, keepdim=True)
    if call.sink_logits is not None:
        lse = torch.logaddexp(lse, call.sink_logits.to(scores)[:, None, None])
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0))


def weight_rows(call: AttentionCall, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows start..stop of A: [B, Hq, rows, Nk]."""
    return normalised(call, score_rows(call, start, stop, dtype=dtype))


def row_chunks(total: int, first: int = 0, rows: int = ROWS) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive chunks of rows."""
    for start in range(first, total, rows):
        yield start, min(start + rows, total)


def weighed(call: AttentionCall, weights: Tensor, columns: Tensor | None = None) -> Tensor:
    """weights [B, Hq, n, K] on the call's values (of `columns`): [B, Hq, n, Dv]."""
    assert call.v is not None
    v = call.v if columns is None else call.v[:, :, columns]
    batch, heads, count, keys = weights.shape
    grouped = weights.reshape(batch, call.k.shape[1], call.group * count, keys)
    return (grouped @ v.to(weights.dtype)).view(batch, heads, count, -1)


# ---- outputs under a sparse mask ------------------------------------------------------------------------------------


def streaming_rows(call: AttentionCall, start: int, stop: int, sink: int, recent: int) -> Tensor:
    """Output of rows start..stop when they see the first `sink` keys and the `recent` latest, themselves included: [B, Hq, rows, Dv].

    Exactly that mask, renormalised. Time and memory go with rows * (sink + recent + rows).
    """
    device = call.q.device
    low = max(start - recent + 1, 0)
    near = torch.arange(low, stop, device=device)
    columns = near if not low else torch.cat([torch.arange(min(sink, low), device=device), near])
    scores = score_rows(call, start, stop, columns, torch.promote_types(call.q.dtype, torch.float32))
    behind = torch.arange(start, stop, device=device)[:, None] - columns
    scores = scores.masked_fill((behind >= recent) & (columns >= sink), -math.inf)
    return weighed(call, normalised(call, scores), columns)


def streaming_output(call: AttentionCall, sink: int, recent: int, rows: int | None = None) -> Tensor:
    """`streaming_rows` of every row: [B, N, Hq, Dv] in q's dtype. With gradients, weights are made again in the backward pass."""
    return _by_rows(call, rows, lambda start, stop: streaming_rows(call, start, stop, sink, recent))


def full_output(call: AttentionCall, rows: int | None = None) -> Tensor:
    """The call's own output, differentiable, without the matrix: [B, N, Hq, Dv] in q's dtype."""
    mask = call.mask
    plain = mask.causal and mask.window is None and call.softcap is None and call.sink_logits is None
    facts = (mask.key_valid, mask.query_segments, mask.allowed, mask.bias)
    if plain and all(fact is None for fact in facts) and call.v is not None and call.q.shape[2] == call.k.shape[2]:
        k, v = (part.repeat_interleave(call.group, 1) for part in (call.k, call.v))
        return torch.nn.functional.scaled_dot_product_attention(call.q, k, v, is_causal=True, scale=call.scale).transpose(1, 2)

    def dense(start: int, stop: int) -> Tensor:
        return weighed(call, weight_rows(call, start, stop, torch.promote_types(call.q.dtype, torch.float32)))

    return _by_rows(call, rows, dense)


def _by_rows(call: AttentionCall, rows: int | None, make: Callable[[int, int], Tensor]) -> Tensor:
    """`rows` at a time. None: 256 on a CPU; on a GPU, where each piece costs its launches, as many as make half a gigabyte of scores."""
    if rows is None:
        per_row = call.q.shape[0] * call.q.shape[1] * call.k.shape[2]
        rows = 256 if call.q.device.type == "cpu" else max(256, (1 << 27) // max(per_row, 1))
    pieces = []
    for start, stop in row_chunks(call.q.shape[2], rows=rows):
        one = checkpoint(make, start, stop, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else make(start, stop)
        pieces.append(one.to(call.q.dtype))
    return torch.cat(pieces, 2).transpose(1, 2)


def check_streaming(name: str, sink: int, recent: int, context: int) -> None:
    """ProbeError for a sink and a window that are no lengths, or that keep everything."""
    if sink < 0 or recent < 1:
        raise refusal(ProbeError, f"sink={sink}, recent={recent}", "they count keys, and a row sees itself", "pass sink >= 0, recent >= 1")
    if sink + recent >= context:
        raise refusal(
            ProbeError,
            f"probe {name!r} with sink={sink} and recent={recent} on {context} tokens",
            "streaming would then keep every key, so nothing could tell heads apart",
            "use a longer context, or a smaller sink and window",
        )

"""The rhythm of a text, token by token: preplan tokens, anchor tokens, how they hang together, and the weights that follow from it.

Pure functions of the curves WAAD_t and FAI_s (one number per response token), so that each can be checked by hand. Numbers in brackets are
the equations of arXiv:2510.13554.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor

from headscope.errors import ProbeError, refusal, unknown_name

GAMMAS: tuple[Literal["local", "global", "coupled"], ...] = ("local", "global", "coupled")


def drops(waad: Tensor) -> Tensor:
    """(13) Delta_t = |WAAD_t - WAAD_{t+1}|: [n]; NaN for the last token, which has none."""
    out = torch.full_like(waad, float("nan"))
    out[:-1] = (waad[:-1] - waad[1:]).abs()
    return out


def top_share(values: Tensor, share: float) -> Tensor:
    """Bool [n]: the ceil(share * m) largest of the m values that are no NaN; of equals the earlier ones."""
    known = ~values.isnan()
    count = ceil(round(share * int(known.sum()), 9))
    order = values.nan_to_num(nan=float("-inf")).argsort(descending=True, stable=True)
    out = torch.zeros(len(values), dtype=torch.bool)
    out[order[:count]] = True
    return out & known


def introductions(delta: Tensor, reach: int = 3) -> tuple[Tensor, Tensor]:
    """(largest Delta_u over u in t-reach .. t-1 [n], the u where it stands [n] int64); NaN and -1 where there is none.

    (17) asks for the first; the second is intro(t) of (18), of equals the earliest.
    """
    best = torch.full_like(delta, float("nan"))
    where = torch.full((len(delta),), -1, dtype=torch.int64)
    for back in range(1, min(reach, len(delta) - 1) + 1):
        earlier = delta[:-back]
        now = best[back:]
        larger = ~earlier.isnan() & (now.isnan() | (earlier >= now))
        best[back:] = torch.where(larger, earlier, now)
        where[back:] = torch.where(larger, torch.arange(len(earlier)), where[back:])
    return best, where


def dominated(waad: Tensor, anchors: Tensor, tau_waad: float, tau_delta: float, reach: int = 3) -> Tensor:
    """(17) bool [n]: anchors t with WAAD_t <= tau_waad and a Delta_u >= tau_delta within the `reach` tokens before: a local plan leads to
    them.
    """
    best, _ = introductions(drops(waad), reach)
    return anchors & (waad <= tau_waad) & (best >= tau_delta)


def gamma_weights(
    kind: Literal["local", "global", "coupled"],
    *,
    preplan: Tensor | None = None,
    anchors: Tensor | None = None,
    dominated: Tensor | None = None,
    introduced_by: Tensor | None = None,
    gain: float = 1.5,
    alpha: float = 0.5,
) -> Tensor:
    """Factors [n] float64 on the advantages of a response's tokens; to be applied where the advantage is not negative.

    "local" (14): 1 + (gain - 1) at preplan tokens. "global" (16): the same at anchors. "coupled" (18): 1 + (gain - 1) at anchors that are
    not dominated; at dominated ones (1 - alpha) (gain - 1) stays and alpha (gain - 1) goes to the token that introduced each
    (`introduced_by` [n], positions; once, however many anchors it introduced). A token that is both adds up.
    """
    if kind not in GAMMAS:
        raise unknown_name(ProbeError, "kind of gamma", kind, GAMMAS)
    if not 0 <= alpha <= 1:
        raise refusal(ProbeError, f"alpha={alpha}", "it is the share that is handed on", "pass a number from 0 to 1")
    extra = gain - 1
    if kind == "local":
        return 1 + extra * _given("preplan", preplan, kind).double()
    at = _given("anchors", anchors, kind)
    if kind == "global":
        return 1 + extra * at.double()
    led, by = _given("dominated", dominated, kind), _given("introduced_by", introduced_by, kind)
    out = 1 + extra * (at & ~led).double() + (1 - alpha) * extra * led.double()
    introducers = torch.zeros(len(out), dtype=torch.bool)
    introducers[by[led & (by >= 0)]] = True
    return out + alpha * extra * introducers.double()


def _given(name: str, value: Tensor | None, kind: str) -> Tensor:
    if value is None:
        raise refusal(ProbeError, f"gamma_weights({kind!r}) without {name}", "the formula needs it", f"pass {name}= [n]")
    return value


def peaks(curve: Tensor, share: float) -> Tensor:
    """Bool [n]: local maxima (at least as large as both neighbours, larger than one) that are among the `share` largest values.

    The paper names no peak detector; this one is ours. NaN and the two ends are no peaks.
    """
    out = torch.zeros(len(curve), dtype=torch.bool)
    if len(curve) < 3:
        return out
    left, mid, right = curve[:-2], curve[1:-1], curve[2:]
    out[1:-1] = (mid >= left) & (mid >= right) & ((mid > left) | (mid > right))
    return out & top_share(curve, share)


def follows(first: Tensor, second: Tensor, within: int) -> tuple[float, float]:
    """(share of the tokens `first` with a `second` at the same token or up to `within` later, the same share over all tokens).

    The second number is what a token picked blindly would get: exact, and no draw of random tokens.
    """
    near = torch.zeros(len(second), dtype=torch.bool)
    for shift in range(within + 1):
        near[: len(second) - shift] |= second[shift:]
    if not bool(first.any()):
        return float("nan"), float(near.double().mean())
    return float(near[first].double().mean()), float(near.double().mean())


__all__ = ["GAMMAS", "dominated", "drops", "follows", "gamma_weights", "introductions", "peaks", "top_share"]

"""RectifiedSparse: sparse attention of a diffusion transformer whose rows are put back to the size they have in full attention.

Image tokens are taken in blocks, and a block's mean query against the blocks' mean keys and every word says about how much of the row each
block has:

    p_J = n_J exp(q.k_J) / ( sum_J n_J exp(q.k_J) + sum_words exp(q.k_w) )            k_J the mean key of block J, of n_J tokens
    critical: the blocks that rank first, and all words;  z_sparse the softmax over the keys of these alone
    z' = R z_sparse + sum_{J in rest} p_J v_J                                         v_J the mean value of block J

The rest are blocks whose mean says more than it gets wrong; R = 1 - sum_rest p_J. So a row keeps its size: what is left out is either told
by a mean or goes to the critical keys. Text rows stay full. The silent failure this avoids: a softmax over a tenth of the keys that hands
each of them ten times its weight.

This says what such attention does to a model, not how fast it is: the host's full kernel runs as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import register
from headscope.interventions.fold import Fold, refuse_gradients
from headscope.interventions.head_edit import HeadEdit, Rows, Site, merged
from headscope.interventions.score_edits import _number
from headscope.interventions.streams import spans
from headscope.kernels.partial import partial_attention, row_lse, select_heads

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope


@register("rectified_sparse")
@dataclass(frozen=True)
class RectifiedSparse(HeadEdit):
    """Rectified SpaAttn (Liu et al. 2025, arXiv 2511.19835; github.com/BienLuky/Rectified-SpaAttn, read for its formulas).

    Critical are as many blocks as reach `mass` of p, words counted as one block, and at least `top`. `block`: tokens a block (128), the
    last one may be shorter. `gains`: whether blocks that are not critical are told by their mean at all; of those, only the ones with
    |q.k_J| > | mean|dq| . k_J | + | q . mean|dk_J| |, dq and dk_J being tokens less their block's mean. Without gains R = sum of p over
    critical blocks and words is all that is done, the isolated-pooling half of the method.

    Departures: a block that is only words does not exist, whatever the text's length; n_J is the block's own length where the code has 128.
    The code's neighbours on a space-filling curve, which are always critical, are left out. InterventionError for causal attention, in
    which a block's mean query would know later rows.
    """

    mass: float = 0.5
    top: int = 1
    block: int = 128
    gains: bool = True

    site: ClassVar[Site] = "P"
    folds: ClassVar[bool] = True
    always_written: ClassVar[tuple[str, ...]] = ("mass", "top", "block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= _number("mass", self.mass) <= 1.0:
            raise refusal(InterventionError, f"mass={self.mass}", "it is a share of the row", "pass a number from 0 to 1")
        for name in ("top", "block"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise refusal(InterventionError, f"{name}={value!r}", "it counts from 1", f"pass {name}=1 or more")
        if not isinstance(self.gains, bool):
            raise refusal(InterventionError, f"gains={self.gains!r}", "it is a switch", "pass gains=True or False")

    def bind(self, scope: Scope) -> RectifiedSparse:
        """A copy that knows its heads by module; InterventionError for a model that is no diffusion transformer."""
        if scope.host.kind != "diffusers":
            given, why = "RectifiedSparse", f"{scope.name} has no stream of image tokens that sees itself both ways"
            raise refusal(InterventionError, given, why, "use it on a diffusion transformer; RescaledPattern is for text")
        return super().bind(scope)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Image rows as above; the very output where there is a single block, which is critical."""
        refuse_gradients(output, "RectifiedSparse")
        mask = call.mask
        plain = mask.window is None and mask.query_segments is None and mask.allowed is None and mask.bias is None
        if mask.causal or not plain or call.is_cross:
            given, why = f"RectifiedSparse in {call.module}", "its rows do not all see the same keys, so a block has no mean query"
            raise refusal(InterventionError, given, why, "use it on a diffusion transformer's self- or joint attention")
        first, end = spans(call)["image"]
        if end - first <= self.block:
            return output
        sub = select_heads(call, heads)
        p, critical, told = self.estimate(sub, first, end)
        lengths = _lengths(end - first, self.block, output.device)
        of_row = torch.arange(len(lengths), device=output.device).repeat_interleave(lengths)  # image row -> block
        z_sparse = self._sparse(sub, critical, of_row, first, end)
        rest = torch.where(told, p[..., :-1], torch.zeros_like(p[..., :-1]))  # [B, h, I, J]
        assert sub.v is not None
        v = _means(sub.v[:, :, first:end].to(p.dtype), self.block).repeat_interleave(sub.group, 1)
        more = (rest @ v)[:, :, of_row]
        factor = (1.0 - rest.sum(-1))[:, :, of_row, None] if self.gains else _kept(p, critical)[:, :, of_row, None]
        new = output[:, :, heads].to(p.dtype).clone()
        new[:, first:end] = (factor * z_sparse + more).transpose(1, 2)
        Fold.of(call).close(heads, "RectifiedSparse")
        inside = torch.zeros(1, call.q.shape[2], dtype=torch.bool, device=output.device)
        inside[:, first:end] = True
        return merged(output, heads, inside if rows is True else rows & inside, new)

    def estimate(self, sub: AttentionCall, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(p [B, h, I, J + 1], the last column all words together; critical and told by their means [B, h, I, J] bool)."""
        dtype = torch.float64 if sub.q.dtype == torch.float64 else torch.float32
        q, k = sub.q[:, :, first:end].to(dtype), sub.k[:, :, first:end].to(dtype)
        words = torch.cat([sub.k[:, :, :first], sub.k[:, :, end:]], 2).to(dtype)
        valid = sub.mask.key_valid
        hidden = None if valid is None else ~torch.cat([valid[:, :first], valid[:, end:]], 1)
        group, lengths = sub.group, _lengths(end - first, self.block, q.device)
        q_mean = _means(q, self.block)
        k_mean = _means(k, self.block).repeat_interleave(group, 1)
        products = q_mean @ k_mean.transpose(-1, -2)
        blocks = products * sub.scale + lengths.to(dtype).log()
        text = q_mean @ words.repeat_interleave(group, 1).transpose(-1, -2) * sub.scale
        if hidden is not None:
            text = text.masked_fill(hidden[:, None, None], -math.inf)
        every = torch.cat([blocks, torch.logsumexp(text, -1, keepdim=True)], -1)
        p = torch.softmax(every, -1)
        ranked, order = torch.sort(p, dim=-1, descending=True, stable=True)
        count = ((ranked.cumsum(-1) <= float(self.mass)).sum(-1, keepdim=True) + 1).clamp_min(self.top)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, torch.arange(p.shape[-1], device=p.device) < count)
        critical = chosen[..., :-1]
        if not self.gains:
            return p, critical, torch.zeros_like(critical)
        dq = _means((q - _spread(q_mean, lengths)).abs(), self.block)
        dk = _means((k - _spread(_means(k, self.block), lengths)).abs(), self.block).repeat_interleave(group, 1)
        wrong = (dq @ k_mean.transpose(-1, -2)).abs() + (q_mean @ dk.transpose(-1, -2)).abs()
        return p, critical, (products.abs() > wrong) & ~critical

    def _sparse(self, sub: AttentionCall, critical: Tensor, of_row: Tensor, first: int, end: int) -> Tensor:
        """[B, h, image rows, Dv]: the softmax over critical blocks and all words, by sums given the full rows' lse."""
        rows = torch.arange(first, end, device=of_row.device)
        blocks = torch.full((sub.k.shape[2],), -1, dtype=torch.int64, device=of_row.device)
        blocks[first:end] = of_row

        def log_factor(scores: Tensor, part: Tensor, keys: Tensor) -> Tensor:
            own, at = of_row[part - first], blocks[keys]
            seen = critical[:, :, own][..., at.clamp_min(0)] | (at < 0)
            return torch.where(seen, torch.zeros_like(scores), torch.full_like(scores, -math.inf))

        # rows of an image are real tokens, so none of them is empty: the row's own words and first block are always among the keys
        mass, total = partial_attention(
            sub, row_lse(replace(sub, mask=replace(sub.mask, query_valid=None))), None, log_factor=log_factor, rows=rows
        )
        return total / mass.clamp_min(torch.finfo(mass.dtype).tiny)[..., None]

    def algebra(self) -> str:
        """It computes rows anew."""
        return "rectified"

    def what(self) -> str:
        """In words."""
        told = ", tell the others by their means where these say more than they get wrong," if self.gains else ""
        return (
            f"attend to the words and the blocks of {self.block} image tokens that reach {self.mass:.0%} of a pooled estimate{told} "
            "and scale rows back to their size"
        )

    def cost(self) -> str:
        """In words."""
        return "the full kernel, and attention of these heads once more in blocks of rows, O(N d) memory"


def _lengths(count: int, block: int, device: torch.device) -> Tensor:
    """[blocks] tokens of each."""
    starts = torch.arange(0, count, block, device=device)
    return (count - starts).clamp_max(block)


def _means(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, blocks, D]."""
    return torch.stack([part.mean(2) for part in x.split(block, 2)], 2)


def _spread(means: Tensor, lengths: Tensor) -> Tensor:
    """[B, H, blocks, D] -> [B, H, N, D]."""
    return means.repeat_interleave(lengths, 2)


def _kept(p: Tensor, critical: Tensor) -> Tensor:
    """[B, h, I]: p of critical blocks and of the words."""
    return torch.where(critical, p[..., :-1], torch.zeros_like(p[..., :-1])).sum(-1) + p[..., -1]


__all__ = ["RectifiedSparse"]

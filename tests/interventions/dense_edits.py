"""The dense twin of every primitive: the whole matrix A in float64, edited entry by entry as its definition says, times v."""

from __future__ import annotations

import math

import torch

from headscope.kernels.naive import naive_scores


class Dense:
    """Scores and weights [B, H, Nq, Nk] of one call; edits change `scores` (then `weigh` again) or `a`, for some heads and rows."""

    def __init__(self, call):
        self.call = call
        self.scores, self.visible = naive_scores(call)
        self.sinks = None if call.sink_logits is None else call.sink_logits.double()
        self.v = call.v.double().nan_to_num().repeat_interleave(call.group, 1)
        self.a = torch.zeros_like(self.scores)
        self.weigh()

    def weigh(self):
        top = torch.exp(self.scores)
        total = top.sum(-1, keepdim=True)
        if self.sinks is not None:
            sinks = self.sinks if self.sinks.dim() == 4 else self.sinks[None, :, None, None].expand(*total.shape)
            self.sinks = sinks
            total = total + torch.exp(sinks)
        self.a = torch.where(total > 0, top / total, 0.0)

    @property
    def output(self):
        """[B, Nq, H, Dv]"""
        return (self.a @ self.v).transpose(1, 2)

    @property
    def counts(self):
        """[B, Nq, H] rows that are real and see a key."""
        valid = self.call.mask.query_valid
        seen = self.visible.any(-1)
        return (seen if valid is None else seen & valid[:, None]).transpose(1, 2)

    def where(self, heads, rows):
        """[B, H, Nq, 1] bool of what is edited."""
        out = torch.zeros(*self.scores.shape[:3], 1, dtype=torch.bool)
        out[:, heads] = True if rows is True else rows[:, None, :, None].expand(out.shape[0], len(heads), -1, 1)
        return out

    def members(self, keys):
        """[B, H, 1, Nk] bool of a key set [Nk] or [B, Nk]."""
        keys = keys[None] if keys.dim() == 1 else keys
        return keys[:, None, None, :].expand(self.scores.shape[0], self.scores.shape[1], 1, -1)

    # ---- scores -----------------------------------------------------------------------------------------------------------

    def add(self, heads, bias, rows=True):
        self.scores = torch.where(self.where(heads, rows), self.scores + bias, self.scores)
        self.weigh()
        return self

    def boost(self, heads, keys, factor, rows=True):
        seen = self.scores.masked_fill(~self.visible, 0.0)
        return self.add(heads, torch.where(self.members(keys) & self.visible, factor * seen.abs(), 0.0), rows)

    def cool(self, heads, tau, rows=True):
        where = self.where(heads, rows)
        self.scores = torch.where(where, self.scores / tau, self.scores)
        if self.sinks is not None:
            self.sinks = torch.where(where, self.sinks / tau, self.sinks)
        self.weigh()
        return self

    # ---- weights ----------------------------------------------------------------------------------------------------------

    def redistribute(self, heads, source, target, keep, rows=True, epsilon=1e-12):
        a, where = self.a.clone(), self.where(heads, rows)
        source = self.members(source)
        target = ~source if target is None else self.members(target)
        m_s, m_t = (self.a * source).sum(-1, keepdim=True), (self.a * target).sum(-1, keepdim=True)
        a = torch.where(source, self.a * keep, a)
        a = torch.where(target, self.a * (1 + (1 - keep) * m_s / m_t.clamp_min(epsilon)), a)
        self.a = torch.where(where & (m_t >= epsilon), a, self.a)
        return self

    def mix(self, heads, pattern, u, rows=True):
        call = self.call
        t = torch.arange(call.q.shape[2]) + call.query_offset
        s = torch.arange(call.k.shape[2]) + call.key_offset
        if pattern == "identity":
            p = (t[:, None] == s[None, :]).double().expand_as(self.a)
        elif pattern == "uniform":
            p = self.visible.double() / self.visible.double().sum(-1, keepdim=True).clamp_min(1)
        elif pattern == "argmax":
            p = torch.nn.functional.one_hot(self.scores.argmax(-1), self.a.shape[-1]).double() * self.visible.any(-1, keepdim=True)
        else:
            valid = call.mask.query_valid
            valid = torch.ones(call.q.shape[0], call.q.shape[2], dtype=torch.bool) if valid is None else valid
            mean = torch.stack([(q[:, v].mean(1)) for q, v in zip(call.q, valid, strict=True)])
            from dataclasses import replace

            p = Dense(replace(call, q=mean[:, :, None].expand_as(call.q))).a
        self.a = torch.where(self.where(heads, rows), (1 - u) * self.a + u * p, self.a)
        return self

    def set_rows(self, heads, keys, weights, rows=True):
        p = torch.zeros(self.a.shape[-1], dtype=torch.float64)
        p[torch.tensor(keys) - self.call.key_offset] = torch.tensor(weights, dtype=torch.float64)
        self.a = torch.where(self.where(heads, rows), p.expand_as(self.a), self.a)
        return self

    def rescale(self, heads, factor, rows=True):
        factor = factor if isinstance(factor, float) else factor[None, None, :, None]
        self.a = torch.where(self.where(heads, rows), self.a * factor, self.a)
        return self


def close(got, dense: Dense, atol=1e-10):
    """AssertionError unless an output [B, Nq, H, Dv] equals the dense one on the rows that count."""
    keep = dense.counts[..., None]
    want = dense.output
    error = torch.where(keep, (got.double() - want).abs(), 0.0)
    assert bool(error.isfinite().all()), "not finite"
    assert float(error.max()) <= atol, float(error.max())
    assert math.isfinite(float(want.sum()))

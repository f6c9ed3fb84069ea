"""Random decode steps for the split-KV kernels, and the dense float64 computation that they are compared with."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from headscope.kernels.sparse_decode_host import NEVER, DecodeWork, KeyLists, Places, cut, decode


@dataclass(frozen=True)
class Step:
    """Everything of one decode step that the kernel is given, on one device."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rules: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    lists: KeyLists | None
    kept: torch.Tensor
    softcap: float | None
    sinks: torch.Tensor | None
    window: int | None
    valid: torch.Tensor | None
    work: DecodeWork
    ranges: bool

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def run(self, places: Places | None = None, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kernels give."""
        return decode(
            self.q, places or Places.of(self.k, self.v), self.rules, self.lengths, self.work, scale=self.scale, starts=self.starts,
            lists=self.lists, softcap=self.softcap, sink_logits=self.sinks, window=self.window, key_valid=self.valid, ranges=self.ranges,
            **more,
        )  # fmt: skip

    def seen(self) -> torch.Tensor:
        """[B, Hq, n, N] bool: the rules, said once more, key by key."""
        batch, heads, rows, _ = self.q.shape
        keys = self.k.shape[2]
        p = torch.arange(keys, device=self.q.device)
        t = self.lengths[:, None].long() - rows + torch.arange(rows, device=self.q.device)
        t, start = t[:, None, :, None], self.starts.long()[:, None, None, None]
        sink, window, since = (self.rules[..., i].long()[:, :, None, None] for i in range(3))
        out = (p < start + sink) | (t - p < window) | (p >= since) | self.kept[:, :, None, :]
        out = out & (p <= t) & (p >= start)
        if self.window is not None:
            out = out & (t - p < self.window)
        if self.valid is not None:
            out = out & self.valid[:, None, None, :keys]
        return out.expand(batch, heads, rows, keys)

    def exact(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention under `seen`, softmax and all in `dtype`."""
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.to(dtype).repeat_interleave(group, 1).nan_to_num(0.0) for x in (self.k, self.v))
        s = self.q.to(dtype) @ k.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        s = s.masked_fill(~self.seen(), -math.inf)
        lse = torch.logsumexp(s, -1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks.to(dtype)[None, :, None])
        w = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        return (w @ v).transpose(1, 2), lse


def step(seed: int, widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...], longest: int, device: str = "cpu") -> Step:
    """A step in which every option turns up, alone and together; what no head may read is NaN."""
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)
    width, dtype = rng.choice(widths), rng.choice(dtypes)
    batch, kv_heads, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 7))
    rows = rng.choice((1, 1, 1, 1, 2, 4))
    heads = group * kv_heads
    keys = rng.randint(rows + 1, longest)
    lengths = torch.tensor([keys] + [rng.randint(rows, keys) for _ in range(batch - 1)], dtype=torch.int32)
    starts = torch.tensor([rng.choice((0, 0, rng.randint(0, max(0, int(n) - rows)))) for n in lengths], dtype=torch.int32)

    def tensor(count: int, tokens: int) -> torch.Tensor:
        if rng.random() < 0.5:
            return torch.randn(batch, tokens, count, width, generator=gen).transpose(1, 2).to(dtype).to(device)
        return torch.randn(batch, count, tokens + 3, width, generator=gen)[:, :, 3:].to(dtype).to(device)

    q, k, v = tensor(heads, rows), tensor(kv_heads, keys), tensor(kv_heads, keys)
    for b in range(batch):
        k[b, :, int(lengths[b]) :] = v[b, :, int(lengths[b]) :] = math.nan
    each = rng.choice((1, batch))
    rules = torch.empty(each, heads, 3, dtype=torch.int32)
    for b in range(each):
        for h in range(heads):
            rules[b, h] = torch.tensor(
                rng.choice(
                    (
                        (0, NEVER, NEVER),
                        (rng.randint(0, 9), rng.randint(1, 40), NEVER),
                        (rng.randint(0, 3), 1, rng.randint(0, keys)),
                        (0, rng.randint(0, 4), NEVER),
                    )
                )
            )
    block = rng.choice((0, 0, 1, 1, 16, 32))
    kept = torch.zeros(batch, heads, keys, dtype=torch.bool)
    lists, ranges = None, True
    if block:
        share = rng.choice((0.05, 0.3, 0.8))
        tiles = -(-keys // block)
        chosen = torch.rand(batch, heads, tiles, generator=gen) < share
        kept = chosen.repeat_interleave(block, -1)[..., :keys]
        lists = lists_of(chosen, kv_heads, block, device)
        if rng.random() < 0.4:
            ranges = False
            rules = torch.tensor([0, 0, NEVER], dtype=torch.int32).expand(1, heads, 3).clone()
    valid = None
    if rng.random() < 0.2:
        valid = (torch.rand(batch, keys, generator=gen) < 0.8).to(device)
    visits = [keys if rng.random() < 0.5 else rng.randint(1, keys) for _ in range(kv_heads)]
    work = cut(visits, batch, torch.device(device), per_processor=rng.choice((1.0, 2.0, 5.0)), least=rng.choice((16, 64)))
    return Step(
        q, k, v, rules.to(device), lengths.to(device), starts.to(device), lists, kept.to(device), rng.choice((None, None, 3.0)),
        torch.randn(heads, generator=gen).to(device) if rng.random() < 0.3 else None,
        rng.randint(1, keys + 5) if rng.random() < 0.2 else None, valid, work, ranges,
    )  # fmt: skip


def lists_of(chosen: torch.Tensor, kv_heads: int, block: int, device: str) -> KeyLists:
    """KeyLists of chosen blocks [B, Hq, tiles] bool; unused room holds numbers that must not be read."""
    batch, heads, tiles = chosen.shape
    group = heads // kv_heads
    entries = torch.full((batch, kv_heads, tiles + 2), 1 << 20, dtype=torch.int32)
    bits = torch.full_like(entries, -1)
    counts = torch.zeros(batch, kv_heads, dtype=torch.int32)
    for b in range(batch):
        for g in range(kv_heads):
            own = chosen[b, g * group : (g + 1) * group]
            found = own.any(0).nonzero().flatten()
            counts[b, g] = len(found)
            entries[b, g, : len(found)] = found.to(torch.int32)
            bits[b, g, : len(found)] = (own[:, found] * (1 << torch.arange(group))[:, None]).sum(0).to(torch.int32)
    return KeyLists(entries.to(device), bits.to(device), counts.to(device), block)


def compare(one: Step, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Error against float64 at most a few times that of the same computation by rounding the exact result to the step's dtype."""
    out, lse = found
    exact, exact_lse = one.exact()
    unit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[one.q.dtype]  # about one rounding of the dtype
    assert torch.isfinite(out).all()
    assert torch.equal(torch.isinf(lse), torch.isinf(exact_lse))
    error = (out.double() - exact).abs()
    size = one.v.double().nan_to_num(0.0).abs().max()
    assert float(error.max()) <= unit * float(size), (float(error.max()), unit * float(size))
    live = torch.isfinite(exact_lse)
    assert float((lse.double() - exact_lse)[live].abs().max() if live.any() else 0.0) <= 1e-5 * max(
        1.0, float(exact_lse[live].abs().max()) if live.any() else 1.0
    )

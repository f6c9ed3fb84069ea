"""Random attention calls and requests for the Triton kernels, and the comparison with the dense float64 twin.

A variant fixes what the kernels compile in (width, dtype, mask facts, names); its shapes vary lengths, heads, offsets, strides and values.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.naive import naive_lse, naive_measure, naive_weights
from headscope.statistics.definitions import DEFINITIONS
from headscope.statistics.partial import PartialStatistics
from headscope.statistics.request import StatisticsRequest

ALL = tuple(DEFINITIONS)
NAME_SETS = (
    ALL,
    ("lse", "entropy", "row_max", "argmax", "distance", "distance_sq", "waad", "sink_mass", "local_mass", "column_sum", "sink_importance",
     "fai", "block_mass", "block_max"),
    ("entropy", "distance", "column_sum", "block_mass"),
    ("lse", "argmax", "class_mass", "sink_logit_mass", "diagonal_sum"),
    ("column_sum", "fai", "block_max", "segment_mass"),
    ("waad", "local_mass", "distance_sq", "pairs"),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Everything about a call that a kernel is compiled for."""

    seed: int
    width: int
    dtype: torch.dtype
    names: tuple[str, ...] = ALL
    causal: bool = True
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    padding: str = ""
    segments: str = ""
    allowed: bool = False
    bias: bool = False
    given: bool = False
    restrict: bool = False
    open_band: bool = False
    block: int = 16
    longest: int = 150

    def __str__(self) -> str:
        flags = [
            name for name in ("window", "softcap", "sinks", "allowed", "bias", "given", "restrict", "open_band") if getattr(self, name)
        ]
        flags += [x for x in (self.padding, self.segments) if x]
        kind = "causal" if self.causal else "bidirectional"
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([f"{self.seed}", dtype, f"d{self.width}", kind, *flags, f"b{self.block}", f"{len(self.names)}names"])


def random_variant(seed: int, widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...], longest: int) -> Variant:
    """A variant in which every option turns up, alone and together."""
    rng = random.Random(seed)
    exotic = rng.choice(("", "", "", "", "allowed", "bias"))
    padding = "" if exotic else rng.choice(("", "", "", "left", "right", "holes"))
    segments = "" if exotic or padding else rng.choice(("", "", "", "sorted", "unsorted"))
    return Variant(
        seed, rng.choice(widths), rng.choice(dtypes), rng.choice(NAME_SETS), causal=rng.random() < 0.7, window=rng.random() < 0.3,
        softcap=rng.random() < 0.2, sinks=rng.random() < 0.25, padding=padding, segments=segments, allowed=exotic == "allowed",
        bias=exotic == "bias", given=rng.random() < 0.35, restrict=rng.random() < 0.3, open_band=rng.random() < 0.3,
        block=rng.choice((16, 32, 64, 128, 256)), longest=longest,
    )  # fmt: skip


def make_case(variant: Variant, shape: int, device: str = "cpu") -> tuple[AttentionCall, StatisticsRequest]:
    """A call and a request of the variant: whole sequence, chunk after a cache, cropped cache, or a decode step."""
    rng = random.Random(1000 * variant.seed + shape)
    gen = torch.Generator().manual_seed(1000 * variant.seed + shape)
    batch, kv_heads, group = rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 2, 3))
    heads = kv_heads * group
    keys = rng.randint(3, variant.longest)
    kind = ("whole", "chunk", "cropped", "decode")[shape % 4] if not variant.segments else "whole"
    rows = {"whole": keys, "chunk": rng.randint(1, keys), "cropped": rng.randint(1, keys), "decode": 1}[kind]
    k_offset = rng.randint(1, 70) if kind == "cropped" else 0
    q_offset = k_offset + keys - rows
    length = k_offset + keys

    def tensor(count: int, tokens: int, scale: float) -> torch.Tensor:
        if rng.random() < 0.5:
            x = torch.randn(batch, tokens, count, variant.width, generator=gen).transpose(1, 2)
        else:
            x = torch.randn(batch, count, tokens + 3, variant.width, generator=gen)[:, :, 3:]
        return (x * scale).to(variant.dtype).to(device)

    q, k, v = tensor(heads, rows, rng.choice((0.3, 1.0, 3.0))), tensor(kv_heads, keys, 1.0), tensor(kv_heads, keys, 1.0)
    key_valid = query_valid = first = query_segments = key_segments = allowed = bias = None
    if variant.padding:
        key_valid = torch.ones(batch, keys, dtype=torch.bool)
        for b in range(batch):
            n = rng.randint(0, keys // 2)
            if variant.padding == "right":
                key_valid[b, keys - n :] = False
            else:
                key_valid[b, :n] = False
            if variant.padding == "holes":
                key_valid[b] &= torch.rand(keys, generator=gen) > 0.2
        query_valid = key_valid[:, keys - rows :].clone()
        first = k_offset + key_valid.to(torch.int8).argmax(1)
    if variant.segments:
        key_segments = torch.randint(0, 5, (batch, keys), generator=gen)
        if variant.segments == "sorted":
            key_segments = key_segments.sort(1).values
        query_segments = key_segments[:, keys - rows :].clone()
    if variant.allowed:
        allowed = torch.rand(rng.choice((1, batch)), rng.choice((1, heads)), rows, keys, generator=gen) > 0.4
    if variant.bias:
        bias = torch.randn(rng.choice((1, batch)), rng.choice((1, heads)), rows, keys, generator=gen)
        bias = torch.where(torch.rand(bias.shape, generator=gen) < 0.2, torch.finfo(torch.float32).min, bias)

    def at(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(device)

    mask = MaskFacts(
        variant.causal, rng.randint(1, keys) if variant.window else None, at(key_valid), at(query_valid),
        at(query_segments), at(key_segments), at(allowed), at(bias),
    )  # fmt: skip
    call = AttentionCall(
        "attention", 0, q, k, v, variant.width**-0.5, mask, softcap=rng.choice((2.0, 30.0)) if variant.softcap else None,
        sink_logits=at(torch.randn(heads, generator=gen) * 4) if variant.sinks else None, query_offset=q_offset, key_offset=k_offset,
        first_token=at(first),
    )  # fmt: skip
    if variant.given:
        call = replace(call, facts={"lse": naive_lse(call).to(torch.float32).to(device)})
    pairs = torch.randint(-1, length + 3, (2, batch, 40), generator=gen)
    band = rng.randint(0, 12)
    request = StatisticsRequest(
        variant.names, sink_tokens=rng.randint(1, 6), local_window=rng.randint(1, 40), waad_window=rng.randint(1, 20),
        fai_band=(band, None if variant.open_band else band + rng.randint(0, 50)), block=variant.block,
        labels=torch.randint(-1, 5, (length - length // 9,), generator=gen), label_names=("a", "b", "c", "d", "e"),
        segments=torch.arange(length) // 37, pairs={"some": (pairs[0], pairs[1])},
        rows=torch.rand(batch, length, generator=gen) < 0.6 if variant.restrict else None,
    )  # fmt: skip
    return call, request


def poisoned(call: AttentionCall) -> AttentionCall:
    """The call with NaN in its padded queries and keys: whatever padding holds must go nowhere."""
    q, k = call.q.clone(), call.k.clone()
    if call.mask.query_valid is not None:
        q[:, :, :, 0] = torch.where(call.mask.query_valid[:, None], q[:, :, :, 0], torch.nan)
    if call.mask.key_valid is not None:
        k[:, :, :, 0] = torch.where(call.mask.key_valid[:, None], k[:, :, :, 0], torch.nan)
    return replace(call, q=q, k=k) if call.mask.key_valid is not None else call


def tolerance(variant: Variant) -> float:
    """fp32: 1e-5. Half precision multiplies exactly and accumulates in float32 in the matrix unit, whose order is its own: 1e-4.
    A given lse is rounded to float32 once more, and so is a bias that is added to a score: 3e-5."""
    return 1e-4 if variant.dtype != torch.float32 else 3e-5 if variant.given or variant.bias else 1e-5


def compare(got: PartialStatistics, call: AttentionCall, request: StatisticsRequest, tol: float) -> float:
    """Asserts that every number equals the dense twin's, with the same NaN in the same places; returns the largest error."""
    want = naive_measure(call, request)
    worst = 0.0

    def same(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        nonlocal worst
        x = x.cpu().double()
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)} instead of {tuple(y.shape)}"
        assert torch.equal(x.isnan(), y.isnan()), f"{name}: NaN in {int(x.isnan().sum())} places instead of {int(y.isnan().sum())}"
        error = ((x - y).abs() / (y.abs() + 0.01)).nan_to_num(0.0)
        error = float(error.max()) if error.numel() else 0.0
        worst = max(worst, error)
        assert error <= tol, f"{name}: off by {error:.2e}, more than {tol:.0e}"

    for part in ("rows", "columns", "maps", "pairs"):
        mine, theirs = getattr(got, part), getattr(want, part)
        assert mine.keys() == theirs.keys(), f"{part}: {sorted(mine)} instead of {sorted(theirs)}"
        for name, y in theirs.items():
            if name != "argmax":
                same(name, mine[name], y)
    assert got.counts.keys() == want.counts.keys()
    for name, y in want.counts.items():
        assert torch.equal(got.counts[name].cpu(), y), name
    if want.diagonals is not None:
        assert got.diagonals is not None
        assert got.diagonal_start == want.diagonal_start
        same("diagonal_sum", got.diagonals, want.diagonals)
    if "argmax" in request.names:
        mine, theirs = got.rows["argmax"].cpu(), want.rows["argmax"]
        assert torch.equal(mine < 0, theirs < 0)
        # two keys within rounding of each other may trade places; the weight must still be the row's largest
        a = naive_weights(call)
        peak = a.gather(-1, (mine - call.key_offset).clamp(0, a.shape[-1] - 1)[..., None])[..., 0]
        assert bool(((peak >= a.amax(-1) * (1 - tol)) | (mine < 0)).all())
        if tol < 2e-5:
            assert (mine == theirs).float().mean() > 0.99
    return worst

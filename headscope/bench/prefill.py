"""Sparse prefill against its peers on one CUDA device: dense cuDNN and FlashAttention-2, FlexAttention under the same mask, and ours.

Everything is measured in one run on random bfloat16 inputs, as ratios; TFLOP/s count 4 N^2 D H / 2 for dense causal attention and the kept
share of the tiles of it for a sparse one, so that a kernel is not paid for what it skips. Each sparse output is compared with float64 on
sampled rows, under a mask written down here a second time. Where headscope would leave a call to the model's dense kernel, the row says so.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headscope.bench.capture_gpu import attention_inputs, milliseconds, sdpa
from headscope.errors import UnavailableError, refusal
from headscope.plans import Dense, Lines, Pattern, Streaming, TopBlocks, VerticalSlash

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.sparse_lists import TileLists

LENGTHS = (2048, 8192, 32768, 131072)
DENSITIES = (0.05, 0.1, 0.12, 0.15, 0.2, 0.5, 0.85)
SINK, WINDOW = 128, 1024
HEADS, WIDTH, TILE = 32, 128, 128
Mask = Callable[[int, "Tensor", "Tensor"], "Tensor"]
"""(head, rows [R, 1], keys [1, K]) -> what that head keeps, causality aside."""


@dataclass(eq=False)
class Case:
    """One sparse prefill: its name, how its lists are built, what it keeps, and the tiles of it for FlexAttention."""

    name: str
    lists: Callable[[], TileLists]
    mask: Mask
    state: Tensor
    flex_mask: Callable[..., Tensor]
    patterns: list[Pattern] | None = None
    density: float | None = None


def run(quick: bool = False) -> dict[str, Any]:
    """`headscope bench prefill`: every length and plan, as tables. `quick`: up to 32,768 tokens and three densities.

    Raises UnavailableError where there is no CUDA device or no Triton.
    """
    if not torch.cuda.is_available():
        why = "it compares kernels of a CUDA device, and there is none here"
        raise refusal(UnavailableError, "bench prefill", why, "run it on a machine with an NVIDIA GPU")
    lengths = (2048, 32768) if quick else LENGTHS
    densities = (0.1, 0.5, 0.85) if quick else DENSITIES
    dense: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    building: list[dict[str, Any]] = []
    for tokens in lengths:
        call = attention_inputs(tokens, HEADS, HEADS // 4, WIDTH)
        base = dense_rows(call, dense)
        for case in cases(call, densities):
            rows.append(sparse_row(call, case, base))
            torch.cuda.empty_cache()
        if tokens == max(lengths):
            building += building_rows(call, base)
        torch.cuda.empty_cache()
    shape = f"bfloat16, {HEADS} query heads, {HEADS // 4} key heads, head_dim {WIDTH}, causal, batch 1"
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": importlib.metadata.version("triton")},
        "tables": [
            _table("Targets", targets(rows, building), ("target", "tokens", "what", "ratio", "limit", "met")),
            _table(f"Dense ({shape})", dense, ("kernel", "tokens", "ms", "ratio", "tflops", "error")),
            _table("Sparse, against dense cuDNN and FlexAttention of the same run", rows, SPARSE_COLUMNS),
            _table("Building the indices of dynamic plans", building, ("plan", "tokens", "ms", "ratio", "gib", "kept")),
        ],
        "notes": [
            "kept: share of the causal tiles that are visited; tflops: 4 N^2 D H / 2 times that share, over the time",
            "rate: tflops against dense cuDNN's; error: relative, against float64 on sampled rows",
            "runs: what headscope does with such a call; dense where its kernel would be slower",
        ],
    }


SPARSE_COLUMNS = ("plan", "tokens", "kept", "ms", "ratio", "tflops", "rate", "flex_ms", "over_flex", "error", "runs")


def _table(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> dict[str, Any]:
    return {"title": title, "columns": list(columns), "rows": [{name: row.get(name) for name in columns} for row in rows]}


def work(tokens: int) -> float:
    """Floating-point operations of dense causal attention, as the tables count them."""
    return 4.0 * tokens * tokens * WIDTH * HEADS / 2


def dense_rows(call: AttentionCall, rows: list[dict[str, Any]]) -> float:
    """Adds the dense kernels at one length; ms of cuDNN's."""
    tokens = call.q.shape[2]
    repeats = 15 if tokens <= 32768 else 5
    base = 0.0
    for name in ("cudnn", "flash"):
        run = sdpa(call, name)
        ms = milliseconds(run, repeats)
        base = base or ms
        error = sampled_error(call, run().transpose(1, 2), lambda head, t, s: torch.ones_like(t - s, dtype=torch.bool))
        rows.append({
            "kernel": f"sdpa {name}", "tokens": tokens, "ms": round(ms, 3), "ratio": round(ms / base, 3),
            "tflops": round(work(tokens) / ms / 1e9), "error": error,
        })  # fmt: skip
    return base


def cases(call: AttentionCall, densities: tuple[float, ...]) -> list[Case]:
    """The plans of one length: random tiles per head, half the heads streaming, vertical-slash."""
    from headscope.kernels.sparse_dynamic import mask_lists
    from headscope.kernels.sparse_prefill import lists_for

    count = call.q.shape[2] // TILE
    made = []
    for density in densities:
        kept = random_tiles(count, density)

        def mask(head: int, t: Tensor, s: Tensor, kept: Tensor = kept) -> Tensor:
            return kept[head, t // TILE, s // TILE] | (t // TILE == s // TILE)

        number = torch.arange(count, device="cuda")
        before = number[None, :] < number[:, None]
        state = torch.where(before, kept * 2, 0) + torch.eye(count, dtype=torch.int64, device="cuda")
        name = f"random tiles, {density:.0%}"
        made.append(Case(name, partial(mask_lists, call, kept), mask, state.to(torch.uint8), _causal, density=density))
    patterns: list[Pattern] = [Streaming(SINK, WINDOW) if head % 2 else Dense() for head in range(HEADS)]
    half = Case(f"half streaming ({SINK}, {WINDOW})", partial(lists_for, call, patterns), _half, _half_state(count), _half_mod, patterns)
    lines: list[Pattern] = [vertical_lines(call.q.shape[2], head) for head in range(HEADS)]
    found = lists_for(call, lines)
    assert found.diagonals is not None
    assert found.marked is not None
    diagonals, marked = found.diagonals, found.marked

    def kept_lines(head: int, t: Tensor, s: Tensor) -> Tensor:
        return (diagonals[head, (t - s).clamp(min=0)] | marked[head, s]) != 0

    def flex_lines(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((diagonals[h, (q - k).clamp(min=0)] | marked[h, k]) != 0)

    slash = Case("vertical-slash", partial(lists_for, call, lines), kept_lines, _line_state(found), flex_lines, lines)
    return [*made, half, slash]


def random_tiles(count: int, density: float) -> Tensor:
    """[HEADS, count, count] bool: in each row so many of its causal tiles, at random, the diagonal one among them."""
    generator = torch.Generator(device="cuda").manual_seed(count)
    number = torch.arange(count, device="cuda")
    score = torch.rand(HEADS, count, count, generator=generator, device="cuda")
    score = score.masked_fill(number[None, :] > number[:, None], -1.0)
    score[:, number, number] = 2.0
    rank = score.argsort(dim=-1, descending=True).argsort(dim=-1)
    return rank < (density * (number + 1)).round().clamp(min=1)[:, None]


def vertical_lines(tokens: int, head: int) -> Lines:
    """What vertical-slash heads come to: a column in 128, a window of 1,024, and eight bands of 128 diagonals further back."""
    generator = torch.Generator().manual_seed(head)
    columns = torch.randperm(tokens, generator=generator)[: tokens // 128].sort().values
    bands = torch.randint(0, tokens, (8,), generator=generator)[:, None] + torch.arange(128)
    diagonals = torch.cat([torch.arange(WINDOW), bands.flatten()]).unique()
    return Lines(tuple(columns.tolist()), tuple(diagonals[diagonals < tokens].tolist()))


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _half(head: int, t: Tensor, s: Tensor) -> Tensor:
    near: Tensor = (s < SINK) | (t - s < WINDOW)
    return near if head % 2 else torch.ones_like(near)


def _half_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & ((h % 2 == 0) | (k < SINK) | (q - k < WINDOW))


def _half_state(count: int) -> Tensor:
    """[HEADS, count, count] uint8: 0 nothing kept, 1 some, 2 all, of dense even and streaming odd heads."""
    number = torch.arange(count, device="cuda")
    back = TILE * (number[:, None] - number[None, :])
    some = (back - TILE + 1 < WINDOW) | (TILE * number < SINK)[None, :]
    whole = (back + TILE - 1 < WINDOW) | (TILE * (number + 1) <= SINK)[None, :]
    near = torch.where(whole, 2, some.long())
    both = torch.stack([torch.full_like(near, 2), near])
    both = torch.where(back > 0, both, torch.where(back == 0, both.clamp(max=1), 0))
    return both.to(torch.uint8).repeat(HEADS // 2, 1, 1)


def _line_state(lists: TileLists) -> Tensor:
    """[HEADS, count, count] uint8 of fixed diagonals and columns."""
    from headscope.kernels.sparse_states import gap_states

    assert lists.diagonals is not None
    assert lists.marked is not None
    gap = gap_states(lists.diagonals)
    count = gap.shape[1]
    number = torch.arange(count, device="cuda")
    back = number[:, None] - number[None, :]
    column = lists.marked.unflatten(1, (count, TILE)).any(2)
    state = torch.maximum(gap[:, back.clamp(min=0)], column[:, None, :].to(torch.uint8))
    return torch.where(back >= 0, torch.where(back == 0, state.clamp(max=1), state), 0).to(torch.uint8)


def sparse_row(call: AttentionCall, case: Case, base: float) -> dict[str, Any]:
    """One plan at one length: ours, FlexAttention, their ratio to dense, and the error."""
    from headscope.kernels.sparse_dispatch import worth_it
    from headscope.kernels.sparse_prefill import gluon_prefill, gluon_supports, triton_prefill

    tokens = call.q.shape[2]
    repeats = 15 if tokens <= 32768 else 5
    lists = case.lists()
    backend = "triton" if gluon_supports(call, case.patterns or []) else "gluon"
    kernel = triton_prefill if backend == "triton" else gluon_prefill
    output, _ = kernel(call, case.patterns or [], lists)
    error = sampled_error(call, output, case.mask)
    ms = milliseconds(lambda: kernel(call, case.patterns or [], lists), repeats)
    count = tokens // TILE
    kept = float(lists.work[:, [2, 3, 5]].sum()) / (HEADS * count * (count + 1) / 2)
    reason = "" if case.patterns is None else worth_it(call, case.patterns)
    row: dict[str, Any] = {
        "plan": case.name, "tokens": tokens, "kept": round(kept, 4), "density": case.density, "ms": round(ms, 3),
        "ratio": round(ms / base, 3),
        "tflops": round(kept * work(tokens) / ms / 1e9), "rate": round(kept * base / ms, 3),
        "error": error, "runs": f"dense: {reason}" if reason else backend, "flex_ms": None, "over_flex": None,
    }  # fmt: skip
    flex = flex_attention(call, case)
    if isinstance(flex, str):
        row["flex_ms"] = flex
    else:
        flex_ms = milliseconds(flex, repeats)
        row |= {"flex_ms": round(flex_ms, 3), "over_flex": round(flex_ms / ms, 3)}
    return row


_compiled: dict[str, Any] = {}


def flex_attention(call: AttentionCall, case: Case) -> Callable[[], Tensor] | str:
    """FlexAttention compiled, with a BlockMask of the same tiles; or why there is none."""
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return chosen.sum(-1, dtype=torch.int32)[None], order[None]

    some, whole = listed(case.state == 1), listed(case.state == 2)
    mask = BlockMask.from_kv_blocks(*some, *whole, BLOCK_SIZE=TILE, mask_mod=case.flex_mask)
    if _compiled.get("for") != (call.q.shape[2], case.flex_mask):
        torch._dynamo.reset()  # past a number of shapes it would silently run without being compiled
        _compiled.update({"for": (call.q.shape[2], case.flex_mask), "flex": torch.compile(flex, dynamic=False)})
    compiled = _compiled["flex"]
    value = call.v
    assert value is not None

    def run() -> Tensor:
        return compiled(call.q, call.k, value, block_mask=mask, scale=call.scale, enable_gqa=True)

    try:
        run()
        torch.cuda.synchronize()
    except RuntimeError as error:  # a peer that cannot run is a result
        torch.cuda.empty_cache()
        return f"{type(error).__name__}"
    return run


def building_rows(call: AttentionCall, base: float) -> list[dict[str, Any]]:
    """Choosing the keys of a dynamic plan of all heads on the device, with waiting for the device forbidden."""
    from headscope.kernels.sparse_prefill import lists_for

    tokens = call.q.shape[2]
    count = tokens // TILE
    rows = []
    for name, pattern in (
        ("vertical-slash (1000, 6096)", VerticalSlash(1000, 6096)),
        ("top tiles, pooled, 10 %", TopBlocks(share=0.1)),
        ("top tiles, pooled, 0.9 of the mass", TopBlocks(mass=0.9)),
        ("top tiles, antidiagonal, 10 %", TopBlocks(share=0.1, rule="antidiagonal")),
    ):
        patterns: list[Pattern] = [pattern] * HEADS
        lists = lists_for(call, patterns)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            lists = lists_for(call, patterns)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ms = milliseconds(partial(lists_for, call, patterns), 3)
        rows.append({
            "plan": name, "tokens": tokens, "ms": round(ms, 3), "ratio": round(ms / base, 4),
            "gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 2),
            "kept": round(float(lists.work[:, [2, 3, 5]].sum()) / (HEADS * count * (count + 1) / 2), 4),
        })  # fmt: skip
    return rows


@torch.no_grad()
def sampled_error(call: AttentionCall, output: Tensor, mask: Mask, rows: int = 24) -> float:
    """||out - exact|| / ||exact|| over sampled rows of every head, exact in float64. output [B, Nq, Hq, D]."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    tokens = call.q.shape[2]
    t = torch.randint(0, tokens, (rows,), generator=generator, device="cuda")
    t[0], t[1] = 0, tokens - 1
    s = torch.arange(tokens, device="cuda")[None, :]
    value = call.v
    assert value is not None
    wrong, size = 0.0, 0.0
    for head in range(call.q.shape[1]):
        k, v = call.k[0, head // call.group].double(), value[0, head // call.group].double()
        scores = call.q[0, head, t].double() @ k.T * call.scale
        seen = mask(head, t[:, None], s) & (s <= t[:, None])
        exact = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
        wrong += float((output[0, t, head].double() - exact).square().sum())
        size += float(exact.square().sum())
    return float(f"{(wrong / size) ** 0.5:.2e}")


def targets(rows: list[dict[str, Any]], building: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """S1 to S4 as measured: `ratio`, `limit`, and whether it is met; a limit that begins with >= is a least value."""
    out: list[dict[str, Any]] = []

    def add(target: str, tokens: int, what: str, ratio: float | None, limit: float, least: bool = False) -> None:
        met = ratio is not None and (ratio >= limit if least else ratio <= limit)
        out.append({
            "target": target, "tokens": tokens, "what": what, "ratio": ratio, "limit": f"{'>=' if least else '<='} {limit}",
            "met": "met" if met else "missed",
        })  # fmt: skip

    for row in rows:
        long = row["tokens"] >= 32768
        density = row["density"]
        if density is not None and density >= 0.1 and long:
            add("S1", row["tokens"], f"{row['plan']}: TFLOP/s / dense cuDNN's", row["rate"], 0.9, True)
            add("S1", row["tokens"], f"{row['plan']}: FlexAttention's time / ours", row["over_flex"], 1.2, True)
        if density == 0.85:
            add("S3", row["tokens"], f"{row['plan']}: time / dense cuDNN", row["ratio"], 1.0)
        if row["plan"].startswith("half") and row["tokens"] == 32768:
            add("S2", row["tokens"], f"{row['plan']}: time / dense cuDNN", row["ratio"], 0.55)
        if row["plan"].startswith("half") and row["tokens"] == 2048:
            fallback = row["runs"].startswith("dense")
            what = "left to the dense kernel" if fallback else "time / dense cuDNN"
            add("S2", row["tokens"], f"{row['plan']}: {what}", 1.0 if fallback else row["ratio"], 1.0)
    for row in building:
        if row["tokens"] == 131072:
            add("S4", row["tokens"], f"{row['plan']}: building / dense cuDNN", row["ratio"], 0.05)
    return out

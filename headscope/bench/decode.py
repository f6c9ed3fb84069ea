"""One decode step of attention on a CUDA device: dense peers (cuDNN, FlashAttention-2), FlexAttention under the same plan, and ours.

What a step costs depends on what lies in the L2 cache and on who launches it, so both are said: every way runs over several caches in turn,
as the layers of a model do, together larger than the L2 cache; "graph" is the time of a step in a captured CUDA graph, "plain" that of the
same calls launched one by one from Python. Ratios are to the peers of the same length and batch, by graph. Errors are against float64 under
the same mask, beside the error of cuDNN's dense step against its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import UnavailableError, refusal
from headscope.kernels.sparse_decode_host import LISTS_A_PROCESSOR, NEVER, DecodeWork, KeyLists, Places, cut, decode
from headscope.plans.cache_store import LayerStore
from headscope.plans.dynamic import TopKeys
from headscope.plans.execute_decode import Memory, call_step, choose_due, picked
from headscope.plans.execute_heads import Heads
from headscope.plans.patterns import Dense, Pattern, Streaming

if TYPE_CHECKING:
    from torch import Tensor

HEADS, KV_HEADS, WIDTH = 32, 8, 128
GROUP = HEADS // KV_HEADS
SINK, WINDOW = 128, 1024
SHARE = 0.1
TARGET_TOKENS = 131072
D1 = "D1: 2 of 8 KV heads full, 6 streaming"
D2 = "D2: 10 % of the keys by list, heads of a group alike"
D2_OWN = "D2: 10 % of the keys by list, every head its own"
COLUMNS = ["tokens", "batch", "way", "graph ms", "plain ms", "x cuDNN", "x FA2", "TB/s", "KV MiB", "KV share", "error"]
Step = Callable[[], "Tensor"]


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run a step: a callable per cache, bytes read per step (None: not counted), bytes of cache held, and what it sees [Hq, N]
    (None: all), or how to find out what the first cache's step saw just now.
    """

    name: str
    steps: list[Step]
    read: float | None
    held: float
    seen: Tensor | Callable[[], Tensor] | None = None


def graph_ms(steps: Sequence[Step], repeats: int = 7) -> float:
    """Median ms of one step in a CUDA graph of all of them."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(steps))
    return statistics.median(times)


def plain_ms(steps: Sequence[Step], repeats: int = 7) -> float:
    """Median ms of one step launched from Python, host and device together."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for step in steps:
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3 / len(steps))
    return statistics.median(times)


def run(
    lengths: Sequence[int] = (8192, 32768, 131072),
    batches: Sequence[int] = (1, 8),
    *,
    flex: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every way at every length and batch: {"tables", "notes", "targets", "device"}. Needs CUDA; minutes with FlexAttention, which is
    compiled anew for each of its rows and runs at the longest length only.
    """
    if not torch.cuda.is_available():
        raise refusal(
            UnavailableError, "headscope bench decode", "it compares kernels of a CUDA device, and there is none here", "run it on one"
        )
    rows: list[list[Any]] = []
    notes: list[str] = []
    targets: list[dict[str, Any]] = []
    for tokens in lengths:
        for batch in batches:
            try:
                found = _rows(tokens, batch, flex and batch == 1 and tokens == max(lengths), notes)
            except torch.OutOfMemoryError:
                notes.append(f"{tokens} tokens, batch {batch}: out of memory")
                torch.cuda.empty_cache()
                continue
            rows += found
            if batch == 1 and tokens == TARGET_TOKENS:
                targets = _targets(found)
            say(f"{tokens} tokens, batch {batch}: done")
    name = torch.cuda.get_device_name()
    title = f"decode, one query, Hq {HEADS}, Hkv {KV_HEADS}, head_dim {WIDTH}, bfloat16, {name}"
    notes += [f"{one['name']}: {one['measured']} ({one['target']}): {'pass' if one['pass'] else 'miss'}" for one in targets]
    return {"device": name, "tables": [{"title": title, "columns": COLUMNS, "rows": rows}], "notes": notes, "targets": targets}


def _rows(tokens: int, batch: int, flex: bool, notes: list[str]) -> list[list[Any]]:
    caches = _caches(tokens, batch)
    whole = 2.0 * batch * KV_HEADS * tokens * WIDTH * 2
    ways = _ways(caches, tokens, batch, whole, flex)
    rows: list[list[Any]] = []
    base: dict[str, tuple[float, float]] = {}
    for way in ways:
        try:
            steps = way.steps * -(-16 // len(way.steps))
            graph, plain = graph_ms(steps), plain_ms(steps)
            error = _error(way, caches[0])
        except (RuntimeError, ValueError) as error_:  # a peer that refuses a shape is a note, not the end of the bench
            notes.append(f"{way.name} at {tokens}, batch {batch}: {type(error_).__name__}: {str(error_).splitlines()[0][:120]}")
            continue
        base[way.name] = (graph, plain)
        ratio = [base[peer][0] / graph if peer in base else None for peer in ("dense, cuDNN", "dense, FlashAttention-2")]
        rows.append(
            [
                tokens,
                batch,
                way.name,
                graph,
                plain,
                *ratio,
                None if way.read is None else way.read / graph / 1e9,
                way.held / 2**20,
                way.held / whole,
                error,
            ]
        )
    return rows


def _targets(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """D1 and D2, from the rows of the length that they are stated for."""
    named = {row[2]: row for row in rows}
    out = []
    d1 = named.get(f"{D1}, freeing cache")
    if d1 is not None and d1[5] is not None:
        text = f"{d1[5]:.2f}x cuDNN, {d1[6] or 0:.2f}x FA2, KV memory {d1[9]:.3f}"
        out.append({"name": "D1", "measured": text, "target": ">= 3x dense, KV memory <= 0.3", "pass": bool(d1[5] >= 3 and d1[9] <= 0.3)})
    for name in (D2, D2_OWN):
        row = named.get(name)
        if row is not None and row[5] is not None:
            out.append(
                {
                    "name": name,
                    "measured": f"{row[5]:.2f}x cuDNN, {row[6] or 0:.2f}x FA2",
                    "target": ">= 5x dense",
                    "pass": bool(row[5] >= 5),
                }
            )
    return out


def _caches(tokens: int, batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of as many layers as exceed the L2 cache several times."""
    each = 4.0 * batch * KV_HEADS * tokens * WIDTH
    count = max(2, min(16, int(512 * 2**20 / each)))
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16)

    return [(random(HEADS, 1), random(KV_HEADS, tokens), random(KV_HEADS, tokens)) for _ in range(count)]


def _sdpa(caches: list[tuple[Tensor, Tensor, Tensor]], name: str) -> list[Step]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Step:
        def run_one() -> Tensor:
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return run_one

    return [step(*one) for one in caches]


def _rule(pattern: Pattern | None) -> tuple[int, int, int]:
    """(sink, window, since); None: a list says all."""
    if isinstance(pattern, Streaming):
        return pattern.sink, pattern.window, NEVER
    return (0, 0, NEVER) if pattern is None else (0, NEVER, NEVER)


def _rules(patterns: Sequence[Pattern | None]) -> Tensor:
    """[1, Hq, 3] of one pattern per key head."""
    return torch.tensor([[_rule(one) for one in patterns for _ in range(GROUP)]], dtype=torch.int32, device="cuda")


def random_lists(tokens: int, batch: int, block: int, alike: bool, share: float = SHARE) -> tuple[KeyLists, Tensor]:
    """Lists of `share` of the keys of every query head, drawn anew per head or once per group, and what they keep, [Hq, N] bool."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    count = tokens // block
    keep = int(count * share)
    drawn = KV_HEADS if alike else HEADS
    order = torch.rand(drawn, count, generator=generator, device="cuda").argsort(-1)[:, :keep]
    member = torch.zeros(drawn, count, dtype=torch.bool, device="cuda").scatter_(1, order, True)
    member = member.repeat_interleave(GROUP, 0) if alike else member
    weights = 1 << torch.arange(GROUP, device="cuda")
    bits = (member.view(KV_HEADS, GROUP, count) * weights[None, :, None]).sum(1).to(torch.int32)
    lengths = [int(one) for one in (bits != 0).sum(-1)]
    entries = torch.zeros(KV_HEADS, max(lengths), dtype=torch.int32, device="cuda")
    own = torch.zeros_like(entries)
    for head, length in enumerate(lengths):
        found = bits[head].nonzero().flatten()
        entries[head, :length], own[head, :length] = found.to(torch.int32), bits[head, found]
    counts = torch.tensor([lengths], dtype=torch.int32, device="cuda")
    stacked = [x[None].expand(batch, *x.shape).contiguous() for x in (entries, own)]
    lists = KeyLists(stacked[0], stacked[1], counts.expand(batch, -1).contiguous(), block)
    return lists, member.repeat_interleave(block, -1)


def _ours(
    caches: list[tuple[Tensor, Tensor, Tensor]], places: list[Places], tokens: int, rules: Tensor, lists: KeyLists | None, work: DecodeWork
) -> list[Step]:
    batch = caches[0][0].shape[0]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")

    def step(q: Tensor, where: Places) -> Step:
        return lambda: decode(q, where, rules, lengths, work, scale=WIDTH**-0.5, lists=lists, ranges=lists is None)[0]

    return [step(q, where) for (q, _, _), where in zip(caches, places, strict=True)]


def _ways(caches: list[tuple[Tensor, Tensor, Tensor]], tokens: int, batch: int, whole: float, flex: bool) -> list[Way]:
    device = caches[0][0].device
    ways = [
        Way("dense, cuDNN", _sdpa(caches, "cudnn"), whole, whole),
        Way("dense, FlashAttention-2", _sdpa(caches, "flash"), whole, whole),
    ]
    plain = [Places.of(k, v) for _, k, v in caches]
    streaming, dense = Streaming(SINK, WINDOW), Dense()
    near = min(tokens, SINK + WINDOW)
    plans: list[tuple[str, list[Pattern]]] = [
        ("dense, ours", [dense] * KV_HEADS),
        (D1, [dense] * 2 + [streaming] * (KV_HEADS - 2)),
        ("streaming only", [streaming] * KV_HEADS),
    ]
    for name, patterns in plans:
        keys = [tokens if one == dense else near for one in patterns]
        rules = _rules(patterns)
        read = whole * sum(keys) / (tokens * KV_HEADS)
        seen = _seen([one for one in patterns for _ in range(GROUP)], tokens, device)
        ways.append(Way(name, _ours(caches, plain, tokens, rules, None, cut(keys, batch, device)), read, whole, seen))
        if name != "dense, ours":
            places, held = _freed(caches, tuple(one for one in patterns for _ in range(GROUP)))
            steps = _ours(caches, places, tokens, rules, None, cut(keys, batch, device))
            ways.append(Way(f"{name}, freeing cache", steps, read, held, seen))
    for name, block, alike in (
        (D2, 1, True),
        (D2_OWN, 1, False),
        ("10 % of the keys in blocks of 32, heads of a group alike", 32, True),
        ("10 % of the keys in blocks of 32, every head its own", 32, False),
        ("10 % of the keys in blocks of 64, every head its own", 64, False),
    ):
        lists, seen = random_lists(tokens, batch, block, alike)
        keys = [int(one) * block for one in lists.counts[0]]
        read = whole * sum(keys) / (tokens * KV_HEADS)
        rules = _rules([None] * KV_HEADS)
        work = cut(keys, batch, device, per_processor=LISTS_A_PROCESSOR)
        ways.append(Way(name, _ours(caches, plain, tokens, rules, lists, work), read, whole, seen))
        if name == D2_OWN:  # how fast so much can be read at all
            few = max(keys)
            part = [Places.of(k[:, :, :few], v[:, :, :few]) for _, k, v in caches]
            steps = _ours(caches, part, few, _rules([dense] * KV_HEADS), None, cut([few] * KV_HEADS, batch, device))
            seen = torch.arange(tokens, device=device).expand(HEADS, -1) < few
            ways.append(Way("dense, ours, over as many keys as these lists hold together", steps, whole * few / tokens, whole, seen))
    if flex:
        for name in (D1, D2):
            way = next(one for one in ways if one.name == name)
            if isinstance(way.seen, torch.Tensor):
                ways.append(Way(f"{name}: FlexAttention", _flex(caches, way.seen), way.read, whole, way.seen))
    if tokens >= 32768:
        ways += _choosing(caches, tokens, whole)
    return ways


def _choosing(caches: list[tuple[Tensor, Tensor, Tensor]], tokens: int, whole: float) -> list[Way]:
    """Steps that choose their keys themselves, at every step or at every eighth, as a plan in a model does."""
    keep = int(SHARE * tokens)
    ways = []
    for refresh in (1, 8):
        often = "every step" if refresh == 1 else f"every {refresh}th step"
        for what, pattern in (
            ("keys by exact scores", TopKeys(keep, refresh)),
            ("keys by exact scores, heads of a group together", TopKeys(keep, refresh, grouped=True)),
            ("keys in blocks of 32 by bounds", TopKeys(keep, refresh, block=32, estimate="bounds")),
            (
                "keys in blocks of 32 by bounds, heads of a group together",
                TopKeys(keep, refresh, block=32, estimate="bounds", grouped=True),
            ),
            ("keys in blocks of 32 by means, heads of a group together", TopKeys(keep, refresh, block=32, estimate="mean", grouped=True)),
        ):
            heads, memories = Heads([pattern] * HEADS), [Memory() for _ in caches]
            steps = [_choosing_step(caches[at], heads, memories[at], number + 1) for number in range(8) for at in range(len(caches))]
            seen = partial(_chosen, memories[0], tokens, caches[0][0].device)
            ways.append(Way(f"10 % of the {what}, chosen {often}", steps, None, whole, seen))
    return ways


def _choosing_step(cache: tuple[Tensor, Tensor, Tensor], heads: Heads, memory: Memory, number: int) -> Step:
    q, k, v = cache
    call = AttentionCall("bench", 0, q, k, v, WIDTH**-0.5, MaskFacts(causal=True), query_offset=k.shape[2] - 1)

    def run_one() -> Tensor:
        choose_due(call, heads, memory, number)
        made = picked(heads, memory, lambda layer: memory)
        return call_step(call, heads, memory.keys, memory, made)

    return run_one


def _chosen(memory: Memory, tokens: int, device: torch.device) -> Tensor:
    """[Hq, N] bool: what the heads of the first sequence chose last, and their windows."""
    out = torch.zeros(HEADS, tokens, dtype=torch.bool, device=device)
    for head in range(HEADS):
        columns, since = memory.row(head)
        out[head, columns[0][columns[0] >= 0].long()] = True
        out[head, int(since[0]) :] = True
    return out


def _seen(patterns: Sequence[Pattern], tokens: int, device: torch.device) -> Tensor:
    """[Hq, N] bool: what the last row sees."""
    row = torch.tensor([tokens - 1])
    keys = torch.arange(tokens)
    each = {one: one.visible(row, keys)[0] for one in dict.fromkeys(patterns)}
    return torch.stack([each[one] for one in patterns]).to(device)


def _freed(caches: list[tuple[Tensor, Tensor, Tensor]], patterns: tuple[Pattern, ...]) -> tuple[list[Places], float]:
    """The same keys in the stores of a freeing cache, and the memory that one of them takes by the allocator's count."""
    places, stores = [], []
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _, k, v in caches:
        store = LayerStore(patterns, KV_HEADS, None)
        store.append(k, v, None)
        stores.append(store)
    held = (torch.cuda.memory_allocated() - before) / len(caches)
    places = [store.places() for store in stores]
    return places, held


def _flex(caches: list[tuple[Tensor, Tensor, Tensor]], seen: Tensor) -> list[Step]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return seen[h, s]

    tokens = seen.shape[1]
    blocks = create_block_mask(mask, None, HEADS, 1, tokens, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Step:
        return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return [step(*one) for one in caches]


def _error(way: Way, cache: tuple[Tensor, Tensor, Tensor]) -> float:
    """Largest absolute error of the first cache's step against float64 under the same mask."""
    q, k, v = cache
    found = way.steps[0]().double()
    seen = way.seen() if callable(way.seen) else way.seen
    worst = 0.0
    for b in {0, 0 if callable(way.seen) else q.shape[0] - 1}:
        for head in range(HEADS):
            scores = (k[b, head // GROUP].double() @ q[b, head, 0].double()) * WIDTH**-0.5
            if seen is not None:
                scores = scores.masked_fill(~seen[head], float("-inf"))
            exact = torch.softmax(scores, 0) @ v[b, head // GROUP].double()
            worst = max(worst, float((found[b, 0, head] - exact).abs().max()))
    return worst

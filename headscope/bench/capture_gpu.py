"""What capturing costs on a CUDA device: the statistics kernels against fused attention, whole models against plain sdpa and eager.

Every number is a ratio to a peer measured in the same run; an absolute time says more about the machine than about the code. Times are
medians over CUDA events after a warm-up, on random inputs (a matrix unit runs faster on zeros), and memory is the allocator's peak.
`tune` is the sweep over launch parameters that filled `kernels/triton_launch.py`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.statistics.request import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.kernels.triton_launch import Tile

ROW_NAMES = ("lse", "entropy", "row_max", "argmax", "distance", "distance_sq", "waad", "sink_mass", "local_mass")
COLUMN_NAMES = ("column_sum", "sink_importance", "fai")
MAP_NAMES = ("block_mass", "block_max")
SWEEP_1 = "rows: attention output + every row statistic"
SWEEP_2 = "columns: sums, lse given"
SDPA, CAPTURED = "sdpa forward", "sdpa forward, every passive statistic captured"
EAGER = "eager forward, output_attentions=True"


def milliseconds(run: Callable[[], object], repeats: int = 7, warm: int = 2) -> float:
    """Median time that a call keeps the current device busy, in ms.

    The device first waits a few ms, so that the host is ahead of it and launch latency, which a model's other layers hide, stays out.
    """
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda._sleep(8_000_000)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def attention_inputs(tokens: int, heads: int = 32, kv_heads: int = 8, width: int = 128) -> AttentionCall:
    """A causal call of random bfloat16 q, k, v on the current CUDA device."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((1, n, tokens, width) for n in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return AttentionCall("bench", 0, q, k, v, width**-0.5, MaskFacts(True), kernel="sdpa")


def sdpa(call: AttentionCall, backend: str) -> Callable[[], Tensor]:
    """The call's attention output by one of torch's own kernels: "cudnn" or "flash"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
    assert call.v is not None
    value = call.v

    def run() -> Tensor:
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(
                call.q, call.k, value, is_causal=True, scale=call.scale, enable_gqa=True
            )

    return run


def kernel_rows(tokens: int, repeats: int = 7) -> list[dict[str, Any]]:
    """The statistics kernels against cuDNN's forward at one length: one dict per kernel with `ms` and `ratio`."""
    from headscope.kernels.triton_measure import attention, measure

    call = attention_inputs(tokens)
    peers = {"sdpa cudnn": sdpa(call, "cudnn"), "sdpa flash": sdpa(call, "flash")}
    given = given_lse(call)
    runs: dict[str, Callable[[], object]] = {
        **peers,
        SWEEP_1: lambda: attention(call, StatisticsRequest(ROW_NAMES)),
        "rows: attention output + lse": lambda: attention(call, StatisticsRequest(("lse",))),
        "rows: lse": lambda: measure(call, StatisticsRequest(("lse",))),
        "rows: every row statistic": lambda: measure(call, StatisticsRequest(ROW_NAMES)),
        "rows: every row statistic, lse given": lambda: measure(given, StatisticsRequest(ROW_NAMES)),
        SWEEP_2: lambda: measure(given, StatisticsRequest(("column_sum",))),
        "columns: sums, importance, fai, lse given": lambda: measure(given, StatisticsRequest(COLUMN_NAMES)),
        "columns: the same and both maps, lse given": lambda: measure(given, StatisticsRequest(COLUMN_NAMES + MAP_NAMES)),
        "every passive statistic, lse given": lambda: measure(given, StatisticsRequest()),
        "every passive statistic": lambda: measure(call, StatisticsRequest()),
    }
    times = {name: milliseconds(run, repeats) for name, run in runs.items()}
    base = times["sdpa cudnn"]
    return [{"kernel": name, "tokens": tokens, "ms": round(ms, 3), "ratio": round(ms / base, 3)} for name, ms in times.items()]


def given_lse(call: AttentionCall) -> AttentionCall:
    """The call with the lse that the host's own kernel would have returned."""
    from dataclasses import replace

    from headscope.kernels.triton_measure import measure

    return replace(call, facts={**call.facts, "lse": measure(call, StatisticsRequest(("lse",))).rows["lse"]})


def llama(layers: int, tokens: int, attention: str = "sdpa") -> Any:
    """A Llama-shaped model of 8B width with random bfloat16 weights on the current CUDA device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=max(tokens, 4096), rope_theta=500000.0, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def model_rows(tokens: int, layers: int = 4, repeats: int = 3, eager: bool = True) -> list[dict[str, Any]]:
    """A whole model's forward with nothing captured, with everything passive captured, and eager with output_attentions.

    Wall time from the first launch until everything captured is on the CPU, with the self-check of the first calls that is on by default;
    peak memory of the allocator, weights included.
    """
    import headscope as hs

    model = llama(layers, tokens)
    scope = hs.Scope(model)
    ids = torch.randint(0, 32000, (1, tokens), device="cuda", generator=torch.Generator(device="cuda").manual_seed(0))

    def forward(**options: Any) -> object:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1, **options)

    def captured() -> object:
        with scope.observe() as stats:
            forward()
        return stats

    def eager_forward() -> object:
        model.set_attn_implementation("eager")
        try:
            return forward(output_attentions=True)
        finally:
            model.set_attn_implementation("sdpa")

    ways: dict[str, Callable[[], object]] = {SDPA: forward, CAPTURED: captured}
    if eager:
        ways[EAGER] = eager_forward
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        row: dict[str, Any] = {"forward": name, "tokens": tokens, "layers": layers}
        try:
            row |= _wall(way, repeats)
        except torch.OutOfMemoryError:
            row |= {"ms": None, "gib": None, "error": "out of memory"}
            torch.cuda.empty_cache()
        base = rows[0] if rows else row
        for key in ("ms", "gib"):
            row[f"{key}_ratio"] = None if row[key] is None else round(row[key] / base[key], 3)
        rows.append(row)
    return rows


def _wall(way: Callable[[], object], repeats: int) -> dict[str, float]:
    way()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        kept = way()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
        del kept
    return {"ms": round(statistics.median(times), 2), "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def run(lengths: Iterable[int] = (8192, 32768, 131072), layers: int = 4) -> dict[str, Any]:
    """`headscope bench capture` on a CUDA device: kernels and whole models at each length, as tables of ratios."""
    kernels: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    for tokens in lengths:
        kernels += kernel_rows(tokens, repeats=7 if tokens <= 32768 else 3)
        torch.cuda.empty_cache()
        models += model_rows(tokens, layers, eager=tokens <= 16384)
        torch.cuda.empty_cache()
    shape = "bfloat16, 32 query heads, 8 key heads, head_dim 128, causal"
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": importlib.metadata.version("triton")},
        "tables": [
            {
                "title": "Targets",
                "columns": ["target", "tokens", "what", "ratio", "limit", "met"],
                "rows": targets(kernels, models),
            },
            {
                "title": f"Kernels against cuDNN attention ({shape})",
                "columns": ["kernel", "tokens", "ms", "ratio"],
                "rows": kernels,
            },
            {
                "title": f"A Llama of 8B width, {layers} layers ({shape})",
                "columns": ["forward", "tokens", "ms", "ms_ratio", "gib", "gib_ratio"],
                "rows": models,
            },
        ],
        "notes": ["eager with output_attentions is run up to 16,384 tokens; beyond, its N x N matrices do not fit one device"],
    }


def targets(kernels: list[dict[str, Any]], models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """C1, C2 and C3 as measured: `ratio` to the peer of the same run, `limit` what it was to be at most.

    C1: the whole model captured at 131,072 tokens, time and peak memory against plain sdpa. C2: its time at 8,192. C3: sweep 1 (attention
    output and every row statistic) and the column sweep against cuDNN's attention, from 32,768 tokens on.
    """
    rows: list[dict[str, Any]] = []

    def add(target: str, tokens: int, what: str, ratio: float | None, limit: float) -> None:
        met = ratio is not None and ratio <= limit
        rows.append({"target": target, "tokens": tokens, "what": what, "ratio": ratio, "limit": limit, "met": met})

    for one in models:
        if one["forward"] == CAPTURED and one["tokens"] == 131072:
            add("C1", 131072, "captured forward / sdpa forward, time", one["ms_ratio"], 1.5)
            add("C1", 131072, "captured forward / sdpa forward, peak memory", one["gib_ratio"], 1.15)
        if one["forward"] == CAPTURED and one["tokens"] == 8192:
            add("C2", 8192, "captured forward / sdpa forward, time", one["ms_ratio"], 2.0)
    for one in kernels:
        limit = {SWEEP_1: 1.15, SWEEP_2: 0.55}.get(one["kernel"])
        if limit is not None and one["tokens"] >= 32768:
            add("C3", one["tokens"], f"{one['kernel']} / cuDNN attention", one["ratio"], limit)
    return rows


def tune(tokens: int, kernels: Iterable[str], tiles: Iterable[Tile], width: int = 128) -> list[dict[str, Any]]:
    """Times kernels over launch parameters; a tile that does not fit the device gives `ms` None and the reason."""
    from headscope.kernels.triton_launch import use_tile

    call = attention_inputs(tokens, width=width)
    base = milliseconds(sdpa(call, "cudnn"))
    given = given_lse(call)
    rows = []
    for kernel, tile in itertools.product(kernels, tiles):
        row: dict[str, Any] = {"kernel": kernel, "tokens": tokens, "tile": tuple(tile), "cudnn_ms": round(base, 3)}
        name, run = tuning_run(kernel, call, given)
        try:
            with use_tile(name, tile):
                ms = milliseconds(run, repeats=5)
            row |= {"ms": round(ms, 3), "ratio": round(ms / base, 3)}
        except Exception as error:  # an oversized tile fails in the compiler, the launcher or the driver, each with its own type
            row |= {"ms": None, "error": f"{type(error).__name__}: {error}"[:160]}
        rows.append(row)
    return rows


def tuning_run(kernel: str, call: AttentionCall, given: AttentionCall) -> tuple[str, Callable[[], object]]:
    """Launch-table name and a call of one kernel variant, by a short name."""
    from headscope.kernels.triton_measure import attention, measure

    table: dict[str, tuple[str, Callable[[], object]]] = {
        "lse": ("rows", lambda: measure(call, StatisticsRequest(("lse",)))),
        "rows": ("rows", lambda: measure(call, StatisticsRequest(ROW_NAMES))),
        "rows-no-argmax": ("rows", lambda: measure(call, StatisticsRequest(tuple(n for n in ROW_NAMES if n != "argmax")))),
        "given": ("rows", lambda: measure(given, StatisticsRequest(ROW_NAMES))),
        "out": ("out", lambda: attention(call, StatisticsRequest(("lse",)))),
        "out+rows": ("out", lambda: attention(call, StatisticsRequest(ROW_NAMES))),
        "columns": ("columns", lambda: measure(given, StatisticsRequest(("column_sum",)))),
        "columns+fai": ("columns", lambda: measure(given, StatisticsRequest(COLUMN_NAMES))),
        "columns+mass": ("columns", lambda: measure(given, StatisticsRequest((*COLUMN_NAMES, "block_mass")))),
        "columns+maps": ("columns", lambda: measure(given, StatisticsRequest(COLUMN_NAMES + MAP_NAMES))),
    }
    return table[kernel]

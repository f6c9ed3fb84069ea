"""What capturing costs on a CUDA device: the statistics kernels against fused attention, whole models against plain sdpa and eager.

Every number is a ratio to a peer measured in the same run; an absolute time says more about the machine than about the code. Times are
medians over CUDA events after a warm-up, on random inputs (a matrix unit runs faster on zeros), and memory is the allocator's peak.
`tune` is the sweep over launch parameters that filled `kernels/triton_launch.py`.
"""

from __future__ import annotations

import itertools
import statistics
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


def attention_inputs(tokens: int, heads: int = 32, kv_heads: int = 8, width: int = 128, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> AttentionCall:
    """A causal call of random q, k, v on the current CUDA device."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(batch, n, tokens, width, generator=generator, device="cuda", dtype=dtype) for n in (heads, kv_heads, kv_heads))
    return AttentionCall("bench", 0, q, k, v, width**-0.5, MaskFacts(True), kernel="sdpa")


def sdpa(call: AttentionCall, backend: str) -> Callable[[], Tensor]:
    """The call's attention output by one of torch's own kernels: "cudnn" or "flash"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
    assert call.v is not None
    value = call.v

    def run() -> Tensor:
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(call.q, call.k, value, is_causal=True, scale=call.scale, enable_gqa=True)

    return run


def kernel_rows(tokens: int, repeats: int = 7) -> list[dict[str, Any]]:
    """The statistics kernels against cuDNN's forward at one length: one dict per kernel with `ms` and `ratio`."""
    from headscope.kernels.triton_measure import attention, measure

    call = attention_inputs(tokens)
    peers = {"sdpa cudnn": sdpa(call, "cudnn"), "sdpa flash": sdpa(call, "flash")}
    given = given_lse(call)
    runs: dict[str, Callable[[], object]] = {
        **peers,
        "rows: attention output + lse": lambda: attention(call, StatisticsRequest(("lse",))),
        "rows: attention output + every row statistic": lambda: attention(call, StatisticsRequest(ROW_NAMES)),
        "rows: lse": lambda: measure(call, StatisticsRequest(("lse",))),
        "rows: every row statistic": lambda: measure(call, StatisticsRequest(ROW_NAMES)),
        "columns: sums": lambda: measure(given, StatisticsRequest(("column_sum",))),
        "columns: sums, fai": lambda: measure(given, StatisticsRequest(COLUMN_NAMES)),
        "columns: sums, fai, maps": lambda: measure(given, StatisticsRequest(COLUMN_NAMES + MAP_NAMES)),
        "both sweeps, every passive statistic": lambda: measure(call, StatisticsRequest()),
        "one pass given lse, every passive statistic": lambda: measure(given, StatisticsRequest()),
    }
    times = {name: milliseconds(run, repeats) for name, run in runs.items()}
    flops = 2 * tokens * tokens * call.q.shape[3] * call.q.shape[1]
    return [
        {"kernel": name, "tokens": tokens, "ms": round(ms, 3), "ratio": round(ms / times["sdpa cudnn"], 3), "dense_tflops": round(flops / ms / 1e9, 1)}
        for name, ms in times.items()
    ]  # fmt: skip


def given_lse(call: AttentionCall) -> AttentionCall:
    """The call with the lse that the host's own kernel would have returned."""
    from dataclasses import replace

    from headscope.kernels.triton_measure import measure

    return replace(call, facts={**call.facts, "lse": measure(call, StatisticsRequest(("lse",))).rows["lse"]})


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
        "fused": ("fused", lambda: measure(given, StatisticsRequest())),
        "fused-no-maps": ("fused", lambda: measure(given, StatisticsRequest(ROW_NAMES + COLUMN_NAMES))),
    }
    return table[kernel]

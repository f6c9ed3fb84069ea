"""A whole profile written to disk at full length: how long, how large, how much memory, and whether what is read back is right.

The model is a Llama of random weights, since time and size do not depend on what the heads do; on a CUDA device it has the width of an 8B
model. One profile runs as a user's would: every passive probe that needs no sentences, the shown text's statistics and maps of every head,
and q and k of the layers asked for, each layer written as the model leaves it. Then the run is opened and read as a dashboard reads it, and
checked against numbers that the pyramid, the statistics and the stored lse did not make.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.errors import DataError, refusal
from headscope.probes import PASSIVE
from headscope.store import Run

PARTS = ("maps.zarr", "qk.zarr", "statistics.safetensors", "heads.parquet", "tokens.json", "card.json")


def run(
    out: Path,
    *,
    tokens: int,
    layers: int,
    device: str,
    keep: Sequence[int] | str | None = (0,),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the run `out` and returns seconds, bytes and checks as tables. DataError for sizes that are none; RunError as `profile`."""
    import headscope as hs

    for name, value in (("tokens", tokens), ("layers", layers)):
        if value < (4096 if name == "tokens" else 1):
            raise refusal(DataError, f"{name}={value}", "there is nothing to measure", "pass 4,096 tokens and 1 layer at least")
    model = _llama(tokens, layers, device)
    scope = hs.Scope(model, name=f"Llama of random weights, {layers} layers")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (tokens,), generator=generator)
    plain = [_forward_seconds(model, ids) for _ in range(2)][-1]  # the first one warms up
    probes = [name for name in PASSIVE if name != "receiver"]  # random ids have no sentences
    scope.profile(probes, context=1024, data=ids[:1024], progress=False)  # kernels compile here
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    profile = scope.profile(probes, context=tokens, data=ids, keep=keep, out=out, overwrite=overwrite, progress=False)
    total = time.perf_counter() - began
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    opened = hs.store.open_run(out)
    sizes = _sizes(opened)
    card = profile.card.seconds
    config = model.config
    seconds = [
        {"step": "forward of the text, nothing captured", "seconds": round(plain, 3)},
        *({"step": name.replace("_", " "), "seconds": round(value, 3)} for name, value in card.items() if name != "total"),
        {"step": "whole profile, written and flushed", "seconds": round(total, 3)},
    ]
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "versions": {"torch": torch.__version__},
        "model": {
            "layers": layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "tokens": tokens,
        "host_peak_gib": round(host / 2**30, 2),
        "device_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.startswith("cuda") else None,
        "checks": _checks(opened),
        "reads": _reads(opened),
        "tables": [
            {"title": f"Time of a profile of {tokens} tokens", "columns": ["step", "seconds"], "rows": seconds},
            {"title": "Size of the run", "columns": ["part", "files", "mib"], "rows": sizes},
        ],
        "notes": [],
    }


def _llama(tokens: int, layers: int, device: str) -> Any:
    """8B width on CUDA, a small one on a CPU; random weights."""
    if device.startswith("cuda"):
        from headscope.bench.capture_gpu import llama

        return llama(layers, tokens)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=tokens, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _forward_seconds(model: Any, ids: torch.Tensor) -> float:
    cuda = model.device.type == "cuda"
    given = ids[None].to(model.device)
    began = time.perf_counter()
    with torch.no_grad():
        model(given, use_cache=False, logits_to_keep=1)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _sizes(run: Run) -> list[dict[str, Any]]:
    files = run.card.files
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        inside = [name for name in files if name == part or name.startswith(f"{part}/")]
        size = sum(int(files[name]["bytes"]) for name in inside)
        if part == "card.json":
            inside, size = [part], (run.path / part).stat().st_size
        if inside:
            rows.append({"part": part, "files": len(inside), "mib": round(size / 2**20, 1)})
    return [*rows, {"part": "all", "files": sum(row["files"] for row in rows), "mib": round(sum(row["mib"] for row in rows), 1)}]


def _places(run: Run, side: int, count: int = 8) -> list[tuple[int, int, int, int]]:
    """Windows (layer, head, first query, first key) of the kept layers, spread over the triangle."""
    info = run.maps
    assert info is not None
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        layer = int(rng.choice(run.kept_layers))
        head = int(rng.integers(run.kept_layer(layer).heads))
        q0 = int(rng.integers(side, info.tokens - side + 1))
        out.append((layer, head, q0, int(rng.integers(0, q0 - side + 1))))
    return out


def _checks(run: Run) -> dict[str, float]:
    """Largest deviations: a tile row's mass from its number of rows, windows from a softmax over whole rows, map cells from windows."""
    info = run.maps
    assert info is not None
    worst = 0.0
    for layer in run.layers:
        for head in range(0, run.heads_per_layer, max(run.heads_per_layer // 4, 1)):
            for level in range(len(info.sizes)):
                mass = sum(run.tile("block_mass", level, layer, head, 0, j).sum(1, dtype=np.float64) for j in range(info.tiles(level)))
                first = np.arange(len(mass)) * info.block * 2**level
                count = np.minimum(info.block * 2**level, info.tokens - first)
                worst = max(worst, float(np.abs(mass / count - 1).max()))
    out = {"mass_of_a_row_of_tiles_against_its_rows": worst}
    if run.kept_layers:
        windows, cells = 0.0, 0.0
        for layer, head, q0, k0 in _places(run, info.block):
            q0, k0 = q0 // info.block * info.block, k0 // info.block * info.block
            side = min(info.block, info.tokens - q0)
            found = run.window(layer, head, q0, q0 + side, k0, k0 + info.block)
            expected = _whole_rows(run, layer, head, q0, q0 + side)[:, k0 : k0 + info.block]
            windows = max(windows, float(np.abs(found - expected).max() / expected.max()))
            mass = run.map("block_mass", layer, head)[q0 // info.block, k0 // info.block]
            cells = max(cells, abs(float(found.sum(dtype=np.float64)) / float(mass) - 1))
        out |= {"windows_against_a_softmax_over_whole_rows": windows, "map_cells_against_windows": cells}
    return out


def _whole_rows(run: Run, layer: int, head: int, q0: int, q1: int) -> np.ndarray:
    """Rows of A in float64 from the stored q and k alone: [q1 - q0, N], normalised by their own sum."""
    kept = run.kept_layer(layer)
    group = kept.heads // kept.kv_heads
    q, k = (torch.from_numpy(np.ascontiguousarray(part)) for part in (kept.q[head, q0:q1], kept.k[head // group]))
    if kept.facts.dtype == "bfloat16":
        q, k = q.view(torch.bfloat16), k.view(torch.bfloat16)
    score = q.double() @ k.double().T * kept.facts.scale
    hidden = torch.arange(score.shape[1])[None] > torch.arange(q0, q1)[:, None]
    rows: np.ndarray = score.masked_fill(hidden, -torch.inf).softmax(-1).numpy()
    return rows


def _reads(run: Run) -> dict[str, float]:
    """Median milliseconds of what a dashboard reads, each from a freshly opened run's second read on."""
    info = run.maps
    assert info is not None
    rng = np.random.default_rng(1)

    def tile() -> object:
        i = int(rng.integers(info.tiles(0)))
        layer, head = int(rng.choice(run.layers)), int(rng.integers(run.heads_per_layer))
        return run.tile("block_mass", 0, layer, head, i, int(rng.integers(i + 1)))

    out = {"tile_256_ms": _milliseconds(tile)}
    for side in (256, 512, 1024) if run.kept_layers else ():
        places = iter(_places(run, side, 16))

        def window(places: Any = places, side: int = side) -> object:
            layer, head, q0, k0 = next(places)
            return run.window(layer, head, q0, q0 + side, k0, k0 + side)

        out[f"window_{side}_ms"] = _milliseconds(window, 12)
    return out


def _milliseconds(read: Any, repeats: int = 40) -> float:
    read()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        read()
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 2)

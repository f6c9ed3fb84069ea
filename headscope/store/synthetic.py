"""A run of any length without a model: random q and k of a few heads, through the same statistics, pyramid and writer as a profile.

A dashboard has to be tried at 131,072 tokens, where a model needs a GPU; a head is only q and k to it. Each head mixes three things that
trained heads are made of: nearness (rotating features of the position), a sink on the first token, and noise. Everything in the run is
measured from that q and k by the ordinary kernels, so its windows, tiles and statistics agree with one another as those of a profile do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store.content import PLANES, MapInfo, Tokens
from headscope.store.files import canonical_heads
from headscope.store.kept import KeptFacts, KeptLayer
from headscope.store.pyramid import pyramid_sizes
from headscope.store.write import RunLayout, run_writer

if TYPE_CHECKING:
    from torch import Tensor

WORDS = ("the", " head", " reads", " what", " came", " before", ",", " and", " the", " first", " token", " waits", ".", "\n")
ROWS = ("lse", "entropy", "row_max", "argmax", "distance", "sink_mass", "local_mass")
COLUMNS = ("column_sum", "sink_importance")


def write_synthetic_run(
    path: str | Path,
    *,
    tokens: int = 131_072,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    width: int = 32,
    window: int | Sequence[int | None] | None = None,
    block: int | None = None,
    keep: bool = True,
    dtype: str = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a causal run of `layers` x `heads` heads and returns its path.

    `window`: of every layer, or one per layer. A layer with a window costs time in proportion to it, one without (None) in proportion to
    the length squared: about two minutes a head at 131,072 tokens on one CPU core. `block`: tokens a side of a map cell; None takes what
    `profile` takes. `keep`: keep q and k of every layer. `dtype`: of q and k. RunError for sizes that do not fit together.
    """
    import torch

    from headscope.call import AttentionCall, MaskFacts
    from headscope.kernels import measure
    from headscope.profile.maps import block_size
    from headscope.statistics import StatisticsRequest, definition
    from headscope.statistics.accumulate import LayerAccumulator

    windows = [window] * layers if window is None or isinstance(window, int) else list(window)
    if tokens < 16 or layers < 1 or kv_heads < 1 or heads % kv_heads or width < 4 or len(windows) != layers:
        why = f"{tokens} tokens, {layers} layers, {heads} heads on {kv_heads} key heads, width {width}, {len(windows)} windows"
        raise refusal(
            RunError, str(path), why, "use 16 tokens, 1 layer and width 4 at least, heads a multiple of kv_heads, a window a layer"
        )
    side = block or block_size(tokens)
    request = StatisticsRequest(names=(*ROWS, *COLUMNS, *PLANES), block=side)
    info = MapInfo(side, tokens, True, PLANES, pyramid_sizes(-(-tokens // side)))
    kinds = {f"{definition(name).kind}/{name}": np.dtype(np.int32 if name == "argmax" else np.float32) for name in (*ROWS, *COLUMNS)}
    layout = RunLayout(tuple(range(layers)), heads, tokens, kinds, info, tuple(range(layers)) if keep else ())
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with run_writer(path, layout, overwrite=overwrite) as writer:
        for layer in range(layers):
            generator = torch.Generator().manual_seed(seed * 1009 + layer)
            q, k = _features(tokens, heads, kv_heads, width, getattr(torch, dtype), generator)
            call = AttentionCall(f"layers.{layer}", layer, q, k, None, width**-0.5, MaskFacts(True, windows[layer]), kernel="synthetic")
            accumulator = LayerAccumulator(request, call.module, keep=False)
            accumulator.add(call, measure(call, request))
            found = {name: value[0].numpy() for name, value in accumulator.finish()[0].items()}
            facts = KeptFacts(dtype, call.scale, True, window=windows[layer])
            kept = KeptLayer(facts, _stored(q), _stored(k), found["lse"])
            statistics = {name: found[name.partition("/")[2]] for name in kinds}
            writer.layer(layer, statistics, {plane: found[plane] for plane in PLANES}, kept if keep else None)
            rows += [_row(layer, head, heads // kv_heads, windows[layer], found) for head in range(heads)]
        pieces = tuple(WORDS[number % len(WORDS)] for number in range(tokens))
        table = _table(rows)
        writer.finish(
            _card(layout, kv_heads, width, dtype, seed, time.perf_counter() - began, table),
            table,
            Tokens("".join(pieces), tuple(number % len(WORDS) for number in range(tokens)), pieces),
        )
    return Path(path).absolute()


def _features(tokens: int, heads: int, kv_heads: int, width: int, dtype: Any, generator: Any) -> tuple[Tensor, Tensor]:
    """q [1, H, N, D] and k [1, Hkv, N, D]: positions that turn, a constant that only the first key answers, noise."""
    import torch

    pairs = max(width // 4, 1)
    position = torch.arange(tokens, dtype=torch.float64)
    speed = torch.exp(-math.log(max(tokens, 32)) * torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = position[:, None] * speed
    near = torch.cat([angle.cos(), angle.sin()], 1).float()
    q = torch.randn(heads, tokens, width, generator=generator)
    k = torch.randn(kv_heads, tokens, width, generator=generator)
    strength = 1.0 + torch.rand(heads, 1, 1, generator=generator) * 2
    q[..., : 2 * pairs] = near * strength
    k[..., : 2 * pairs] = near
    q[..., -1] = 4.0 * torch.rand(heads, 1, generator=generator)
    k[..., -1] = 0.0
    k[:, 0, -1] = math.sqrt(width) * 2
    return q.to(dtype)[None], k.to(dtype)[None]


def _stored(values: Tensor) -> np.ndarray:
    import torch

    return values[0].view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values[0].numpy()


def _row(layer: int, head: int, group: int, window: int | None, found: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "layer": layer,
        "head": head,
        "kv_head": head // group,
        "module": f"layers.{layer}",
        "kind": "full" if window is None else "sliding",
        "sink": float(found["sink_importance"][head, 0]),
        "distance": float(found["distance"][head].mean()),
        "entropy": float(found["entropy"][head].mean()),
        "local_mass": float(found["local_mass"][head].mean()),
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    import pandas as pd

    from headscope.profile.roles import assign_roles

    table = pd.DataFrame(rows)
    table["roles"], table["reasons"] = assign_roles(table)
    return canonical_heads(table)


def _card(layout: RunLayout, kv_heads: int, width: int, dtype: str, seed: int, seconds: float, table: Any) -> dict[str, Any]:
    from headscope import __version__
    from headscope.profile.card import RunCard, machine_facts, now, version_facts

    metrics = {
        name: {"probe": "synthetic", "title": "", "unit": unit, "higher_is": words, "range": [0.0, high], "data": "natural"}
        for name, unit, words, high in (
            ("sink", "probability", "more weight on the first token", 1.0),
            ("distance", "tokens", "looks further back", None),
            ("entropy", "nats", "spread over more keys", None),
            ("local_mass", "probability", "more weight on the 64 nearest keys", 1.0),
        )
    }
    assert layout.maps is not None
    card = RunCard(
        model={
            "name": "synthetic",
            "source": "headscope.store.synthetic",
            "revision": "",
            "class": "none",
            "fingerprint": f"synthetic{seed:07d}",
            "layers": len(layout.layers),
            "heads": layout.heads,
            "kv_heads": kv_heads,
            "head_dim": width,
            "parameters": 0,
            "dtype": dtype,
            "device": "cpu",
        },
        data=[{"name": "synthetic q and k", "kind": "natural", "sha256": "0" * 64, "sequences": 1, "tokens": layout.tokens}],
        probes=[{"name": "synthetic", "parameters": {}, "source": "random q and k"}],
        metrics=metrics,
        numbers={},
        attention_kernels=["none"],
        statistics_kernel="blocked",
        parameters={"context": layout.tokens, "map_block": layout.maps.block},
        seeds={"texts": seed},
        versions=version_facts(),
        machine=machine_facts("cpu"),
        seconds={"total": round(seconds, 3)},
        headscope_version=__version__,
        created=now(),
    )
    return card.to_dict()


__all__ = ["write_synthetic_run"]

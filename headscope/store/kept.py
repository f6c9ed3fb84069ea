"""q and k of chosen layers, and any window of A recomputed from them.

A run cannot hold A: a head of 131,072 tokens is 68 GB. It can hold what A is made of. With the rows' lse, a weight is
exp(score - lse) of one dot product, so a window costs its own size whatever the length of the text. q and k are those the model's attention
saw (after rotary embedding and cache), in the model's dtype to the bit, with the facts of that call beside them: scale, soft cap, causality
window, padding, packing, explicit masks and biases. Sink logits are in the lse. The formula is the one of `headscope.kernels`, not a second
copy of it: a window equals `HeadStatistics.weights` of the capture.

Stored per layer, query heads, key heads and lse apart, one file a head, in pieces of ROWS positions with a checksum each: a window of
256 x 256 reads 2 to 4 pieces of 256 KiB (head_dim 128, bfloat16). They are not compressed: noise in the mantissa leaves a fifth to gain,
and compressing takes longer than everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store.schema import SCHEMA_VERSION, check_version, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

ROWS = 1024
"""Positions of one stored piece."""

CELLS = 1 << 26
"""Weights of one window, at most: 256 MiB of float32, or 8,192 x 8,192."""

STRIP = 1 << 21
"""Weights computed at a time; their scores are float64, with a few temporaries of that size."""

POSITIONS = ("key_valid", "query_segments", "key_segments")
"""Facts of a mask that are one number per position, [N]."""
MATRICES = ("allowed", "bias")
"""Facts of a mask that are [H or 1, N, N]; a host that has them has formed a matrix itself, so the text is short."""


@dataclass(frozen=True, slots=True)
class KeptFacts:
    """The facts of a layer's attention call that are plain numbers.

    `dtype`: of q and k. `scale`, `softcap`, `causal`, `window`: as in `headscope.call`. `sink_logits`: one per query head or None;
    already in the lse. `start`: position of the first row.
    """

    dtype: str
    scale: float
    causal: bool
    softcap: float | None = None
    window: int | None = None
    sink_logits: tuple[float, ...] | None = None
    start: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        out = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**out, "sink_logits": None if self.sink_logits is None else list(self.sink_logits)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> KeptFacts:
        """From plain data; TypeError or KeyError where something is missing."""
        known = {item.name: value[item.name] for item in fields(cls)}
        sinks = known["sink_logits"]
        return cls(**{**known, "sink_logits": None if sinks is None else tuple(float(x) for x in sinks)})


@dataclass(slots=True, eq=False)
class KeptLayer:
    """q [H, N, D], k [Hkv, N, D], lse [H, N] float32 of one layer, and `extra`: the mask's arrays by name.

    Arrays are numpy's, or anything that is sliced like them and read when it is (zarr). bfloat16, which numpy does not have, is held
    as uint16 of the same bits.
    """

    facts: KeptFacts
    q: Any
    k: Any
    lse: Any
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.q.shape[0])

    @property
    def kv_heads(self) -> int:
        """Key heads; query head h reads key head h // (heads // kv_heads)."""
        return int(self.k.shape[0])

    @property
    def first(self) -> int:
        """The first position that has a row."""
        return self.facts.start

    @property
    def rows(self) -> int:
        """Position after the last row."""
        return self.facts.start + int(self.q.shape[1])

    @property
    def keys(self) -> int:
        """Number of keys."""
        return int(self.k.shape[1])

    def __repr__(self) -> str:
        return f"KeptLayer(q={list(self.q.shape)}, k={list(self.k.shape)}, {self.facts})"


def weights_window(layer: KeptLayer, head: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
    """Exact weights of one head, queries q0..q1-1 on keys k0..k1-1: [q1 - q0, k1 - k0] float32.

    Zero where a key is not visible, NaN in rows that are padding. RunError for a head or position that does not exist, for an empty window
    and for one of more than CELLS weights.
    """
    for what, at in {"head": head, "q0": q0, "q1": q1, "k0": k0, "k1": k1}.items():
        if not isinstance(at, (int, np.integer)):
            raise refusal(RunError, f"{what}={at!r}", "it is no whole number", "pass heads and positions as integers")
    if not 0 <= head < layer.heads:
        raise refusal(RunError, f"head {head}", f"this layer has the heads 0..{layer.heads - 1}", "pass one of them")
    for what, low, high, first, last in (("queries", q0, q1, layer.first, layer.rows), ("keys", k0, k1, 0, layer.keys)):
        if not first <= low < high <= last:
            why = f"the layer has the positions {first}..{last - 1}, and a window holds one at least"
            raise refusal(RunError, f"{what} {low}..{high}", why, "pass first and last plus one")
    rows, columns = q1 - q0, k1 - k0
    if rows * columns > CELLS:
        why = f"one window has at most {CELLS} weights"
        raise refusal(RunError, f"a window of {rows} x {columns}", why, "pass a smaller one, or read the block maps")
    out = np.empty((rows, columns), dtype=np.float32)
    step = max(STRIP // columns, 1)
    for low in range(q0, q1, step):
        high = min(low + step, q1)
        out[low - q0 : high - q0] = _strip(layer, head, low, high, k0, k1)
    return out


def _strip(layer: KeptLayer, head: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
    import torch

    from headscope.kernels import gather_weights

    call = window_call(layer, head, q0, q1, k0, k1)
    lse = torch.from_numpy(np.ascontiguousarray(layer.lse[head, q0 - layer.first : q1 - layer.first]))[None, None]
    found: np.ndarray = gather_weights(call, lse, 0, torch.arange(q0, q1), torch.arange(k0, k1))[0].float().numpy()
    return found


def window_call(layer: KeptLayer, head: int, q0: int, q1: int, k0: int, k1: int) -> AttentionCall:
    """The attention call of one head, cut to a window: q [1, 1, q1 - q0, D], k [1, 1, k1 - k0, D], at their positions."""
    import torch

    from headscope.call import AttentionCall, MaskFacts

    rows, columns = slice(q0 - layer.first, q1 - layer.first), slice(k0, k1)
    spans = {"key_valid": columns, "query_segments": rows, "key_segments": columns}
    found: dict[str, Tensor] = {}
    for name, values in layer.extra.items():
        if name in MATRICES:
            part = np.asarray(values[min(head, values.shape[0] - 1), rows, columns])[None, None]
        else:
            part = np.asarray(values[spans[name]])[None]
        found[name] = torch.from_numpy(np.ascontiguousarray(part))
    facts = layer.facts
    group = layer.heads // layer.kv_heads
    q, k = (_tensor(values, facts.dtype) for values in (layer.q[head, rows], layer.k[head // group, columns]))
    mask = MaskFacts(causal=facts.causal, window=facts.window, **found)
    return AttentionCall("", None, q[None, None], k[None, None], None, facts.scale, mask, facts.softcap, None, q0, k0)


def _tensor(values: Any, dtype: str) -> Tensor:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def write_kept(group: Any, layer: int, kept: KeptLayer) -> None:
    """Writes one layer into the group that `kept_group` made, a head at a time."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    place = group.create_group(str(layer))
    place.attrs.update(kept.facts.to_dict())
    for name, values in {"q": kept.q, "k": kept.k, "lse": kept.lse, **kept.extra}.items():
        last = values.shape[1:] if name in ("q", "k", "lse") else values.shape
        if name in MATRICES:
            chunks: tuple[int, ...] = (1, min(256, last[-2]), min(256, last[-1]))
            shards = None
        elif name in POSITIONS:
            chunks, shards = last, None
        else:
            length = last[0]
            rows = min(ROWS if name != "lse" else 16 * ROWS, length)
            chunks = (1, rows, *last[1:])
            shards = (1, -(-length // rows) * rows, *last[1:])
        array = place.create_array(
            name,
            shape=values.shape,
            chunks=chunks,
            shards=shards,
            chunk_key_encoding={"name": "default", "separator": "."},
            dtype=values.dtype,
            compressors=Crc32cCodec() if shards else ZstdCodec(level=1, checksum=True),
            fill_value=0,
        )
        if name in POSITIONS:
            array[...] = values
            continue
        for head in range(values.shape[0]):
            array[head : head + 1] = values[head : head + 1]


def kept_group(folder: Path) -> Any:
    """A new zarr group for kept layers."""
    import zarr

    group = zarr.open_group(str(folder), mode="w", zarr_format=3)
    group.attrs["schema_version"] = SCHEMA_VERSION
    return group


def _check_facts(facts: KeptFacts, arrays: Mapping[str, Any]) -> None:
    """ValueError for facts and arrays that no writer would have written together."""
    numbers = (facts.scale, facts.softcap or 0.0, facts.window or 0, facts.start)
    q, k, lse = (arrays[name].shape for name in ("q", "k", "lse"))
    fits = len(q) == len(k) == 3 and q[2] == k[2] and tuple(lse) == tuple(q[:2]) and 0 < k[0] <= q[0] and q[0] % k[0] == 0
    kind = "uint16" if facts.dtype == "bfloat16" else facts.dtype
    if not fits or not all(isinstance(x, (int, float)) for x in numbers) or {str(arrays[x].dtype) for x in ("q", "k")} != {kind}:
        raise ValueError(f"q {q}, k {k} and lse {lse} do not go with {facts}")


class KeptReader:
    """Reads windows of a group that `write_kept` wrote; what is read is checked piece by piece."""

    def __init__(self, folder: Path) -> None:
        import zarr

        self.folder = folder
        try:
            self._group: Any = zarr.open_group(str(folder), mode="r", zarr_format=3)
            version = dict(self._group.attrs).get("schema_version")
            self.layers = tuple(sorted(int(name) for name in self._group.group_keys()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise refusal(RunError, str(folder), f"it cannot be opened ({one_line(error)})", "write the run again") from error
        check_version(version, folder)
        self._open: dict[int, KeptLayer] = {}

    def layer(self, layer: int) -> KeptLayer:
        """A layer's arrays, not yet read."""
        if layer not in self._open:
            try:
                place = self._group[str(layer)]
                arrays = {name: place[name] for name in place.array_keys()}
                facts = KeptFacts.from_dict(dict(place.attrs))
                _check_facts(facts, arrays)
                extra = {name: arrays[name] for name in (*POSITIONS, *MATRICES) if name in arrays}
                self._open[layer] = KeptLayer(facts, arrays["q"], arrays["k"], arrays["lse"], extra)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise refusal(RunError, f"{self.folder}/{layer}", f"it is damaged ({one_line(error)})", "write the run again") from error
        return self._open[layer]

    def window(self, layer: int, head: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
        """`weights_window` of a stored layer."""
        try:
            return weights_window(self.layer(layer), head, q0, q1, k0, k1)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            where = f"{self.folder}/{layer}"
            raise refusal(RunError, where, f"its content is not what was written ({one_line(error)})", "write the run again") from error

"""What a profile keeps of its shown text: per-token statistics, block maps, and q and k of chosen layers.

With `out`, each layer goes to the run directory as soon as the model has left it, and what the probes still need of it are views of the
file. Without, everything stays in memory until it is saved. The difference is 14 GiB for the maps and statistics of 1,024 heads of 131,072
tokens, and 40 GiB more where q and k of every layer are kept; the run that results is the same, byte for byte but for its card.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headscope.errors import StatisticError, refusal
from headscope.probes import Needs
from headscope.profile.head_profile import HeadProfile
from headscope.statistics import PASSIVE as STATISTICS
from headscope.statistics import definition
from headscope.store.content import PLANES, MapInfo, RunContent, Tokens
from headscope.store.kept import MATRICES, POSITIONS, KeptFacts, KeptLayer
from headscope.store.pyramid import build_pyramid, pyramid_sizes
from headscope.store.write import RunLayout, RunWriter, run_writer

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.probes import Probe, ProbeText
    from headscope.profile.card import RunCard
    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics
    from headscope.statistics.accumulate import Kept

MAP_CELLS = 128
"""Cells a side of the finest block map, unless the text is shorter than that many blocks of 16, or longer than that many of 128."""
LARGEST = 128
"""Tokens a side of a cell, at most, as long as a map then has at most MOST_CELLS a side: where exact windows take over from the map."""
MOST_CELLS = 1024


def block_size(tokens: int) -> int:
    """Tokens a side of a cell, a power of two of 16 or more: 128 cells a side up to 16,384 tokens, blocks of 128 up to 131,072, then 1,024
    cells a side.
    """
    size = 16
    while size * (MAP_CELLS if size < LARGEST else MOST_CELLS) < tokens:
        size *= 2
    return size


@dataclass(slots=True, eq=False)
class Keeper:
    """What is kept of the shown text while a profile is made. `needs`: what that adds to the first pass over it; None for nothing."""

    scope: Scope
    shown: ProbeText | None
    needs: Needs | None
    names: tuple[str, ...]
    maps: MapInfo | None
    keep: tuple[int, ...]
    spill: Spill | None = None
    out: Path | None = None
    _profile: HeadProfile | None = field(default=None, init=False)

    @property
    def seconds(self) -> dict[str, float]:
        """Time that the capture spent on writing or waited for it, as "write"; the capture's own time includes it."""
        return {} if self.spill is None else {"write": self.spill.seconds}

    def finish(self, table: pd.DataFrame, card: RunCard, stats: HeadStatistics | None, tables: dict[str, pd.DataFrame]) -> None:
        """Takes the finished table, card and further tables; with `out`, writes them. `stats`: of the first pass over the shown text."""
        if self.spill is None:
            content = None if stats is None or self.needs is None else self._content(stats)
            self._profile = HeadProfile(table, card, content, tables=tables)
        else:
            tokens = None if self.needs is None or self.shown is None else shown_tokens(self.scope, self.shown)
            self.spill.writer.finish(card.to_dict(), table, tokens, tables)

    def profile(self) -> HeadProfile:
        """The profile, after `finish` and after the block of `keeping`."""
        if self.out is not None:
            return HeadProfile.load(self.out)
        assert self._profile is not None
        return self._profile

    def _content(self, stats: HeadStatistics) -> RunContent:
        assert self.shown is not None
        layers = self.scope.topology.layers
        content = RunContent(layers, shown_tokens(self.scope, self.shown), maps=self.maps)
        for label in self.names:
            content.arrays[label] = stacked(stats, label.partition("/")[2], layers)
        for plane in () if self.maps is None else self.maps.planes:
            content.pyramids[plane] = build_pyramid(stacked(stats, plane, layers), plane)
        for layer in self.keep:
            content.kept[layer] = kept_layer(stats.kept(layer))
        return content


@contextmanager
def keeping(
    scope: Scope,
    shown: ProbeText | None,
    maps: bool,
    statistics: bool,
    block: int,
    keep: Any = None,
    *,
    readers: Sequence[Probe] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Iterator[Keeper]:
    """A Keeper for the shown text; of a profile that reads no text (None) nothing is kept.

    `maps`, `statistics`, `block`: as `profile` has them. `keep`: layers whose q and k are kept. `readers`: the probes of the text, whose
    statistics must stay readable. `out`: the run directory to write, layer by layer; it is there when the block ends after `finish`, else
    nothing is. Raises StatisticError for a layer that cannot be kept and RunError for an `out` that cannot be written, before anything is
    measured.
    """
    layers = layers_to_keep(scope, keep)
    names = tuple(f"{definition(name).kind}/{name}" for name in STATISTICS if statistics and definition(name).kind in ("row", "column"))
    info = None
    if shown is None:
        if layers:
            raise refusal(StatisticError, f"keep={keep!r}", "these probes read no text whose q and k could be kept", "add a passive probe")
        names = ()
    elif maps:
        causal = all(module.causal for module in scope.topology.main)
        info = MapInfo(block, len(shown), causal, PLANES, pyramid_sizes(-(-len(shown) // block)))
    wanted = [label.partition("/")[2] for label in names] + list(PLANES if info else ())
    parameters: dict[str, Any] = {**({"block": block} if info else {}), **({"keep": layers} if layers else {})}
    needs = Needs(tuple(wanted or ("lse",)), parameters) if wanted or layers else None
    keeper = Keeper(scope, shown, needs, names, info, layers)
    if out is None:
        yield keeper
        return
    kinds = {label: np.dtype(np.int32 if label == "row/argmax" else np.float32) for label in names}
    heads = max(module.heads for module in scope.topology.main)
    length = 0 if shown is None else len(shown)
    layout = RunLayout(scope.topology.layers, heads, length, kinds, info, layers)
    with run_writer(out, layout, overwrite=overwrite) as writer:
        keeper.out, keeper.spill = Path(out), Spill(length, scope, writer, _read_by(readers, shown, scope))
        if needs is not None:
            needs.parameters["collect"] = keeper.spill
        yield keeper


def _read_by(probes: Sequence[Probe], text: ProbeText | None, scope: Scope) -> frozenset[str]:
    names: set[str] = set()
    if text is None:
        return frozenset()
    for probe in probes:
        probe.check(text, scope.topology)
        names |= set(probe.needs(text, scope.topology).names)
    return frozenset(names)


class Spill:
    """A LayerCollector that writes each layer to a run and goes on with views of the file."""

    def __init__(self, length: int, scope: Scope, writer: RunWriter, also: frozenset[str]) -> None:
        self.length = length
        self.writer = writer
        self.seconds = 0.0
        self._scope = scope
        self._also = also

    def __call__(self, module: str, values: dict[str, Tensor], kept: Kept | None) -> dict[str, Tensor]:
        began = time.perf_counter()
        layer = self._scope.topology[module].layer
        assert layer is not None
        layout = self.writer.layout
        planes = () if layout.maps is None else layout.maps.planes
        views = self.writer.layer(
            layer,
            {label: values[label.partition("/")[2]][0].numpy() for label in layout.statistics},
            {plane: values[plane][0].numpy() for plane in planes},
            kept_layer(kept) if layer in layout.kept and kept is not None else None,
        )
        out: dict[str, Tensor] = {}
        for name, value in values.items():
            view = views.get(f"{definition(name).kind}/{name}")
            if view is not None and (name not in self._also or value.dtype == torch.from_numpy(view[:0]).dtype):
                out[name] = torch.from_numpy(view)[None]
            elif name not in planes or name in self._also:
                out[name] = value
        self.seconds += time.perf_counter() - began
        return out


def layers_to_keep(scope: Scope, keep: Any) -> tuple[int, ...]:
    """Layer numbers of `keep`: None, "all", one number, or several. StatisticError for one that is no layer of the main stack."""
    if keep is None:
        return ()
    layers = scope.topology.layers
    if isinstance(keep, str):
        if keep != "all":
            raise refusal(StatisticError, f"keep={keep!r}", "it is neither 'all' nor a list of layers", "pass keep='all' or keep=(0, 5)")
        return layers
    listed = [keep] if isinstance(keep, int) and not isinstance(keep, bool) else list(keep)
    for layer in listed:
        if layer not in layers or isinstance(layer, bool):
            why = f"the main stack has the layers {min(layers)}..{max(layers)}"
            raise refusal(StatisticError, f"keep: layer {layer!r}", why, "pass some of them, or 'all'")
    return tuple(sorted(set(listed)))


def kept_layer(kept: Kept) -> KeptLayer:
    """One sequence's q, k and lse in the form that runs hold. StatisticError for a batch, or calls whose facts cannot be joined."""
    calls = kept.restored()
    call = calls[0][0]
    if call.q.shape[0] != 1:
        raise refusal(StatisticError, f"q and k of {call.q.shape[0]} texts", "a run shows one", "keep those of one text")
    extra = {name: value[0] for name in (*POSITIONS, *MATRICES) if (value := getattr(call.mask, name)) is not None}
    if len(calls) > 1 and (extra or kept.start or any(one.mask.causal != call.mask.causal for one, _ in calls)):
        why = "their masks do not join to one"
        raise refusal(StatisticError, f"q and k of {len(calls)} calls", why, "capture the text in one pass")
    if call.key_offset:
        raise refusal(StatisticError, f"keys from position {call.key_offset} on", "earlier ones are gone", "capture the text in one pass")
    keys = kept.pieces[0]
    facts = KeptFacts(
        dtype=str(call.q.dtype).removeprefix("torch."),
        scale=float(call.scale),
        causal=call.mask.causal,
        softcap=None if call.softcap is None else float(call.softcap),
        window=call.mask.window,
        sink_logits=None if call.sink_logits is None else tuple(call.sink_logits.detach().float().cpu().tolist()),
        start=call.query_offset,
    )
    q = call.q if len(calls) == 1 else torch.cat([one.q for one, _ in calls], 2)
    lse = calls[0][1] if len(calls) == 1 else torch.cat([part for _, part in calls], 2)
    return KeptLayer(facts, _bits(q[0]), _bits(keys[0]), lse[0].numpy(), {name: _bits(value) for name, value in extra.items()})


def _bits(values: Tensor) -> np.ndarray:
    """As numpy; bfloat16, which it does not have, as uint16 of the same bits."""
    values = values.detach().contiguous()
    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def shown_tokens(scope: Scope, text: ProbeText) -> Tokens:
    """The shown text, its ids and what each token stands for."""
    return Tokens(text.text or "", tuple(text.ids.tolist()), text.strings or _pieces(scope, text))


def _pieces(scope: Scope, text: ProbeText) -> tuple[str, ...]:
    from headscope.probes.text import token_pieces

    tokenizer = getattr(scope, "tokenizer", None)
    ids = text.ids.tolist()
    return tuple(str(number) for number in ids) if tokenizer is None else token_pieces(tokenizer, ids)


def stacked(stats: HeadStatistics, name: str, layers: tuple[int, ...]) -> np.ndarray:
    """[L, H, ...] of the first sequence, float32 (argmax int32); layers with fewer heads end in NaN (argmax -1)."""
    listed = [stats[name][layer][0] for layer in layers]
    heads = max(values.shape[0] for values in listed)
    kind: Any = np.int32 if name == "argmax" else np.float32
    out = np.full((len(listed), heads, *listed[0].shape[1:]), -1 if name == "argmax" else np.nan, dtype=kind)
    for place, values in enumerate(listed):
        out[place, : values.shape[0]] = values.numpy()
    return out

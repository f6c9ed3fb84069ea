"""HeadStatistics: what a capture measured, by name and layer.

Everything is addressed by absolute position, so that row t and column t of a tensor belong to token t of the sequence whatever way it was
fed: at once, in chunks, or token by token. An observation that saw several sequences keeps them apart as `passes` and refuses to hand out
one tensor for all of them; a concatenation would silently mix positions of different texts.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import StatisticError, refusal, unknown_name
from headscope.statistics.definitions import DEFINITIONS, definition

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics.accumulate import Kept, LayerAccumulator
    from headscope.statistics.request import StatisticsRequest
    from headscope.topology import Topology

LayerKey = int | str


class LayerTensors(Mapping[LayerKey, "Tensor"]):
    """One statistic over the layers: a mapping from layer number (or, in side towers, module name) to a tensor on the CPU.

    Layers of the main stack may also be asked for by their module's name. Iterates in the order of the model's modules.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor], topology: Topology) -> None:
        self.name = name
        self._tensors = tensors
        self._topology = topology

    def __getitem__(self, key: LayerKey) -> Tensor:
        module = self._topology[key]
        if module.name in self._tensors:
            return self._tensors[module.name]
        known = ", ".join(str(layer) for layer in self) or "none"
        raise StatisticError(
            f"{self.name!r} of layer {key!r} ({module.name}): it was not measured"
            f"{f' ({module.capturable})' if module.capturable else ''}; layers that were: {known}"
        )

    def __contains__(self, key: object) -> bool:
        return any(key in (layer, self._topology[layer].name) for layer in self)

    def __iter__(self) -> Iterator[LayerKey]:
        for name in self._tensors:
            layer = self._topology[name].layer
            yield name if layer is None else layer

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = {tuple(tensor.shape) for tensor in self._tensors.values()}
        return f"LayerTensors({self.name!r}: {len(self)} layers, {' and '.join(str(list(shape)) for shape in sorted(shapes)) or 'empty'})"


class HeadStatistics:
    """Statistics of every measured head: `stats[name][layer]` is a tensor on the CPU, float32 (float64 for a float64 model).

    Shapes (B batch, H query heads, N absolute positions): rows [B, H, N] (`class_mass` [B, H, N, C]), columns [B, H, N], maps
    [B, H, nq, nk], `diagonal_sum` [B, H, R]; `pairs(name)[layer]` is [B, H, P]. Rows of padding, rows that see no key and rows before the
    first one observed are NaN (argmax: -1). `sink_importance` and `fai` are NaN where no row counts; `column_sum` is 0 there.

    - `request`, `topology`: what was asked for and of which modules. `names`, `layers`: what there is.
    - `tokens` [B, N] int64 or None: the ids, where they went through the scoped model's forward.
    - `valid` [B, N] bool: the position is a real token whose row was measured.
    - `kernels`: the attention implementations of the model that ran. `backend`: the statistics kernel.
    - `passes`: one HeadStatistics per sequence observed.
    """

    def __init__(
        self,
        request: StatisticsRequest,
        topology: Topology,
        *,
        values: Mapping[str, Mapping[str, Tensor]] | None = None,
        pairs: Mapping[str, Mapping[str, Tensor]] | None = None,
        valid: Mapping[str, Tensor] | None = None,
        spans: Mapping[str, Sequence[tuple[int, int]]] | None = None,
        kept: Mapping[str, Kept] | None = None,
        tokens: Tensor | None = None,
        kernels: frozenset[str] = frozenset(),
        backend: str = "",
        modules: Sequence[str] = (),
    ) -> None:
        """`values`: statistic -> module name -> tensor. Tests and readers may build one; captures go through `from_layers`."""
        self.request = request
        self.topology = topology
        self.tokens = tokens
        self.kernels: set[str] = set(kernels)
        self.backend = backend
        self._values = {name: dict(layers) for name, layers in (values or {}).items()}
        self._pairs = {name: dict(layers) for name, layers in (pairs or {}).items()}
        self._valid = dict(valid or {})
        self._spans = {name: tuple(parts) for name, parts in (spans or {}).items()}
        self._kept = dict(kept or {})
        measured = set(modules) | {module for layers in self._values.values() for module in layers}
        self._modules = [module.name for module in topology.modules if module.name in measured]
        self._passes: list[HeadStatistics] | None = None
        self._why_empty = "the model was not run"

    @classmethod
    def from_layers(
        cls,
        request: StatisticsRequest,
        topology: Topology,
        layers: Mapping[str, LayerAccumulator],
        *,
        tokens: Tensor | None = None,
        backend: str = "",
    ) -> HeadStatistics:
        """One sequence's statistics from its accumulators (module name -> accumulator)."""
        values: dict[str, dict[str, Tensor]] = {name: {} for name in request.names if name != "pairs"}
        pairs: dict[str, dict[str, Tensor]] = {name: {} for name in request.pairs}
        for module, layer in layers.items():
            found, at = layer.finish()
            for name, tensor in found.items():
                values[name][module] = tensor
            for name, tensor in at.items():
                pairs[name][module] = tensor
        return cls(
            request,
            topology,
            values=values,
            pairs=pairs if "pairs" in request.names else {},
            valid={module: layer.valid for module, layer in layers.items()},
            spans={module: layer.spans for module, layer in layers.items()},
            kept={module: layer.kept for module, layer in layers.items() if layer.kept is not None},
            tokens=tokens,
            kernels=frozenset(kernel for layer in layers.values() for kernel in layer.kernels),
            backend=backend,
            modules=tuple(layers),
        )

    @property
    def passes(self) -> list[HeadStatistics]:
        """One HeadStatistics per sequence; [self] when there is one."""
        if self._passes is not None:
            return list(self._passes)
        return [self] if self._modules else []

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics that were asked for."""
        return self.request.names

    @property
    def layers(self) -> list[LayerKey]:
        """Keys of the measured layers: numbers in the main stack, module names elsewhere."""
        only = self._single("the list of layers")
        keys = [(name, only.topology[name].layer) for name in only._modules]
        return [name if layer is None else layer for name, layer in keys]

    @property
    def valid(self) -> Tensor:
        """[B, N] bool for the main stack (or the only tower there is); `valid_of` gives another layer's."""
        only = self._single("one mask of valid positions")
        main = [module.name for module in only.topology.main if module.name in only._valid]
        names = main or list(only._valid)
        if not names:
            raise StatisticError("valid positions: these statistics carry none; capture the model again")
        return only._valid[names[0]]

    def valid_of(self, layer: LayerKey) -> Tensor:
        """[B, N] bool: which positions of this layer are real tokens with a measured row."""
        only = self._single("one mask of valid positions")
        return LayerTensors("valid", only._valid, only.topology)[layer]

    def segments(self, layer: LayerKey) -> tuple[tuple[int, int], ...]:
        """(first position, number of rows) of every attention call that went into a layer, in order.

        A causal layer lists its prefill, chunks and decode steps. A tower that calls attention once per image or window lists those;
        their positions follow one another, their rows see only keys of their own segment, and maps are block-diagonal accordingly.
        """
        only = self._single("one list of segments")
        name = only.topology[layer].name
        if name not in only._spans:
            raise refusal(StatisticError, f"segments of layer {layer!r}", "it was not measured", f"layers that were: {only.layers}")
        return only._spans[name]

    def __getitem__(self, name: str) -> LayerTensors:
        """A statistic over the layers. StatisticError for an unknown name, or one that was not asked for."""
        definition(name)
        only = self._single(f"one {name!r}")
        if name == "pairs":
            raise refusal(
                StatisticError, "stats['pairs']", "pairs have names of their own", f"use stats.pairs(name) with one of {list(only._pairs)}"
            )
        if name not in only.request.names:
            have = ", ".join(only.names)
            raise StatisticError(
                f"statistic {name!r} was not measured: it was not asked for; add it to statistics=[...] (measured: {have})"
            )
        return LayerTensors(name, only._values.get(name, {}), only.topology)

    def __contains__(self, name: object) -> bool:
        return name in self.request.names

    def pairs(self, name: str) -> LayerTensors:
        """[B, H, P] exact weights at the places of request.pairs[name], per layer; NaN where a place was skipped or never reached."""
        only = self._single(f"one table of pairs {name!r}")
        if name not in only._pairs:
            if "pairs" not in only.request.names:
                raise refusal(
                    StatisticError,
                    f"pairs {name!r}",
                    "none were asked for",
                    "capture with statistics=['pairs'] and pairs={name: (queries, keys)}",
                )
            raise unknown_name(StatisticError, "pairs", name, only._pairs)
        return LayerTensors(name, only._pairs[name], only.topology)

    def mean(self, name: str) -> Tensor:
        """[L, H] float64: mean over batch and positions of a row or column statistic, for the layers of the main stack in order.

        Only valid rows (or keys) count and NaN is left out; several passes are pooled by their number of positions. `class_mass` gives
        [L, H, C]. Layers with fewer heads, and layers that were not measured, are filled up with NaN.
        """
        kind = definition(name).kind
        if kind not in ("row", "row_class", "column") or name == "argmax":
            what = "a position has no mean" if name == "argmax" else f"it is a {kind}"
            means = ", ".join(n for n, d in DEFINITIONS.items() if d.kind in ("row", "row_class", "column") and n != "argmax")
            raise refusal(StatisticError, f"mean of {name!r}", what, f"read stats[{name!r}][layer]; means exist for: {means}")
        passes = self.passes
        if not passes:
            self._single(f"a mean of {name!r}")
        main = self.topology.main
        heads = max(module.heads for module in main) if main else 0
        extra = (self.request.classes,) if kind == "row_class" else ()
        total = torch.zeros(len(main), heads, *extra, dtype=torch.float64)
        count = torch.zeros_like(total)
        for one in passes:
            tensors = one[name]
            for index, module in enumerate(main):
                if module.name not in one._values.get(name, {}):
                    continue
                value = tensors[module.name].double()
                keep = ~value.isnan()
                valid = one._valid.get(module.name)
                if valid is not None:
                    counted = torch.zeros(value.shape[0], value.shape[2], dtype=torch.bool)
                    counted[:, : valid.shape[1]] = valid[:, : value.shape[2]]
                    keep &= counted[:, None].reshape(value.shape[0], 1, value.shape[2], *([1] * len(extra)))
                total[index, : module.heads] += value.masked_fill(~keep, 0.0).sum((0, 2))
                count[index, : module.heads] += keep.sum((0, 2))
        return torch.where(count > 0, total / count.clamp_min(1), torch.tensor(float("nan"), dtype=torch.float64))

    def weights(self, layer: LayerKey, head: int, queries: Sequence[int] | Tensor, keys: Sequence[int] | Tensor) -> Tensor:
        """Exact entries A[t, s] of one head, [B, len(queries), len(keys)], for absolute positions; zero where s is not visible to t.

        Needs q and k of the layer: capture with keep=(layer, ...) or keep="all". Raises StatisticError otherwise, and for a head or
        a position that does not exist.
        """
        from headscope.kernels import gather_weights

        only = self._single("one matrix of weights")
        module = only.topology[layer]
        kept = only._kept.get(module.name)
        if kept is None:
            raise refusal(
                StatisticError, f"weights of layer {layer!r}", "its q and k were not kept", f"capture with keep=({layer!r},) or keep='all'"
            )
        if not 0 <= head < module.heads:
            raise refusal(
                StatisticError, f"head {head} of layer {layer!r}", f"the layer has heads 0..{module.heads - 1}", "pass one of them"
            )
        rows, columns = torch.as_tensor(queries).long().reshape(-1), torch.as_tensor(keys).long().reshape(-1)
        calls = kept.restored()
        first, last = calls[0][0].query_offset, calls[-1][0].query_offset + calls[-1][0].q.shape[2]
        end = kept.start if kept.end is None else kept.end
        for what, at, low, high in (("query", rows, first, last), ("key", columns, 0, end)):
            if at.numel() and (int(at.min()) < low or int(at.max()) >= high):
                raise refusal(
                    StatisticError,
                    f"{what} positions {int(at.min())}..{int(at.max())}",
                    f"kept are {low}..{high - 1}",
                    "pass positions among those",
                )
        batch = calls[0][0].q.shape[0]
        out = torch.zeros(batch, len(rows), len(columns), dtype=calls[0][1].dtype)
        for call, lse in calls:
            mine = ((rows >= call.query_offset) & (rows < call.query_offset + call.q.shape[2])).nonzero().flatten()
            there = ((columns >= call.key_offset) & (columns < call.key_offset + call.k.shape[2])).nonzero().flatten()
            if mine.numel() and there.numel():
                out[:, mine[:, None], there[None, :]] = gather_weights(call, lse, head, rows[mine], columns[there]).to(out.dtype)
        return out

    def kept(self, layer: LayerKey) -> Kept:
        """q, k and lse of a layer, as its calls brought them. StatisticError unless it was captured with keep=."""
        only = self._single("one layer's q and k")
        kept = only._kept.get(only.topology[layer].name)
        if kept is None:
            why = f"capture with keep=({layer!r},) or keep='all'"
            raise refusal(StatisticError, f"q and k of layer {layer!r}", "they were not kept", why)
        return kept

    def _single(self, what: str) -> HeadStatistics:
        """The only pass; StatisticError when there are several or none."""
        passes = self.passes
        if len(passes) == 1:
            return passes[0]
        if not passes:
            raise refusal(
                StatisticError,
                what,
                f"nothing was measured: {self._why_empty}",
                "run the scoped model inside `with scope.observe()` and read the statistics after the block",
            )
        raise refusal(StatisticError, what, f"{len(passes)} sequences were observed", "read them one by one: stats.passes[i]")

    def _fill(self, passes: list[HeadStatistics], why_empty: str = "") -> None:
        """Take over what an observation found (called once, when its `with` block ends)."""
        if len(passes) == 1:
            vars(self).update(vars(passes[0]))  # the only pass is this object itself
            return
        self._passes = list(passes)
        self._why_empty = why_empty or self._why_empty
        self.kernels = set().union(*(one.kernels for one in passes))
        self.backend = next((one.backend for one in passes), self.backend)

    def __repr__(self) -> str:
        passes = self.passes
        if not passes:
            return f"HeadStatistics(empty: {self._why_empty})"
        if len(passes) > 1:
            return f"HeadStatistics({len(passes)} sequences, {len(self.names)} statistics, kernels={sorted(self.kernels)})"
        one = passes[0]
        batch, length = (0, 0) if not one._valid else tuple(one.valid.shape)
        size = f"{len(one._modules)} layers, {batch} x {length} positions, {len(self.names)} statistics"
        return f"HeadStatistics({size}, kernels={sorted(self.kernels)})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._html()}

    def _html(self) -> str:
        """A static table: one line per statistic with its unit and its mean over all heads, where a mean exists."""
        lines = []
        for name in self.names:
            row = definition(name)
            cell = ""
            if self.passes and row.kind in ("row", "column") and name != "argmax" and self.topology.main:
                cell = f"{float(self.mean(name).nanmean()):.4g}"
            cells = (f"<code>{html.escape(name)}</code>", html.escape(row.kind), html.escape(row.meaning), cell, html.escape(row.unit))
            lines.append("<tr>" + "".join(f"<td style='text-align:left'>{text}</td>" for text in cells) + "</tr>")
        head = "".join(f"<th style='text-align:left'>{text}</th>" for text in ("statistic", "kind", "meaning", "mean over heads", "unit"))
        return f"<div><p>{html.escape(repr(self))}</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"

"""nnsight: a Scope on the module inside an nnsight model, and statistics measured inside a trace, here or on another machine.

An nnsight model runs the very torch module it wraps, so on this machine everything that a scope does for a transformers model works while
`with model.trace(...)` or `model.generate(...)` runs inside `scope.observe()` or `scope.intervene(...)`.

`trace_statistics` measures inside the trace instead: it reads the arguments of each layer's attention call through `.source` and sends a
function with them that needs only torch (`capture.portable`). That is the way for a model whose weights are elsewhere (`remote=True`):
q and k never travel, only the statistics do. The silent failure this avoids: an observer that is sent by name and finds another version of
itself, or nothing, on the other side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headscope.capture import portable
from headscope.capture.hosts import Host, open_host
from headscope.errors import CaptureError, StatisticError, refusal
from headscope.inputs import model_inputs
from headscope.statistics import HeadStatistics
from headscope.statistics.accumulate import LayerAccumulator
from headscope.statistics.partial import PartialStatistics

if TYPE_CHECKING:
    from headscope.call import AttentionCall
    from headscope.scope import Scope
    from headscope.statistics import StatisticsRequest
    from headscope.topology import AttentionModule

CELLS = 1 << 26
"""Scores that the observer holds at a time: 256 MiB in float32."""


def nnsight_host(given: Any, example: Any = None) -> Host:
    """The host of an nnsight model: that of the module inside it. CaptureError for one that has no module."""
    module = getattr(given, "_module", None)
    if not isinstance(module, nn.Module):
        kind = f"nnsight.{type(given).__name__}"
        raise refusal(CaptureError, f"a {kind}", "it wraps no torch module", "pass NNsight(model) or TransformersModel(...)")
    pipeline = getattr(given, "pipeline", None)
    known = any(base.__module__.partition(".")[0] == "diffusers" for base in type(pipeline).__mro__)
    inner = open_host(pipeline if known else module, example)
    inner.kind, inner.given = "nnsight", given
    return inner


def trace_statistics(
    scope: Scope,
    data: Any,
    *,
    attention_mask: Any = None,
    statistics: Any = None,
    remote: bool | str = False,
    beyond_context: bool = False,
    cells: int = CELLS,
    **params: Any,
) -> HeadStatistics:
    """Measure one forward pass from inside `model.trace(...)`.

    `scope`: of an nnsight model around a transformers one. `data`, `attention_mask`, `statistics`, `params`: as for `Scope.capture`.
    `remote`: passed on to nnsight; "local" sends the request through the remote path's serialisation and runs it here. `cells`: how many
    scores the observer may hold at a time. The statistics are those of `Scope.capture` to rounding; `backend` is "portable".

    Raises StatisticError for segment_mass, pairs, keep= and collect=, which need the model on this machine, and CaptureError for a call
    that cannot be read.
    """
    if scope.host.kind != "nnsight" or not scope.host.takes_text:
        why = "it is not an nnsight model around a transformers one"
        raise refusal(CaptureError, repr(scope), why, "pass hs.Scope(nnsight.TransformersModel(...))")
    request = scope.request(statistics, **params)
    for name in request.names:
        if name not in portable.MEASURES:
            known = ", ".join(portable.MEASURES)
            raise refusal(StatisticError, f"statistic {name!r} in a trace", "it needs q and k on this machine", f"ask for {known}")
    for name in ("keep", "collect"):
        if getattr(request, name) is not None:
            why = "q and k stay where the model runs" if name == "keep" else "all layers come back at once"
            raise refusal(StatisticError, f"{name}= in a trace", why, "use scope.capture on this machine")
    inputs = model_inputs(scope, data, attention_mask, False, beyond_context)
    mask = inputs.get("attention_mask")
    valid = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all()) else None
    ids = inputs.get("input_ids")
    if valid is not None and isinstance(ids, torch.Tensor) and "position_ids" in scope._forward_parameters:
        # nnsight would number a left-padded row from its first real token; scope.capture leaves positions to the model
        inputs = {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape), **inputs}
    records = _wanted(scope, request)
    settings = _settings(request, valid, cells)
    with _sent_by_value(), torch.no_grad():
        found = _run(scope.host.given, [record.name for record in records], inputs, settings, remote)
    layers = {record.name: _layer(record, found[record.name], request, valid) for record in records}
    tokens = ids.detach().cpu() if isinstance(ids, torch.Tensor) else None
    return HeadStatistics.from_layers(request, scope.topology, layers, tokens=tokens, backend="portable")


def _wanted(scope: Scope, request: StatisticsRequest) -> list[AttentionModule]:
    """The layers to measure. A trace reads them in the order in which they run."""
    main = [record for record in scope.topology.main if not record.capturable]
    if request.layers is None:
        return main
    names = {scope.topology[layer].name for layer in request.layers}
    wanted = [record for record in main if record.name in names]
    if len(wanted) < len(names):
        raise refusal(
            CaptureError,
            f"layers {list(request.layers)}",
            "a trace measures layers of the main stack only",
            "use scope.capture for towers and cross-attention",
        )
    return wanted


def _settings(request: StatisticsRequest, valid: Any, cells: int) -> dict[str, Any]:
    return {
        "names": request.names,
        "sink_tokens": request.sink_tokens,
        "local_window": request.local_window,
        "waad_window": request.waad_window,
        "fai_band": request.fai_band,
        "block": request.block,
        "labels": request.labels,
        "classes": request.classes,
        "rows": request.rows,
        "valid": valid,
        "kernel": "",
        "cells": cells,
    }


@contextmanager
def _sent_by_value() -> Iterator[None]:
    """The observer's module pickled as code instead of as a name, as long as the block lasts."""
    import cloudpickle  # type: ignore[import-untyped]

    before = portable.__name__ in cloudpickle.list_registry_pickle_by_value()
    if not before:
        cloudpickle.register_pickle_by_value(portable)
    try:
        yield
    finally:
        if not before:
            cloudpickle.unregister_pickle_by_value(portable)


def _run(model: Any, names: list[str], inputs: Mapping[str, Any], settings: dict[str, Any], remote: bool | str) -> dict[str, Any]:
    """One trace. The block is written for nnsight: it is its source that is compiled, and sent."""
    calls = [(name, _call_of(model, name)) for name in names]
    observe = portable.observe_call
    ids = inputs["input_ids"]
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    options: dict[str, Any] = {"remote": remote} if remote else {}
    found: Any = None
    with model.trace(ids, **others, **options):
        found = {}
        for name, call in calls:
            arguments = call.inputs
            found[name] = observe(arguments[0], arguments[1], settings)
        found.save()
    return dict(found)


def _call_of(model: Any, name: str) -> Any:
    """The operation of an attention module's forward that calls its attention function; nnsight numbers the look-up first, then it."""
    envoy = model
    for part in name.split("."):
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    labels = [label for label in envoy.source.names if re.fullmatch(r"attention_interface_\d+", label)]
    if not labels:
        raise refusal(
            CaptureError, name, "its forward has no attention_interface call that nnsight can see", "use scope.observe() around the trace"
        )
    return getattr(envoy.source, max(labels, key=lambda label: int(label.rpartition("_")[2])))


def _layer(record: AttentionModule, found: Mapping[str, Any], request: StatisticsRequest, valid: Any) -> LayerAccumulator:
    """What came back, in its place."""
    if found["refused"]:
        raise refusal(CaptureError, record.name, found["refused"], "use scope.capture on this machine")
    layer = LayerAccumulator(request, record.name, keep=False)
    partial = PartialStatistics(0, 0, found["rows"], found["columns"], found["counts"], found["maps"])
    partial.diagonals, partial.diagonal_start = found["diagonals"], found["diagonal_start"]
    layer.add(_placeholder(record, found, valid), partial)
    return layer


def _placeholder(record: AttentionModule, found: Mapping[str, Any], valid: Any) -> AttentionCall:
    """The call's facts without its q and k, which stayed where the model is."""
    from headscope.call import AttentionCall, MaskFacts

    batch, heads, rows = found["shape"]
    q = torch.empty(1).expand(batch, heads, rows, record.head_dim)
    k = torch.empty(1).expand(batch, record.kv_heads, rows, record.head_dim)
    facts = MaskFacts(causal=found["causal"], query_valid=None if valid is None else valid.cpu())
    return AttentionCall(record.name, record.layer, q, k, None, 1.0, facts, kernel=found["kernel"])


__all__ = ["nnsight_host", "trace_statistics"]

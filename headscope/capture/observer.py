"""Observer: measures every call of a scope and sorts the pieces into sequences.

Which calls belong to one sequence is decided here, from positions and from the cache object they came with: rows that start where the last
ones ended, with the same cache, continue it; rows that start at 0 begin another; anything else (a cropped cache, beams that changed
places) is refused, for its rows would be averaged into the wrong tokens. Encoders and image towers run before the stack that reads them,
so what they give waits for the next call of the main stack and joins its sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from headscope.capture.forward import cache_reference
from headscope.capture.verify import Comparison, compare_output, signature
from headscope.errors import CaptureError, refusal
from headscope.statistics import HeadStatistics
from headscope.statistics.accumulate import LayerAccumulator
from headscope.statistics.offload import start

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.capture.calls import HostCall
    from headscope.capture.forward import ForwardState, ModuleRun
    from headscope.statistics.request import StatisticsRequest
    from headscope.topology import Topology

SAME_KEY = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""How far a key may be from what it was a step ago, relative to its length. A cache gives back the very key; a model that keeps latents and
makes its keys of them anew at each step (DeepSeek) gives it back to rounding."""
NOT_SIDE = {"class_mass", "segment_mass", "pairs"}
"""Defined by positions of the main sequence, so not measured in towers and encoders."""
NOT_CROSS = NOT_SIDE | {"distance", "distance_sq", "waad", "local_mass", "sink_importance", "fai", "diagonal_sum"}
"""Defined by the distance between a query and a key, which cross-attention does not have."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence: its layers, the cache it grows in, the forward pass that last touched it, its token ids."""

    layers: dict[str, LayerAccumulator] = field(default_factory=dict)
    cache: Callable[[], Any] = lambda: None
    forward: int = 0
    serials: dict[str, int] = field(default_factory=dict)
    tails: dict[str, Tensor] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)
    token_rows: int = 0


class Observer:
    """Measures calls for one `with scope.observe()` block."""

    def __init__(self, request: StatisticsRequest, topology: Topology, verify: bool = True) -> None:
        self.request = request
        self.topology = topology
        self.verify = verify
        self.backend = ""
        self._side = _without(request, NOT_SIDE)
        self._cross = _without(request, NOT_CROSS)
        self._wanted = _names(topology, request.layers)
        self._keep = _names(topology, None if request.keep == "all" else request.keep or ())
        self._sequences: list[Sequence] = []
        self._waiting = Sequence()
        self._checked: set[tuple[object, ...]] = set()
        self._compared: list[Comparison] = []
        self._moved: list[Tensor] = []

    # ---- one call -----------------------------------------------------------------------------------------------

    def observe(self, call: AttentionCall, output: Tensor, host: HostCall, run: ModuleRun, state: ForwardState) -> None:
        """Measure one call and put it where it belongs."""
        if getattr(run.cache, "frees_keys", False):
            raise refusal(
                CaptureError,
                f"{call.module} with a cache that frees keys",
                "the call holds the newest keys only, so nothing about the others could be measured",
                "run the plan with the model's own cache: scope.execute(plan)",
            )
        if run.calls and (call.mask.causal or run.cache is not None or call.is_cross):
            raise refusal(
                CaptureError,
                f"{call.module} (layer {call.layer})",
                "it calls attention several times for the same tokens (as differential attention does), so its heads have no one pattern",
                "this model cannot be measured yet",
            )
        if self.verify and host.ran:
            kind = signature(call)
            if kind not in self._checked:
                compared = compare_output(call, output, {**host.kwargs, "attention_mask": host.mask})
                if call.q.is_cuda:
                    self._compared.append(compared)
                else:
                    compared.settle()
                self._checked.add(kind)
        sequence = self._sequence_of(call, run, state)
        if call.layer is not None:
            self._note_tokens(sequence, call, state)
        if call.module not in self._wanted:
            return
        from headscope.kernels import backend_for, measure

        layer = sequence.layers.get(call.module)
        call = self._placed(call, layer, run)
        request = self._cross if call.is_cross else self.request if call.layer is not None else self._side
        if request is None:
            return
        if layer is None:
            layer = sequence.layers[call.module] = LayerAccumulator(request, call.module, keep=call.module in self._keep)
        self._check_tail(sequence, call, run)
        with torch.no_grad():
            partial = measure(call, request)
        layer.add(call, partial)
        self.backend = self.backend or backend_for(call)
        collect = request.collect
        if collect is not None and call.layer is not None and not call.is_cross and layer.end == collect.length:
            self._settle()
            layer.hand_over(collect)

    def forward_ended(self) -> None:
        """Called after each outermost forward pass: one look at all comparisons of this pass, so that a GPU is asked only once."""
        self._settle()
        if self._moved and bool(torch.stack([moved.to("cpu") for moved in self._moved]).any()):
            raise refusal(
                CaptureError,
                "the keys of earlier tokens",
                "they changed between two steps, so rows and keys no longer belong to the same sequence (beam search reorders its cache; "
                "other code may have edited it)",
                "generate with num_beams=1, or capture the finished text in one pass",
            )
        self._moved.clear()

    def _settle(self) -> None:
        """Read the outputs' comparisons that a GPU has been asked for."""
        compared, self._compared = self._compared, []
        if compared:
            start()  # reading waits for the device; what it has measured can be on its way meanwhile
        for one in compared:
            one.settle()

    # ---- which sequence -----------------------------------------------------------------------------------------

    def _sequence_of(self, call: AttentionCall, run: ModuleRun, state: ForwardState) -> Sequence:
        if call.is_cross:
            return self._latest(state)
        if call.layer is None:
            return self._side_sequence(call, run, state)
        current = self._sequences[-1] if self._sequences else None
        if current is not None and current.forward == state.number:
            last = current.serials.get(call.module)
            if last is not None and last != run.serial:
                raise refusal(
                    CaptureError,
                    f"{call.module} (layer {call.layer})",
                    "it ran twice in one forward pass over the same positions: layers that share one module cannot be told apart",
                    "this model cannot be measured yet",
                )
            current.serials[call.module] = run.serial
            return current
        if current is not None and self._continues(current, call, run):
            current.forward = state.number
            self._take_waiting(current)
        else:
            current = Sequence(cache=cache_reference(run.cache), forward=state.number)
            self._take_waiting(current)
            self._sequences.append(current)
        current.serials = {call.module: run.serial}
        return current

    def _continues(self, current: Sequence, call: AttentionCall, run: ModuleRun) -> bool:
        """True when a call goes on with a sequence; False when it starts another. Raises CaptureError when it does neither."""
        if call.query_offset == 0 or run.cache is None:
            return False
        if current.cache() is not run.cache:
            return False
        measured = [layer for name, layer in current.layers.items() if self.topology[name].layer is not None]
        end = measured[0].end if measured else current.token_rows
        batch = measured[0].batch if measured else call.q.shape[0]
        if call.query_offset == end and batch == call.q.shape[0]:
            return True
        if batch != call.q.shape[0]:
            why = f"a batch of {batch} became {call.q.shape[0]} in the middle of a sequence"
        elif end is not None and call.query_offset < end:
            why = f"rows from {call.query_offset} on were measured before: the cache was cropped (assisted decoding does that)"
        else:
            why = f"rows {end}..{call.query_offset - 1} of the same cache were not seen: they ran outside of the observation"
        raise refusal(CaptureError, repr(call), why, "observe plain greedy decoding or sampling, or capture the finished text in one pass")

    def _take_waiting(self, sequence: Sequence) -> None:
        """What towers and encoders gave before this call of the main stack belongs to its sequence."""
        for name, layer in self._waiting.layers.items():
            if name in sequence.layers:
                raise refusal(
                    CaptureError,
                    f"{name}",
                    "it ran again in the middle of a cached sequence (a second image in a chat?), so its positions have no one place",
                    "observe each turn in its own `with` block, or all images in one pass",
                )
            sequence.layers[name] = layer
        self._waiting = Sequence()

    def _side_sequence(self, call: AttentionCall, run: ModuleRun, state: ForwardState) -> Sequence:
        """Where a tower's call waits: with the others of its forward pass; a tower that runs again by itself is another sequence."""
        waiting = self._waiting
        if call.module in waiting.layers and waiting.forward != state.number:
            self._flush()
            waiting = self._waiting
        waiting.forward = state.number
        return waiting

    def _latest(self, state: ForwardState) -> Sequence:
        if self._sequences and self._sequences[-1].forward == state.number:
            return self._sequences[-1]
        return self._waiting

    def _flush(self) -> None:
        if self._waiting.layers:
            self._sequences.append(self._waiting)
            self._waiting = Sequence()

    # ---- places -------------------------------------------------------------------------------------------------

    def _placed(self, call: AttentionCall, layer: LayerAccumulator | None, run: ModuleRun) -> AttentionCall:
        """A call of its own segment (an image, a window) moved behind the segments before it; all other calls as they are."""
        if call.is_cross or run.cache is not None or layer is None or layer.end is None:
            return call
        shift = layer.end
        first = torch.full((call.q.shape[0],), shift, dtype=torch.int64, device=call.q.device)
        if call.first_token is not None:
            first = first + call.first_token
        return replace(call, query_offset=call.query_offset + shift, key_offset=call.key_offset + shift, first_token=first)

    def _check_tail(self, sequence: Sequence, call: AttentionCall, run: ModuleRun) -> None:
        """Compare the newest key of the last step with what the cache holds at its place now; the answers are read in `forward_ended`."""
        if run.cache is None or call.is_cross or not call.mask.causal:
            return
        before = sequence.tails.get(call.module)
        place = call.query_offset - 1 - call.key_offset
        if before is not None and place >= 0:
            now = call.k[:, :, place]
            quantised = type(getattr(run.cache, "layers", [None])[-1]).__name__.endswith("QuantizedLayer")
            limit = 0.5 if quantised else SAME_KEY.get(now.dtype, 2e-2)
            self._moved.append(((now - before).flatten(1).norm(dim=1) > limit * before.flatten(1).norm(dim=1)).any())
        sequence.tails[call.module] = call.k[:, :, -1].detach().clone()

    def _note_tokens(self, sequence: Sequence, call: AttentionCall, state: ForwardState) -> None:
        end = call.query_offset + call.q.shape[2]
        if end <= sequence.token_rows:
            return
        tokens = state.tokens(call.q.shape[0], call.q.shape[2])
        if tokens is not None and (sequence.tokens or sequence.token_rows == 0) and call.query_offset == sequence.token_rows:
            sequence.tokens.append(tokens.detach().to("cpu", copy=True))
        else:
            sequence.tokens.clear()
        sequence.token_rows = end

    # ---- the end ------------------------------------------------------------------------------------------------

    def passes(self) -> list[HeadStatistics]:
        """One HeadStatistics per sequence, in the order in which they ran."""
        self._settle()
        self._flush()
        out = []
        for sequence in self._sequences:
            if not sequence.layers:
                continue
            known = sum(piece.shape[1] for piece in sequence.tokens)
            tokens = torch.cat(sequence.tokens, 1).long() if sequence.tokens and known == sequence.token_rows else None
            out.append(HeadStatistics.from_layers(self.request, self.topology, sequence.layers, tokens=tokens, backend=self.backend))
        return out


def _names(topology: Topology, layers: tuple[int | str, ...] | str | None) -> set[str]:
    if layers is None:
        return {module.name for module in topology.modules}
    return {topology[layer].name for layer in layers}


def _without(request: StatisticsRequest, names: set[str]) -> StatisticsRequest | None:
    """A request without some statistics and without what is given per position of the main sequence; None when nothing is left."""
    left = tuple(name for name in request.names if name not in names)
    return replace(request, names=left, rows=None) if left else None

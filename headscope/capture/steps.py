"""StepObserver: measures a model that runs once per denoising step, each forward pass on its own.

In a diffusion model no cache joins one forward pass to the next, and a block may have two attentions over different tokens. So a pass is
told by the number of the forward pass alone, whatever module comes first, and what each key is (image or text) is known call by call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headscope.capture.observer import Observer, Sequence
from headscope.errors import CaptureError, refusal
from headscope.statistics.steps import Step, StepStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.capture.calls import HostCall
    from headscope.capture.forward import ForwardState, ModuleRun
    from headscope.statistics import HeadStatistics, StatisticsRequest
    from headscope.topology import Topology

IMAGE, TEXT = 0, 1
"""Labels of `class_mass`."""
LABEL_NAMES = ("image", "text")


class StepObserver(Observer):
    """Measures the calls of one block; `passes()` gives one StepStatistics per forward pass."""

    def __init__(self, request: StatisticsRequest, topology: Topology, verify: bool = True) -> None:
        super().__init__(request, topology, verify=verify)
        self._steps: dict[int, Step] = {}
        self._own_labels = request.label_names == LABEL_NAMES and "class_mass" in request.names
        self._first: int | None = None

    def observe(self, call: AttentionCall, output: Tensor, host: HostCall, run: ModuleRun, state: ForwardState) -> None:
        """Measure one call, with the labels of its own keys."""
        plain, side = self.request, self._side
        if self._own_labels and not call.is_cross:
            self.request = self._side = replace(plain, labels=self._labels(call))
        try:
            super().observe(call, output, host, run, state)
        finally:
            self.request, self._side = plain, side

    def _labels(self, call: AttentionCall) -> Tensor:
        streams = call.facts.get("streams")
        if not isinstance(streams, tuple):
            raise refusal(
                CaptureError,
                f"class_mass of {call.module}",
                "which of its keys are text and which are image cannot be told from the call",
                "leave class_mass out of statistics=[...], or pass labels=",
            )
        labels = torch.full((call.k.shape[2],), -1, dtype=torch.int64)
        for label, first, end in streams:
            labels[first:end] = label
        return labels.to(call.k.device)

    def _sequence_of(self, call: AttentionCall, run: ModuleRun, state: ForwardState) -> Sequence:
        current = self._sequences[-1] if self._sequences else None
        if current is None or current.forward != state.number:
            current = Sequence(forward=state.number)
            self._sequences.append(current)
            self._first = state.number if self._first is None else self._first
            step = call.facts.get("step")
            known = step if isinstance(step, Step) else Step(state.number)
            self._steps[id(current)] = replace(known, forward=state.number - self._first)
        last = current.serials.setdefault(call.module, run.serial)
        if last != run.serial:
            raise refusal(
                CaptureError,
                f"{call.module} (layer {call.layer})",
                "it ran twice in one forward pass: layers that share one module cannot be told apart",
                "this model cannot be measured yet",
            )
        return current

    def passes(self) -> list[HeadStatistics]:
        """One StepStatistics per forward pass, in the order in which they ran."""
        out: list[HeadStatistics] = []
        for sequence in self._sequences:
            if sequence.layers:
                one = StepStatistics.from_layers(self.request, self.topology, sequence.layers, backend=self.backend)
                if isinstance(one, StepStatistics):
                    one.step = self._steps[id(sequence)]
                out.append(one)
        return out

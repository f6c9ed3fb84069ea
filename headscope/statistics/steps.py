"""StepStatistics: what was measured of a model that runs once per denoising step.

A diffusion model sees the same tokens again at every timestep, and, under classifier-free guidance, a conditional and an unconditional
version of them side by side in one batch. Adding up over either would mix different questions: a head's behaviour at high noise and at
low, with the prompt and without. So each forward pass is a pass of its own that knows its timestep and what each row of its batch is, and
means over steps are made when asked for, per branch if asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import StatisticError, refusal
from headscope.statistics.result import HeadStatistics, LayerTensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of a diffusion model. `timestep`: one number per row of the batch, as the model was given it; None where it was
    given none. `branches`: what each row is ("cond", "uncond", ...), None where that is not known. `forward`: its number in the block."""

    forward: int
    timestep: tuple[float, ...] | None = None
    branches: tuple[str, ...] | None = None


class StepStatistics(HeadStatistics):
    """HeadStatistics over denoising steps: `stats.passes[i]` is step i, with its `step`; `mean(name)` [L, H] is over all steps.

    `by_step(name)[layer]` is [S, B, H, ...], `over_steps(name)[layer]` its mean over the steps. `branch("cond")` keeps the rows of one
    guidance branch. Labels of `class_mass` are `stats.request.label_names`.
    """

    step: Step | None = None

    @property
    def steps(self) -> list[Step]:
        """Timestep and branches of each pass, in the order they ran."""
        return [one.step for one in self._step_passes() if one.step is not None]

    @property
    def timesteps(self) -> list[float]:
        """The first row's timestep of each pass."""
        return [step.timestep[0] if step.timestep else float("nan") for step in self.steps]

    @property
    def branches(self) -> list[str]:
        """Every guidance branch that was seen, in order."""
        return list(dict.fromkeys(name for step in self.steps for name in step.branches or ()))

    def by_step(self, name: str) -> LayerTensors:
        """[S, B, H, ...] of one statistic per layer: the passes stacked. StatisticError when their batches or lengths differ."""
        return self._combined(name, torch.stack, "stacked")

    def over_steps(self, name: str) -> LayerTensors:
        """[B, H, ...] of one statistic per layer: its mean over the steps, NaN left out. Not for `argmax`, which has no mean."""
        if name == "argmax":
            raise refusal(StatisticError, "a mean of 'argmax' over steps", "a position has no mean", "read by_step('argmax')")
        return self._combined(name, lambda tensors: torch.stack(tensors).nanmean(0), "averaged")

    def branch(self, name: str) -> StepStatistics:
        """The rows of the batch that belong to one guidance branch, in every step that has any. (q and k that were kept stay behind.)"""
        if name not in self.branches:
            known = ", ".join(self.branches) or "none: neither the pipeline nor the inputs told them apart"
            raise refusal(
                StatisticError, f"branch {name!r}", f"the branches seen are {known}", "set scope.host.guidance, e.g. ('uncond', 'cond')"
            )
        whole = StepStatistics(self.request, self.topology)
        parts = [one._rows_of(name) for one in self._step_passes() if one.step and one.step.branches and name in one.step.branches]
        whole._fill(list(parts))
        return whole

    def _rows_of(self, name: str) -> StepStatistics:
        if self.step is None or self.step.branches is None:
            raise RuntimeError("this pass does not know its branches")
        rows = [index for index, branch in enumerate(self.step.branches) if branch == name]

        def chosen(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
            return {key: {module: tensor[rows] for module, tensor in layers.items()} for key, layers in tables.items()}

        part = StepStatistics(
            self.request,
            self.topology,
            values=chosen(self._values),
            pairs=chosen(self._pairs),
            valid={module: valid[rows] for module, valid in self._valid.items()},
            spans=self._spans,
            kernels=frozenset(self.kernels),
            backend=self.backend,
            modules=tuple(self._modules),
        )
        times = self.step.timestep
        part.step = Step(self.step.forward, tuple(times[row] for row in rows) if times else None, (name,) * len(rows))
        return part

    def _step_passes(self) -> list[StepStatistics]:
        return [one for one in self.passes if isinstance(one, StepStatistics)]

    def _combined(self, name: str, how: Any, word: str) -> LayerTensors:
        passes: Sequence[HeadStatistics] = self.passes
        if not passes:
            self._single(f"one {name!r}")
        tensors = [one[name] for one in passes]
        out: dict[str, Tensor] = {}
        for module in passes[0]._modules:
            if module not in tensors[0]._tensors:
                continue
            pieces = [table[module] for table in tensors if module in table._tensors]
            shapes = {tuple(piece.shape) for piece in pieces}
            if len(shapes) > 1 or len(pieces) < len(passes):
                raise refusal(
                    StatisticError,
                    f"{name!r} {word} over the steps",
                    f"the passes differ ({', '.join(str(list(shape)) for shape in sorted(shapes))}; {len(pieces)} of {len(passes)} passes)",
                    "read them one by one (stats.passes), or choose a branch",
                )
            out[module] = how(pieces)
        return LayerTensors(name, out, self.topology)


__all__ = ["Step", "StepStatistics"]

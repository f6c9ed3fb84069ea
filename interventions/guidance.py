"""guided: let a diffusion model run away from what it draws when chosen heads are spoilt.

    eps' = (1 + w) eps - w eps_perturbed        (velocities likewise), computed as eps + w (eps - eps_perturbed)

The model is met at its own call: a forward hook runs it a second time under the perturbation and returns the combination, so a bare
transformer in the user's own loop and the transformer inside a pipeline are the same case, with any scheduler. Written as a difference, it
returns the plain output to the bit where the perturbation changes nothing.

The silent failures this avoids: variances of a model that learns them being extrapolated along with the noise; a strength that a pipeline
multiplies by its classifier-free weight; a step window that counts forward passes instead of steps.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import Intervention
from headscope.interventions.head_edit import HeadEdit, _interval

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headscope.call import AttentionCall
    from headscope.scope import Scope

Branches = tuple[str, ...]

_guided: set[int] = set()
"""Models that a block of this process is guiding, by id."""


@contextmanager
def guided(
    scope: Scope,
    *perturbations: Intervention,
    w: float = 3.0,
    steps: tuple[int, int] | None = None,
    branch: str | None = None,
) -> Iterator[Guidance]:
    """Run the scope's diffusion model under perturbed-attention guidance inside the block.

    `w`: 0 is no guidance, and then nothing is run twice. `steps` (first, end): the window of denoising steps, counted from the block's
    beginning, in which to guide; a perturbation's own `steps` narrows it further.

    `branch`: None guides every row by its own difference. "cond" adds the conditional branch's difference to all branches, so that a
    pipeline's uncond + g (cond - uncond) comes out as uncond + g (cond - uncond) + w (cond - perturbed), which is what pipelines for
    perturbed attention compute with pag_scale = w. A guider that starts from the perturbed output in place of the model's has w + 1.
    Branches that run one after the other must begin with this one.

    Where the model predicts a variance in further channels (out_channels = 2 in_channels), only the prediction is guided.

    Cost: one more forward pass per guided step on the whole batch. An observer of the same scope sees both passes, the plain one first, and
    an edit that is active around the block counts both in its own `steps`. The hook comes off when the block ends, whatever ends it.
    Sources: HeadHunter (arXiv 2506.10978), PAG (arXiv 2403.17377). InterventionError for a scope that holds no diffusion model or one that
    is guided already, for no perturbation, and for a branch that the model does not name.
    """
    guide = _Guide(scope, perturbations, w, steps, branch)
    model: nn.Module = scope.model
    if id(model) in _guided:
        raise refusal(InterventionError, "guided inside of guided", "this model is being guided already", "pass all perturbations at once")
    with ExitStack() as stack:
        stack.enter_context(scope.intervene(guide.listen))
        _guided.add(id(model))
        stack.callback(_guided.discard, id(model))
        # after the scope's own hooks, so that the second pass is one of its own and not a part of the first
        stack.callback(model.register_forward_hook(guide, with_kwargs=True).remove)
        yield guide.report


@dataclass(eq=False)
class Guidance:
    """What a guided block did. `steps`: denoising steps that the model made; `perturbed`: plain passes that were followed by a second."""

    w: float
    steps: int = 0
    perturbed: int = 0
    passes: dict[Any, int] = field(default_factory=dict, repr=False)
    """Plain passes by the guidance branches that they held; a pipeline that runs branches apart makes one of each per step."""

    def count(self, of_rows: Branches | None) -> int:
        """Counts a plain pass, and gives the number of its denoising step."""
        key = None if of_rows is None else tuple(dict.fromkeys(of_rows))
        now = self.passes.get(key, 0)
        self.passes[key] = now + 1
        self.steps = max(self.passes.values())
        return now


@dataclass(frozen=True)
class _Listen(Intervention):
    """Changes nothing: keeps a scope fastened, and remembers which guidance branch each row of the batch is."""

    heard: dict[str, Any] = field(default_factory=dict, compare=False)

    def before(self, call: AttentionCall) -> AttentionCall:
        self.heard["branches"] = call.facts.get("branches")
        return call


class _Guide:
    """The hook: runs the perturbed model and adds the difference."""

    def __init__(self, scope: Scope, perturbations: tuple[Any, ...], w: Any, steps: Any, branch: Any) -> None:
        if scope.host.kind != "diffusers":
            raise refusal(
                InterventionError, "guided", f"{scope.name} is no diffusion model", "pass a scope of a diffusers model or pipeline"
            )
        if not perturbations:
            raise refusal(InterventionError, "guided without perturbation", "there is nothing to run away from", "pass e.g. SoftPAG(heads)")
        if not isinstance(w, int | float) or isinstance(w, bool) or not math.isfinite(w):
            raise refusal(InterventionError, f"w={w!r}", "it is no finite number", "pass w=3.0")
        if branch is not None and not isinstance(branch, str):
            raise refusal(InterventionError, f"branch={branch!r}", "it is one branch's name", "pass branch='cond'")
        for one in perturbations:
            _check(one)
            one.bind(scope)  # refused here, not at the first step
        self.scope, self.w, self.branch = scope, float(w), branch
        self.window = _interval("steps", steps)
        self.windows = [one.steps if isinstance(one, HeadEdit) else None for one in perturbations]
        self.edits = [replace(one, steps=None) if isinstance(one, HeadEdit) else one for one in perturbations]
        self.report = Guidance(self.w)
        self.listen = _Listen()
        self._thread, self._busy = threading.get_ident(), False
        self._kept: tuple[int, Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._busy or threading.get_ident() != self._thread:
            return None
        found = self.listen.heard.get("branches")
        of_rows: Branches | None = found if isinstance(found, tuple) else None
        step = self.report.count(of_rows)
        active = [one for one, when in zip(self.edits, self.windows, strict=True) if _inside(step, when)]
        if self.w == 0.0 or not active or not _inside(step, self.window):
            return None
        plain = _prediction(output)
        if self.branch is not None and (of_rows is None or len(of_rows) != len(plain)):
            given = f"branch={self.branch!r}"
            raise refusal(InterventionError, given, "the model does not say which branch its rows are", "set scope.host.guidance")
        if self.branch is not None and of_rows is not None and self.branch not in of_rows:
            return _put(output, plain + self._earlier(step, plain, of_rows))
        more = self._difference(module, args, kwargs, plain, active)
        if self.branch is not None and of_rows is not None:
            more = _spread(more, of_rows, self.branch)
            self._kept = (step, more)
        return _put(output, plain + more)

    def _difference(self, module: nn.Module, args: Any, kwargs: Any, plain: Tensor, active: list[Intervention]) -> Tensor:
        """w (eps - eps_perturbed), 0 in channels that hold a variance."""
        self._busy = True
        try:
            with self.scope.intervene(*active), _context(module):
                spoilt = _prediction(module(*args, **kwargs))
        finally:
            self._busy = False
        self.report.perturbed += 1
        more = self.w * (plain - spoilt)
        count = _channels(module, plain)
        return more if count is None else torch.cat([more[:, :count], torch.zeros_like(more[:, count:])], 1)

    def _earlier(self, step: int, plain: Tensor, of_rows: Branches) -> Tensor:
        """The difference that the named branch had in this step."""
        if self._kept is None or self._kept[0] != step or self._kept[1].shape != plain.shape:
            raise refusal(
                InterventionError,
                f"branch={self.branch!r}",
                f"the model runs {', '.join(dict.fromkeys(of_rows))} here, and no such branch came before it in this step",
                "pass a branch that the model runs first, or branch=None",
            )
        return self._kept[1]


def _check(one: Any) -> None:
    if not isinstance(one, Intervention):
        raise refusal(InterventionError, repr(one), "it is not an intervention", "pass e.g. SoftPAG(heads)")
    if isinstance(one, HeadEdit) and one.branches is not None:
        given = f"a perturbation with branches={one.branches}"
        raise refusal(InterventionError, given, "which branch is perturbed is the guidance's to say", "pass guided(..., branch='cond')")


def _inside(step: int, window: tuple[int, int] | None) -> bool:
    return window is None or window[0] <= step < window[1]


@contextmanager
def _context(model: Any) -> Iterator[None]:
    """A model that caches between steps keeps this branch apart from the others. Where it has no such state, none is made."""
    named = getattr(model, "cache_context", None)
    if named is None or "_diffusers_hook" not in vars(model):
        yield
        return
    with named("perturbed"):
        yield


def _prediction(output: Any) -> Tensor:
    """The tensor in a model's output."""
    first = output if isinstance(output, torch.Tensor) else output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(first, torch.Tensor):
        given = f"an output of type {type(output).__name__}"
        raise refusal(InterventionError, given, "it holds no prediction that could be guided", "use a denoising transformer or U-Net")
    return first


def _put(output: Any, new: Tensor) -> Any:
    """The output with another tensor in its place."""
    if isinstance(output, torch.Tensor):
        return new
    if isinstance(output, tuple):
        return (new, *output[1:])
    return type(output)(**{**output, "sample": new}) if isinstance(output, Mapping) else replace(output, sample=new)


def _channels(model: Any, prediction: Tensor) -> int | None:
    """How many of the output's channels are the prediction, where others are its variance; None for all."""
    config = getattr(model, "config", None)
    inside, outside = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    learns = isinstance(inside, int) and outside == 2 * inside and prediction.dim() >= 4 and prediction.shape[1] == outside
    return inside if learns else None


def _spread(difference: Tensor, of_rows: Branches, branch: str) -> Tensor:
    """The rows of one branch in the place of every branch's rows. InterventionError for branches of unequal size."""
    names = list(dict.fromkeys(of_rows))
    places = {name: [row for row, one in enumerate(of_rows) if one == name] for name in names}
    if len({len(rows) for rows in places.values()}) > 1:
        given = f"a batch of {', '.join(of_rows)}"
        raise refusal(InterventionError, given, "its branches have unequal numbers of rows", "pass batches that hold each branch in full")
    out = torch.empty_like(difference)
    for rows in places.values():
        out[rows] = difference[places[branch]]
    return out


__all__ = ["Guidance", "guided"]

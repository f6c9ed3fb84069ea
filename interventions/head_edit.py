"""HeadEdit: what all edits of heads share, which is to say which heads, where, and how that is written down.

A subclass says what it does to one call of one module; everything that decides whether a call is met at all (heads, layers, phase,
positions, denoising steps, guidance branches) is settled here, once. Binding checks it against the model, so that a head or a phase
which the model does not have is refused before anything runs.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import Intervention, heads_of, resolve
from headscope.interventions.where import PHASES, Phase, image_token_of, positions_json, read_positions, rows_of, step_of
from headscope.kernels.partial import head_index

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

Site = Literal["S", "P", "Z", "R"]
"""Scores before the softmax, probabilities, head outputs before W_O, the residual stream: the order in which edits act."""

Rows = Any
"""True for all rows, or a bool mask [1 or B, Nq]."""

E_ = TypeVar("E_", bound="HeadEdit")


@dataclass(slots=True, eq=False)
class Bound:
    """What an edit looked up in a model. `heads`: module -> query heads. `places`: module -> where each of these stands in the edit's
    own list of heads. `first_step`: the denoising step at which the edit first ran."""

    heads: dict[str, list[int]]
    places: dict[str, list[int]]
    image_token: int | None = None
    first_step: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """Whatever else a subclass keeps while it is bound."""


@dataclass(frozen=True)
class HeadEdit(Intervention):
    """An edit of heads. `heads`: pairs [(18, 6), (17, 3)], "18.6,17.3", a HeadSet, or "all" for the whole main stack; a layer is its
    number or its module's name, heads are query heads. The rest narrows where it acts:

    - `phase`: "prefill", "decode" (one query row behind a cache) or "both".
    - `positions`: query positions, counted from 0 with padding in front: a slice, a list, a bool mask [N] or [B, N], "last_prompt" (the
      last real token of a prefill), "image" or "text".
    - `layers`: (first, end) layer numbers; heads elsewhere are left alone. `steps`: (first, end) denoising steps since the block began.
    - `branches`: guidance branches, e.g. ("cond",), of a diffusion model's batch.

    Edits act in the order of their sites, scores, probabilities, outputs. Two that meet at one site of one head, and would give something
    else the other way round, are refused unless both have an `order`, smaller first.
    """

    heads: Any
    phase: Phase = field(default="both", kw_only=True)
    positions: Any = field(default=None, kw_only=True)
    layers: tuple[int, int] | None = field(default=None, kw_only=True)
    steps: tuple[int, int] | None = field(default=None, kw_only=True)
    branches: tuple[str, ...] | None = field(default=None, kw_only=True)
    order: int | None = field(default=None, kw_only=True)
    _bound: Bound | None = field(default=None, repr=False, compare=False, kw_only=True)

    site: ClassVar[Site] = "Z"

    def __post_init__(self) -> None:
        if not (isinstance(self.heads, str) and self.heads == "all"):
            object.__setattr__(self, "heads", heads_of(self.heads))
        if self.phase not in PHASES:
            raise unknown_name(InterventionError, "phase", self.phase, PHASES)
        object.__setattr__(self, "positions", read_positions(self.positions))
        for name in ("layers", "steps"):
            object.__setattr__(self, name, _interval(name, getattr(self, name)))
        if self.order is not None and (not isinstance(self.order, int) or isinstance(self.order, bool)):
            raise refusal(InterventionError, f"order={self.order!r}", "it is no integer", "pass order=1, order=2, ...")
        if self.branches is not None:
            named = (self.branches,) if isinstance(self.branches, str) else tuple(self.branches)
            object.__setattr__(self, "branches", named)

    # ---- binding ------------------------------------------------------------------------------------------------

    def bind(self: E_, scope: Scope) -> E_:
        """A copy that knows its heads by module; InterventionError for what the model does not have."""
        pairs = self.pairs(scope)
        if self.phase == "decode" and not all(module.causal for module in scope.topology.main):
            raise refusal(
                InterventionError, "phase='decode'", f"{scope.name} does not write token by token", "pass phase='both', or leave it out"
            )
        if (self.steps is not None or self.branches is not None) and scope.host.kind != "diffusers":
            raise refusal(
                InterventionError,
                f"{type(self).__name__} with steps= or branches=",
                f"{scope.name} is no diffusion model",
                "leave them out",
            )
        heads = resolve(pairs, scope.topology)
        places: dict[str, list[int]] = {}
        for place, (layer, _) in enumerate(pairs):
            places.setdefault(scope.topology[layer].name, []).append(place)
        if self.layers is not None:
            first, end = self.layers
            kept = {m.name for m in scope.topology.main if m.layer is not None and first <= m.layer < end}
            if not kept & heads.keys():
                raise refusal(
                    InterventionError,
                    f"layers={self.layers}",
                    "none of the heads is in these layers",
                    "pass heads of these layers, or others",
                )
            heads = {name: value for name, value in heads.items() if name in kept}
        image = image_token_of(scope)
        if isinstance(self.positions, str) and self.positions == "image" and scope.host.kind != "diffusers" and image is None:
            raise refusal(
                InterventionError, "positions='image'", f"{scope.name} has no image tokens", "use a vision-language or a diffusion model"
            )
        return replace(self, _bound=Bound(heads, places, image))

    def pairs(self, scope: Scope) -> tuple[tuple[int | str, int], ...]:
        """The heads as pairs, "all" written out."""
        if isinstance(self.heads, str):
            main = [module for module in scope.topology.main if not module.capturable]
            return tuple((module.layer, head) for module in main for head in range(module.heads) if module.layer is not None)
        pairs: tuple[tuple[int | str, int], ...] = self.heads
        return pairs

    @property
    def bound(self) -> Bound:
        """What binding found. InterventionError for an edit that was not bound."""
        if self._bound is None:
            raise refusal(InterventionError, f"{type(self).__name__}", "it is not bound to a model", "use scope.intervene(...)")
        return self._bound

    def heads_in(self, call: AttentionCall) -> list[int]:
        """The edit's heads in a call's module; empty when it leaves the module alone."""
        return self.bound.heads.get(call.module, [])

    def places_in(self, call: AttentionCall) -> list[int]:
        """Where these heads stand in the edit's list."""
        return self.bound.places.get(call.module, [])

    def rows_in(self, call: AttentionCall) -> Tensor | Literal[True] | None:
        """The rows to edit: True for all, None for none, else a bool mask [1 or B, Nq]."""
        if self.steps is not None:
            now = step_of(call)
            if self.bound.first_step is None:
                self.bound.first_step = now
            if not self.steps[0] <= now - self.bound.first_step < self.steps[1]:
                return None
        return rows_of(call, self.phase, self.positions, self.branches, self.bound.image_token)

    # ---- acting -------------------------------------------------------------------------------------------------

    folds: ClassVar[bool] = False
    """Whether the edit is a fold over the rows' normalisers."""

    def wants_lse(self, call: AttentionCall) -> bool:
        """For an edit that folds, where it has heads."""
        return self.folds and bool(self.heads_in(call))

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call to run: `edit_call` where the edit acts."""
        if type(self).edit_call is HeadEdit.edit_call:
            return call
        heads = self.heads_in(call)
        rows = self.rows_in(call) if heads else None
        return call if rows is None else self.edit_call(call, heads, rows)

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The heads' outputs [B, Nq, Hq, Dv] to go on with: `edit_output` where the edit acts."""
        if type(self).edit_output is HeadEdit.edit_output:
            return output
        heads = self.heads_in(call)
        rows = self.rows_in(call) if heads else None
        return output if rows is None else self.edit_output(call, output, heads, rows)

    def edit_call(self, call: AttentionCall, heads: list[int], rows: Rows) -> AttentionCall:
        """The call with these heads edited at these rows (True: all), or the very object."""
        return call

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """The outputs with these heads edited, on a copy, or the very object."""
        return output

    def acts_at(self) -> Site:
        """The site of this very edit."""
        return self.site

    def algebra(self) -> str:
        """What kind of map it is at its site, by which edits are known to commute; see `stacking`."""
        return type(self).__name__

    # ---- writing down -------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, heads first, as plain data; tensors stay Values."""
        out: dict[str, Any] = {"heads": self.heads if isinstance(self.heads, str) else [list(pair) for pair in self.heads]}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "heads" or one.name.startswith("_"):
                continue
            if value != one.default or one.default is MISSING or one.name in self.always_written:
                out[one.name] = positions_json(value) if one.name == "positions" else list(value) if isinstance(value, tuple) else value
        return out

    always_written: ClassVar[tuple[str, ...]] = ()
    """Fields that stand in JSON whatever their value."""

    def explain(self) -> str:
        """In words: what is done, to which heads, where, and at what cost."""
        return f"{self.what()}, {self.whose()}{self.where()}; cost: {self.cost()}"

    def what(self) -> str:
        """What is done to a head, in words."""
        return type(self).__name__

    def cost(self) -> str:
        """What it costs per call, in words."""
        return "a copy of the heads' outputs, O(N d)"

    def whose(self) -> str:
        """Which heads, in words."""
        if isinstance(self.heads, str):
            return "all heads"
        names = [f"{layer}.{head}" for layer, head in self.heads]
        return f"{'head' if len(names) == 1 else 'heads'} {', '.join(names[:12])}" + (
            f" and {len(names) - 12} more" if len(names) > 12 else ""
        )

    def where(self) -> str:
        """Where it acts, in words, beginning with a comma; empty for everywhere."""
        parts = [] if self.phase == "both" else [f"in {self.phase} only"]
        if self.positions is not None:
            parts.append({"last_prompt": "at the last prompt token"}.get(str(self.positions), f"at positions {_short(self.positions)}"))
        if self.layers is not None:
            parts.append(f"layers {self.layers[0]} to {self.layers[1] - 1}")
        if self.steps is not None:
            parts.append(f"denoising steps {self.steps[0]} to {self.steps[1] - 1}")
        if self.branches is not None:
            parts.append(f"branches {', '.join(self.branches)}")
        if self.order is not None:
            parts.append(f"place {self.order} among the edits of its site")
        return "".join(f", {part}" for part in parts)


def taken(output: Tensor, heads: list[int]) -> Tensor:
    """[B, Nq, len(heads), Dv]: some heads of an output [B, Nq, Hq, Dv], to be read; all of them are the output itself."""
    return output if _all(output, heads) else output[:, :, head_index(tuple(heads), output.device)]


def _all(output: Tensor, heads: list[int]) -> bool:
    return len(heads) == output.shape[2] and heads == list(range(output.shape[2]))


def merged(output: Tensor, heads: list[int], rows: Rows, new: Tensor) -> Tensor:
    """`output` [B, Nq, Hq, Dv] with `new` [B, Nq, len(heads), Dv] for these heads at these rows, on a copy, in its own dtype."""
    if rows is True and _all(output, heads):
        return torch.empty_like(output).copy_(new)  # one kernel for cast and copy
    changed = output.clone()
    new = new.to(output.dtype)
    index = head_index(tuple(heads), output.device)
    changed[:, :, index] = new if rows is True else torch.where(rows[:, :, None, None], new, output[:, :, index])
    return changed


def _interval(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, range):
        value = (value.start, value.stop)
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(isinstance(one, int) and not isinstance(one, bool) for one in pair) or not 0 <= pair[0] < pair[1]:
        raise refusal(InterventionError, f"{name}={value!r}", "it is (first, end) with 0 <= first < end", f"pass e.g. {name}=(0, 8)")
    return pair[0], pair[1]


def _short(positions: Any) -> str:
    if isinstance(positions, slice):
        return f"{positions.start or 0} to {'the end' if positions.stop is None else positions.stop - 1}"
    if isinstance(positions, tuple):
        return ", ".join(str(one) for one in positions[:8]) + ("..." if len(positions) > 8 else "")
    return f"of class {positions}" if isinstance(positions, str) else "of a mask"


__all__ = ["Bound", "HeadEdit", "Rows", "Site", "merged", "taken"]

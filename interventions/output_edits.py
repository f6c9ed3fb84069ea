"""Edits of head outputs before W_O, as interventions: Scale, Replace, Lerp, Add, Noise (see `z_site`); zero and its kind are HeadMask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from headscope.errors import InterventionError, refusal
from headscope.interventions import z_site
from headscope.interventions.base import register
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.head_values import check_values, values_at
from headscope.interventions.score_edits import _number
from headscope.interventions.values import Values
from headscope.kernels.partial import head_index

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

V_ = TypeVar("V_", bound="ValueEdit")


@register("scale")
@dataclass(frozen=True)
class Scale(HeadEdit):
    """z := `gamma` z, one number or one per head."""

    gamma: Any = 1.0

    site: ClassVar[Site] = "Z"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", per_head(self.gamma, "gamma"))

    def bind(self, scope: Scope) -> Scale:
        """A copy that knows its heads by module."""
        check_count(self.gamma, len(self.pairs(scope)), "gamma")
        return super().bind(scope)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Heads scaled."""
        return z_site.scale(call, output, heads, at_places(self.gamma, self.places_in(call), output), rows)

    def algebra(self) -> str:
        """Factors multiply."""
        return "scale"

    def what(self) -> str:
        """In words."""
        return (
            f"multiply the head's output by {self.gamma:g}"
            if isinstance(self.gamma, float)
            else "multiply each head's output by its factor"
        )


@dataclass(frozen=True)
class ValueEdit(HeadEdit):
    """A HeadEdit with `values`: [heads, Dv], [heads, N, Dv] or [B, heads, N, Dv] in the order of `heads`."""

    values: Any

    site: ClassVar[Site] = "Z"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values is None:
            raise refusal(InterventionError, "values=None", "there is nothing to use", "pass [heads, Dv]")
        object.__setattr__(self, "values", Values.of(self.values))

    def bind(self: V_, scope: Scope) -> V_:
        """A copy that knows its heads by module; InterventionError for values of other heads."""
        bound = super().bind(scope)
        check_values(self.values, self.pairs(scope), scope, "values")
        return bound

    def values_in(self, call: AttentionCall, output: Tensor, rows: Rows) -> Tensor:
        """[B or 1, Nq or 1, h, Dv] of a call's heads."""
        return values_at(self.values, self.places_in(call), call, output, rows, type(self).__name__)


@register("replace")
@dataclass(frozen=True)
class Replace(ValueEdit):
    """z := `values`."""

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Heads replaced."""
        return z_site.replace(call, output, heads, self.values_in(call, output, rows), rows)

    def algebra(self) -> str:
        """Puts something else in place."""
        return "replace"

    def what(self) -> str:
        """In words."""
        return "replace the head's output by given values"


@register("lerp")
@dataclass(frozen=True)
class Lerp(ValueEdit):
    """z := (1 - `alpha`) z + `alpha` c, c the `values`; alpha one number or one per head.

    With positions="last_prompt" the form of Soft Injection (arXiv 2507.20906)."""

    alpha: Any = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", per_head(self.alpha, "alpha"))

    def bind(self, scope: Scope) -> Lerp:
        """A copy that knows its heads by module."""
        check_count(self.alpha, len(self.pairs(scope)), "alpha")
        return super().bind(scope)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Heads moved towards their values."""
        if self.alpha == 0.0:
            return output
        alpha = at_places(self.alpha, self.places_in(call), output)
        return z_site.lerp(call, output, heads, self.values_in(call, output, rows), alpha, rows)

    def algebra(self) -> str:
        """Depends on what it meets."""
        return "lerp"

    def what(self) -> str:
        """In words."""
        share = f"by {self.alpha:g}" if isinstance(self.alpha, float) else "by its own share"
        return f"move the head's output {share} towards given values"


@register("add")
@dataclass(frozen=True)
class Add(ValueEdit):
    """z := z + `factor` c, c the `values`."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("factor", self.factor)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Values added."""
        if self.factor == 0.0:
            return output
        return z_site.add(call, output, heads, self.values_in(call, output, rows), float(self.factor), rows)

    def algebra(self) -> str:
        """Sums."""
        return "add"

    def what(self) -> str:
        """In words."""
        return f"add {self.factor:g} times given values to the head's output"


@register("noise")
@dataclass(frozen=True)
class Noise(HeadEdit):
    """z := z + `sigma` e, e standard normal by `seed` and place, the same at a position however it is reached. `relative`: sigma counts in
    root mean squares of the row's own z."""

    sigma: float = 1.0
    seed: int = 0
    relative: bool = False

    site: ClassVar[Site] = "Z"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _number("sigma", self.sigma) >= 0.0:
            raise refusal(InterventionError, f"sigma={self.sigma}", "a spread is not negative", "pass 0 or more")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise refusal(InterventionError, f"seed={self.seed!r}", "it is no integer", "pass seed=0")

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Noise added."""
        return z_site.noise(call, output, heads, float(self.sigma), self.seed, rows, self.relative)

    def algebra(self) -> str:
        """Sums, unless it is measured by what it meets."""
        return "lerp" if self.relative else "add"

    def what(self) -> str:
        """In words."""
        return f"add noise of {self.sigma:g}{' times its own size' if self.relative else ''} to the head's output (seed {self.seed})"


def per_head(given: Any, name: str) -> Any:
    """A float, or Values [heads]."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        return _number(name, given)
    values = Values.of(given)
    if values is None or len(values.shape) != 1:
        raise refusal(InterventionError, f"{name}={str(given)[:40]}", "it is neither a number nor one per head", f"pass {name}=0.5")
    return values


def check_count(given: Any, heads: int, name: str) -> None:
    """InterventionError for another number of values than heads."""
    if isinstance(given, Values) and given.shape[0] != heads:
        raise refusal(InterventionError, f"{given.shape[0]} values of {name}", f"there are {heads} heads", "pass one per head, or a number")


def at_places(given: Any, places: list[int], like: Tensor) -> Any:
    """The float, or the values [h] of a call's heads."""
    return given.like(like)[head_index(tuple(places), like.device)] if isinstance(given, Values) else given


__all__ = ["Add", "Lerp", "Noise", "Replace", "Scale", "ValueEdit", "at_places", "check_count", "per_head"]

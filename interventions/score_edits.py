"""Edits of attention scores, as interventions: KeyBias, SetBias, Temperature, ReplaceQueries, BoostScores (see `s_site`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions import s_site
from headscope.interventions.base import register
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.keys import key_set, read_keys, refuse_classes
from headscope.interventions.where import positions_json

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

APART = "temperatures computed afterwards"
FOLDED = "the heads' normalisers by one pass of the statistics kernel and sums over the set, O(N |X| d)"


K_ = TypeVar("K_", bound="KeyEdit")


@dataclass(frozen=True)
class KeyEdit(HeadEdit):
    """A HeadEdit that names a set of keys: "first", "image", "text", positions, a slice, or a bool mask [N] or [B, N] (see `keys`)."""

    keys: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", read_keys(self.keys))

    def bind(self: K_, scope: Scope) -> K_:
        """A copy that knows its heads by module; InterventionError for kinds of tokens that the model does not have."""
        refuse_classes(self.keys, scope)
        return super().bind(scope)

    def named(self, call: AttentionCall) -> Tensor:
        """Bool [1 or B, Nk]: the keys in a call."""
        return key_set(call, self.keys, self.bound.image_token)

    def settings(self) -> dict[str, Any]:
        """The fields as they go into JSON."""
        return {**super().settings(), "keys": positions_json(self.keys)}


@register("key_bias")
@dataclass(frozen=True)
class KeyBias(KeyEdit):
    """s_ij += `bias` for the keys named, in every row or in the rows given; -inf hides them.

    A factor c on their weights, renormalised, is bias = ln c. ZeroTuning (2025, arXiv 2505.11739) is this on the first token.
    """

    bias: float = 0.0

    site: ClassVar[Site] = "S"

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("bias", self.bias, low=-math.inf)

    def _everywhere(self) -> bool:
        return self.positions is None and self.branches is None

    def edit_call(self, call: AttentionCall, heads: list[int], rows: Rows) -> AttentionCall:
        """In every row: one number per key, before the call."""
        if not self._everywhere() or self.bias == 0.0:
            return call
        keys = self.named(call)
        return s_site.key_bias(
            call, heads, torch.zeros(keys.shape, dtype=torch.float64, device=keys.device).masked_fill(keys, float(self.bias))
        )

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """At some rows: folded in afterwards."""
        return output if self._everywhere() else s_site.set_bias(call, output, heads, self.named(call), float(self.bias), rows)

    def algebra(self) -> str:
        """Biases add up."""
        return "bias"

    def what(self) -> str:
        """In words."""
        return f"add {self.bias:g} to the scores of the keys {_words(self.keys)}"

    def cost(self) -> str:
        """In words."""
        return FOLDED if not self._everywhere() else "exact attention of these heads in blocks, O(N d) memory; the others run as they are"


@register("set_bias")
@dataclass(frozen=True)
class SetBias(KeyEdit):
    """s_ij += b_i for the keys named: `bias` in every row, or the bias that gives them the share `mass` of each row."""

    bias: float | None = None
    mass: float | None = None

    site: ClassVar[Site] = "S"
    folds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bias is None) == (self.mass is None):
            raise refusal(InterventionError, f"bias={self.bias}, mass={self.mass}", "one of them says what to do", "pass bias= or mass=")
        if self.bias is not None:
            _number("bias", self.bias, low=-math.inf)
        elif not 0.0 < float(_number("mass", self.mass)) < 1.0:
            raise refusal(InterventionError, f"mass={self.mass}", "it is a share of the row", "pass a number between 0 and 1")

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Folded in afterwards."""
        if self.bias is not None:
            return s_site.set_bias(call, output, heads, self.named(call), float(self.bias), rows)
        assert self.mass is not None
        return s_site.set_mass(call, output, heads, self.named(call), float(self.mass), rows)

    def algebra(self) -> str:
        """A constant adds up with other biases; a share depends on what was there."""
        return "bias" if self.bias is not None else "boost"

    def what(self) -> str:
        """In words."""
        how = f"add {self.bias:g} to the scores of" if self.bias is not None else f"give {self.mass:.0%} of each row's attention to"
        return f"{how} the keys {_words(self.keys)}"

    def cost(self) -> str:
        """In words."""
        return FOLDED


@register("boost_scores")
@dataclass(frozen=True)
class BoostScores(KeyEdit):
    """s_ij += `factor` |s_ij| for the keys named. PAI (2024, arXiv 2407.21771) and PAINT (2025, arXiv 2501.12206) on image tokens.

    |s| moves a negative score towards zero, so factor 1 maps every negative score to 0.
    """

    factor: float = 0.0

    site: ClassVar[Site] = "S"
    folds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("factor", self.factor)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Folded in afterwards."""
        return s_site.abs_boost(call, output, heads, self.named(call), float(self.factor), rows)

    def algebra(self) -> str:
        """Depends on the scores it meets."""
        return "boost"

    def what(self) -> str:
        """In words."""
        return f"add {self.factor:g} times their size to the scores of the keys {_words(self.keys)}"

    def cost(self) -> str:
        """In words."""
        return FOLDED


@register("temperature")
@dataclass(frozen=True)
class Temperature(HeadEdit):
    """s_ij /= `tau`: sharper below 1, flatter above. Everything under the exponent is divided, soft cap, bias and sink logits included,
    so that A' is proportional to A ** (1 / tau)."""

    tau: float = 1.0

    site: ClassVar[Site] = "S"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _number("tau", self.tau) > 0.0:
            raise refusal(InterventionError, f"tau={self.tau}", "scores are divided by it", "pass a positive number")

    def edit_call(self, call: AttentionCall, heads: list[int], rows: Rows) -> AttentionCall:
        """By the queries, or for all heads of a module by its scale; else noted, to be computed afterwards."""
        changed = s_site.temperature_before(call, heads, float(self.tau), rows)
        if changed is not None:
            return changed
        noted = call.facts.setdefault(APART, [])
        assert isinstance(noted, list)
        noted.append((self, call.mask.bias))
        return call

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Some heads of a model with a soft cap, a bias or sink logits: computed anew."""
        noted: Any = call.facts.get(APART, [])
        mine = [bias for one, bias in noted if one is self]
        if not mine:
            return output
        if mine[0] is not call.mask.bias:
            raise refusal(
                InterventionError,
                f"a temperature before a key bias in {call.module}",
                "with this model's soft cap or sink logits the bias would be divided as well",
                "let the key bias come first (order=)",
            )
        return s_site.temperature_after(call, output, heads, float(self.tau), rows)

    def algebra(self) -> str:
        """Temperatures multiply."""
        return "temperature"

    def what(self) -> str:
        """In words."""
        return f"divide the scores by {self.tau:g}"

    def cost(self) -> str:
        """In words."""
        return "a copy of q; with a soft cap, bias or sinks, exact attention of these heads in blocks"


@register("replace_queries")
@dataclass(frozen=True)
class ReplaceQueries(HeadEdit):
    """q := 0 (`how`="zero", causal uniform attention), the mean query ("mean", SEG with infinite blur) or q blurred over the image ("blur",
    `sigma` in tokens, `grid` (height, width) of the image, None for a square). SEG: Hong (2024, arXiv 2408.00760); "mean" and "blur" need
    bidirectional attention."""

    how: Literal["zero", "mean", "blur"] = "zero"
    sigma: float | None = None
    grid: tuple[int, int] | None = None

    site: ClassVar[Site] = "S"
    always_written: ClassVar[tuple[str, ...]] = ("how",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in ("zero", "mean", "blur"):
            raise unknown_name(InterventionError, "how", self.how, ("zero", "mean", "blur"))
        if (self.how == "blur") != (self.sigma is not None) or (self.sigma is not None and not _number("sigma", self.sigma) >= 0.0):
            raise refusal(InterventionError, f"how={self.how!r}, sigma={self.sigma}", "a blur has a width", "pass how='blur', sigma=1.0")
        if self.grid is not None:
            sides = tuple(self.grid)
            if self.how != "blur" or len(sides) != 2 or not all(isinstance(one, int) and one > 0 for one in sides):
                raise refusal(
                    InterventionError, f"grid={self.grid}", "it is the (height, width) that a blur runs over", "pass grid=(32, 48)"
                )
            object.__setattr__(self, "grid", sides)

    def edit_call(self, call: AttentionCall, heads: list[int], rows: Rows) -> AttentionCall:
        """The call with other queries."""
        return s_site.query_replace(call, heads, self.how, rows, self.sigma, self.grid)

    def algebra(self) -> str:
        """Puts other queries in place."""
        return "query"

    def what(self) -> str:
        """In words."""
        return {
            "zero": "set the queries to zero",
            "mean": "replace every query by the mean query",
            "blur": f"blur the queries over the image, sigma {self.sigma}",
        }[self.how]

    def cost(self) -> str:
        """In words."""
        return "a copy of q"


def _number(name: str, value: Any, low: float | None = None) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and (math.isfinite(value) or value == low)
    if not ok:
        raise refusal(InterventionError, f"{name}={value!r}", "it is no number that scores can take", f"pass {name}=0.5")
    return float(value)


def _words(keys: Any) -> str:
    if isinstance(keys, str):
        return {"first": "of the first token"}.get(keys, f"of {keys} tokens")
    if isinstance(keys, tuple):
        return "at " + ", ".join(str(one) for one in keys[:8]) + ("..." if len(keys) > 8 else "")
    if isinstance(keys, slice):
        return f"{keys.start or 0} to {'the end' if keys.stop is None else keys.stop - 1}"
    return "of a mask"


__all__ = ["BoostScores", "KeyBias", "KeyEdit", "ReplaceQueries", "SetBias", "Temperature"]

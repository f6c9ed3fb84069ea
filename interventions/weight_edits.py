"""Edits of attention probabilities, as interventions: Redistribute, Mix, SetRows, RescaleRows (see `p_site`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions import p_site
from headscope.interventions.base import register
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.keys import OTHERS, key_set, read_keys, refuse_classes
from headscope.interventions.patterns import PATTERNS
from headscope.interventions.score_edits import FOLDED, KeyEdit, _number, _words
from headscope.interventions.values import Values
from headscope.interventions.where import positions_json

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope


@register("redistribute")
@dataclass(frozen=True)
class Redistribute(KeyEdit):
    """Keep the share `keep` of the attention on `keys` and give the rest to `target` ("others", or a key set) in proportion to the
    attention there. Rows with no attention on the target stay as they are.

    The common form of ACT (arXiv 2406.15765), VAR (arXiv 2503.03321) and their relatives; it is no constant key bias.
    """

    keep: float = 1.0
    target: Any = OTHERS

    site: ClassVar[Site] = "P"
    folds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "target", read_keys(self.target, others=True))
        if not _number("keep", self.keep) >= 0.0:
            raise refusal(InterventionError, f"keep={self.keep}", "a share of attention is not negative", "pass a number from 0 to 1")

    def bind(self, scope: Scope) -> Redistribute:
        """A copy that knows its heads by module; InterventionError for kinds of tokens that the model does not have."""
        refuse_classes(self.target, scope)
        return super().bind(scope)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Folded in afterwards."""
        if self.keep == 1.0:
            return output
        source = self.named(call)
        target = None if isinstance(self.target, str) and self.target == OTHERS else key_set(call, self.target, self.bound.image_token)
        return p_site.redistribute(call, output, heads, source, target, keep=float(self.keep), rows=rows)

    def settings(self) -> dict[str, Any]:
        """The fields as they go into JSON."""
        return {**super().settings(), "target": positions_json(self.target)}

    def algebra(self) -> str:
        """The second one meets what the first one left."""
        return "redistribute"

    def what(self) -> str:
        """In words."""
        to = "the other keys" if self.target == OTHERS else f"the keys {_words(self.target)}"
        return f"keep {self.keep:.0%} of the attention on the keys {_words(self.keys)} and give the rest to {to}"

    def cost(self) -> str:
        """In words."""
        return f"{FOLDED}; rows that leave little are summed over all keys"


@register("mix")
@dataclass(frozen=True)
class Mix(HeadEdit):
    """A' = (1 - u) A + u P with `pattern` P: "identity" (each query its own value), "uniform" (equal weights on what it may see),
    "argmax" (all on the largest weight) or "query_mean" (attention of the mean query).

    Identity with u = 1 is PAG (arXiv 2403.17377), with less SoftPAG, and the others its relatives in HeadHunter (arXiv 2506.10978).
    """

    pattern: Literal["identity", "uniform", "argmax", "query_mean"] = "identity"
    u: float = 1.0

    site: ClassVar[Site] = "P"
    always_written: ClassVar[tuple[str, ...]] = ("pattern", "u")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in PATTERNS:
            raise unknown_name(InterventionError, "pattern", self.pattern, PATTERNS)
        if not 0.0 <= _number("u", self.u) <= 1.0:
            raise refusal(InterventionError, f"u={self.u}", "it is a share", "pass a number from 0 to 1")

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Mixed with the kernel's output."""
        return p_site.mix(call, output, heads, self.pattern, float(self.u), rows)

    def algebra(self) -> str:
        """The later of two has the last word."""
        return "mix"

    def what(self) -> str:
        """In words."""
        return f"mix the attention with the {self.pattern.replace('_', ' ')} pattern, u = {self.u:g}"

    def cost(self) -> str:
        """In words."""
        return {
            "identity": "a copy of the heads' outputs, O(N d)",
            "uniform": "a running sum of v, O(N d) per head",
            "argmax": "one pass of the statistics kernel over these heads",
            "query_mean": "one row of attention per head where every query sees the same keys",
        }[self.pattern]


@register("set_rows")
@dataclass(frozen=True)
class SetRows(HeadEdit):
    """Let the rows given attend to `keys` (absolute positions) with `weights` (equal ones if None) and to nothing else.

    With two keys and positions="last_prompt" it is the circuit-reuse edit (Merullo et al. 2023, arXiv 2310.08744).
    """

    keys: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    site: ClassVar[Site] = "P"

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = read_keys(self.keys)
        if not isinstance(keys, tuple):
            raise refusal(InterventionError, f"keys={self.keys!r}", "a row is set key by key", "pass a list of positions")
        weights = tuple(1.0 / len(keys) for _ in keys) if self.weights is None else tuple(_number("weights", one) for one in self.weights)
        if len(weights) != len(keys):
            raise refusal(InterventionError, f"{len(weights)} weights for {len(keys)} keys", "they go together", "pass as many, or none")
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "weights", weights)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Rows replaced."""
        assert self.weights is not None
        keys, weights = torch.tensor(self.keys), torch.tensor(self.weights, dtype=torch.float64)
        return p_site.set_rows(call, output, heads, keys, weights, rows)

    def algebra(self) -> str:
        """Puts other rows in place."""
        return "rows"

    def what(self) -> str:
        """In words."""
        return f"attend to the keys {_words(self.keys)} alone"


@register("rescale_rows")
@dataclass(frozen=True)
class RescaleRows(HeadEdit):
    """Multiply rows of attention by `factor`: a number, or values [N] or [B, N] by absolute query position; rows then sum to it, not to
    one.

    Re-ttention (arXiv 2505.22918) with factor = exp(lse_sparse - lse_full).
    """

    factor: Any = 1.0

    site: ClassVar[Site] = "P"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.factor, int | float):
            object.__setattr__(self, "factor", Values.of(self.factor))
            if len(self.factor.shape) not in (1, 2):
                raise refusal(InterventionError, f"factor {list(self.factor.shape)}", "it is one number per row", "pass [N] or [B, N]")
        else:
            _number("factor", self.factor)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Rows scaled."""
        if not isinstance(self.factor, Values):
            return p_site.row_rescale(call, output, heads, float(self.factor), rows)
        first, end = call.query_offset, call.query_offset + call.q.shape[2]
        if end > self.factor.shape[-1]:
            raise refusal(
                InterventionError,
                f"a factor for {self.factor.shape[-1]} rows",
                f"row {end - 1} has none",
                "pass one for every row, or a number",
            )
        return p_site.row_rescale(call, output, heads, self.factor.like(output)[..., first:end], rows)

    def algebra(self) -> str:
        """Factors multiply."""
        return "rescale"

    def what(self) -> str:
        """In words."""
        return (
            f"multiply rows of attention by {self.factor:g}" if isinstance(self.factor, int | float) else "multiply rows by given factors"
        )


__all__ = ["Mix", "Redistribute", "RescaleRows", "SetRows"]

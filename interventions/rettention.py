"""Rettention: attend to few keys in most denoising steps, with the size that each row had when it last saw all of them.

    full steps    z_i as it is;  rho_i = sum_{j in X} A_ij = exp(lse_sparse,i - lse_full,i)  and  r_i = z_i - rho_i z_sparse,i  are kept
    other steps   z'_i = (rho_i + drift n) z_sparse,i + r_i,     z_sparse the softmax over the kept keys X alone, n the sparse steps so far

A softmax over X alone gives X all the mass that it shared before; the cached ratio gives it back its share, and the cached rest what it
leaves out. With a ratio of the same step the output is the full one. The silent failure this avoids: rows that sum to one over a tenth of
their keys.

This says what such a schedule does to a model, not how fast it is: the host's full kernel runs as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import register
from headscope.interventions.fold import Fold, as_set, refuse_gradients
from headscope.interventions.head_edit import Rows, Site, merged
from headscope.interventions.p_site import row_rescale
from headscope.interventions.score_edits import KeyEdit, _number, _words

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope


@dataclass(slots=True, eq=False)
class Kept:
    """One module (and guidance branch): steps so far, sparse steps so far, and what the last full step left."""

    steps: int = 0
    sparse: int = 0
    ratio: Tensor | None = None
    rest: Tensor | None = None


@register("rettention")
@dataclass(frozen=True)
class Rettention(KeyEdit):
    """Re-ttention (2025, arXiv 2505.22918) for one set of kept keys.

    `keys`: those that sparse steps attend to (see `keys`; e.g. "text", a slice, a mask). `full`: how many first steps are full (official
    code: 15); of those after them every `every`-th is (5). `drift`: added to the ratio with every sparse step since the beginning (official
    code: 0.04, a constant by which the ratio may pass 1; 0 here). `residual`: whether the cached rest is added.

    Steps are counted per attention module and guidance branch. Departure: the rest is what is missing of the rescaled sparse output, so
    that a step in which nothing changed is reproduced; the sparse pattern is one set of keys for all rows.
    """

    full: int = 15
    every: int = 5
    drift: float = 0.0
    residual: bool = True

    site: ClassVar[Site] = "P"
    always_written: ClassVar[tuple[str, ...]] = ("full", "every")

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("drift", self.drift)
        for name in ("full", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                given = f"{name}={value!r}"
                raise refusal(InterventionError, given, "the first step has nothing cached, and steps count from 1", f"pass {name}=5")
        if not isinstance(self.residual, bool):
            raise refusal(InterventionError, f"residual={self.residual!r}", "it is a switch", "pass residual=True or False")

    def bind(self, scope: Scope) -> Rettention:
        """A copy that knows its heads by module; InterventionError for a model that makes no steps."""
        if scope.host.kind != "diffusers":
            raise refusal(InterventionError, "Rettention", f"{scope.name} makes no denoising steps", "use it on a diffusion model")
        return super().bind(scope)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """The full output in full steps, to the bit; else the sparse one, rescaled."""
        refuse_gradients(output, "Rettention")
        memory: Kept = self.bound.state.setdefault(f"{call.module} {call.facts.get('branches')}", Kept())
        step, memory.steps = memory.steps, memory.steps + 1
        keys = as_set(self.named(call))
        if not bool(keys.any()):
            raise refusal(InterventionError, f"Rettention in {call.module}", "none of its keys is kept", "pass keys that it has")
        mass, total = (one.nan_to_num(nan=0.0) for one in Fold.of(call).partial(heads, keys))  # NaN on padding
        if step < self.full or (step - self.full) % self.every == self.every - 1:
            memory.ratio, memory.rest = mass, output[:, :, heads].transpose(1, 2).to(total.dtype) - total
            return output
        memory.sparse += 1
        ratio, rest = memory.ratio, memory.rest
        if ratio is None or rest is None or ratio.shape != mass.shape:
            raise refusal(
                InterventionError,
                f"Rettention in {call.module} with a batch of another shape",
                "what is cached belongs to another batch",
                "open a new block for it",
            )
        sees = mass > 0  # false on rows that see none of the keys
        sparse = total / torch.where(sees, mass, torch.ones_like(mass))[..., None]
        new = merged(output, heads, rows, sparse.transpose(1, 2))
        new = row_rescale(call, new, heads, torch.where(sees, ratio, torch.zeros_like(ratio)) + self.drift * memory.sparse, rows)
        if self.residual:
            new = merged(new, heads, rows, new[:, :, heads].to(rest.dtype) + rest.transpose(1, 2))
        return new

    def algebra(self) -> str:
        """The second one meets what the first one left."""
        return "rettention"

    def what(self) -> str:
        """In words."""
        when = f"after {self.full} full steps, in all but every {self.every}th"
        return f"attend to the keys {_words(self.keys)} alone {when}, rescaled to the mass they had"

    def cost(self) -> str:
        """In words."""
        return "the full kernel, one pass of the statistics kernel over these heads and sums over the kept keys; z of these heads is cached"


__all__ = ["Kept", "Rettention"]

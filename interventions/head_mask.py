"""HeadMask: switch heads off.

A head's only effect on the rest of the model is what W_O reads from it, z_i = sum_j A_ij v_j. Setting z to zero is therefore the whole
ablation, and is the same as a model whose slice W_O[:, h * d : (h + 1) * d] is zero (tested to be exactly that). The site is W_O's input;
zeroing a slice of its output instead would take 1/H of the coordinates away from all heads together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import Intervention, heads_of, register, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

MODES = ("zero",)


@register("head_mask")
@dataclass(frozen=True)
class HeadMask(Intervention):
    """Zero-ablation of heads: z[..., h, :] = 0 at the input of W_O, in every row, prefill and decode alike.

    `heads`: pairs [(18, 6), (17, 3)] or "18.6,17.3"; a layer is its number or its module's name; heads are query heads. `mode`: "zero".

    Ablation by zero as in Michel et al. (2019, arXiv 1905.10650) and Voita et al. (2019, arXiv 1905.09418). With grouped queries it
    takes one query head, not the group that shares its keys.
    """

    heads: Any
    mode: Literal["zero"] = "zero"
    _by_module: dict[str, list[int]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise refusal(InterventionError, f"mode={self.mode!r}", "it does not exist", f"pass one of {', '.join(MODES)}")
        object.__setattr__(self, "heads", heads_of(self.heads))

    def bind(self, scope: Scope) -> HeadMask:
        """A copy that knows its heads by module; InterventionError for a layer or head the model does not have."""
        return HeadMask(self.heads, self.mode, resolve(self.heads, scope.topology))

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The outputs [B, Nq, Hq, Dv] with the chosen heads at zero."""
        heads = (self._by_module or {}).get(call.module)
        if not heads:
            return output
        changed = output.clone()
        changed[:, :, heads] = 0
        return changed

    def to_json(self) -> str:
        """{"intervention": "head_mask", "heads": [[18, 6]], "mode": "zero"}"""
        import json

        return json.dumps({"intervention": self.name, "heads": [list(pair) for pair in self.heads], "mode": self.mode})

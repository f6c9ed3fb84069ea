"""HeadMask: switch heads off, in one of five ways.

A head's only effect on the rest of the model is what W_O reads from it, z_i = sum_j A_ij v_j. Replacing z is therefore the whole
ablation. Zero is the same as a model whose slice W_O[:, h * d : (h + 1) * d] is zero, and mean the same as adding W_O's image of the mean
to its bias (tested to be exactly that). The site is W_O's input; a slice of its output would take 1/H of the coordinates away from all
heads together.

Which way is taken matters: zero moves the residual stream to where it never is, mean and resample keep it there, uniform keeps what the
head reads and takes away where it looks. `uniform` averages over the keys that the query may see; the literal 1/L over all of them would
show a causal model its future.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions import z_site
from headscope.interventions.base import register
from headscope.interventions.head_edit import HeadEdit, Rows, Site, merged, taken
from headscope.interventions.head_values import check_values, values_at
from headscope.interventions.noise import position_noise
from headscope.interventions.patterns import uniform
from headscope.interventions.values import Values

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

Mode = Literal["zero", "mean", "resample", "uniform", "noise"]
MODES = ("zero", "mean", "resample", "uniform", "noise")
REFERENCED = ("mean", "resample")


@register("head_mask")
@dataclass(frozen=True)
class HeadMask(HeadEdit):
    """Ablation of heads at the input of W_O, in every row, prefill and decode alike. `mode`:

    - "zero": z = 0.
    - "mean": z = the head's mean over reference data, `HeadMask.calibrated(scope, data, heads)`.
    - "resample": z of another input of the same length, `HeadMask.resampled(scope, data, heads)`.
    - "uniform": z = mean of v over the keys that the query may see (padding, windows and packed sequences counted), A_ij = 1/n_i.
    - "noise": z = a direction drawn by `seed` and position, as long as the head's own z in that row.

    `reference`: [heads, Dv], [heads, N, Dv] or [B, heads, N, Dv] in the order of `heads`, N counted as positions are. With grouped
    queries a mask takes one query head, not the group that shares its keys. `heads` and the fields that narrow it: see HeadEdit.

    Zero as in Michel et al. (2019, arXiv 1905.10650) and Voita et al. (2019, arXiv 1905.09418); mean and resample as in Wang et al. (2022,
    arXiv 2211.00593) and causal scrubbing; uniform as in AttentionInfluence (2025, arXiv 2505.07293), made causal.
    """

    mode: Mode = "zero"
    reference: Any = None
    seed: int = 0

    site: ClassVar[Site] = "Z"
    always_written: ClassVar[tuple[str, ...]] = ("mode",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise unknown_name(InterventionError, "mode", self.mode, MODES)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise refusal(InterventionError, f"seed={self.seed!r}", "it is no integer", "pass seed=0")
        object.__setattr__(self, "reference", Values.of(self.reference))
        if self.mode in REFERENCED and self.reference is None:
            maker = "calibrated" if self.mode == "mean" else "resampled"
            raise refusal(
                InterventionError,
                f"mode={self.mode!r}",
                "it needs other data's head outputs, and none were given",
                f"use HeadMask.{maker}(scope, data, heads), or pass reference=",
            )
        if self.mode not in REFERENCED and self.reference is not None:
            raise refusal(InterventionError, f"mode={self.mode!r} with reference=", "it uses none", "leave it out, or pass mode='mean'")

    @classmethod
    def calibrated(cls, scope: Scope, data: Any, heads: Any, *, mode: str = "mean", per_position: bool = False, **options: Any) -> HeadMask:
        """A mask by the heads' mean outputs over `data`, a text, ids or a list of them (each an input of its own, without padding).

        `per_position`: a mean for every position instead of one for all. `options`: further fields. Keeps sums only, O(heads N d).
        """
        from headscope.interventions.record import mean_outputs

        if mode != "mean":
            raise refusal(InterventionError, f"calibrated(mode={mode!r})", "only a mean is calibrated", "pass mode='mean'")
        pairs = cls(heads, **options).pairs(scope)
        return cls(pairs, "mean", mean_outputs(scope, data, pairs, per_position=per_position), **options)

    @classmethod
    def resampled(cls, scope: Scope, data: Any, heads: Any, **options: Any) -> HeadMask:
        """A mask by the heads' outputs on another input, which must be as long as what the mask is then used on."""
        from headscope.interventions.record import record_heads, run_once

        pairs = cls(heads, **options).pairs(scope)
        with record_heads(scope, pairs, sites=("z",)) as record:
            run_once(scope, data)
        return cls(pairs, "resample", record.stacked("z", pairs), **options)

    def bind(self, scope: Scope) -> HeadMask:
        """A copy that knows its heads by module; InterventionError for what the model does not have, or a reference of other heads."""
        bound = super().bind(scope)
        if self.reference is not None:
            check_values(self.reference, self.pairs(scope), scope, "reference")
        return bound

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """The outputs [B, Nq, Hq, Dv] with the chosen heads replaced."""
        if self.mode == "zero":
            return z_site.zero(call, output, heads, rows)
        if self.mode == "uniform":
            return merged(output, heads, rows, uniform(call, heads).transpose(1, 2))
        own = taken(output, heads)
        if self.mode == "noise":
            noise = position_noise(call, self.seed, heads, own.shape[-1], own.dtype)
            size = own.float().norm(dim=-1, keepdim=True) / noise.float().norm(dim=-1, keepdim=True).clamp_min(1e-30)
            return z_site.replace(call, output, heads, noise * size.to(own.dtype), rows)
        values = values_at(self.reference, self.places_in(call), call, own, rows, f"HeadMask(mode={self.mode!r})")
        return z_site.replace(call, output, heads, values, rows)

    def algebra(self) -> str:
        """Zero is a scaling; the other modes put something in z's place."""
        return "scale" if self.mode == "zero" else "replace"

    def what(self) -> str:
        """What is done to a head, in words."""
        return {
            "zero": "replace the head's output by zero",
            "mean": "replace the head's output by its mean over reference data",
            "resample": "replace the head's output by that of another input",
            "uniform": "let the head attend equally to every key it may see",
            "noise": f"replace the head's output by noise of the same length (seed {self.seed})",
        }[self.mode]

    def cost(self) -> str:
        """What it costs per call, in words."""
        running = "a running sum of v, O(N d) per head, and " if self.mode == "uniform" else ""
        return f"{running}a copy of the layer's head outputs; no attention is computed again"

"""InContextBrush: let the part of a picture that is being painted take more from a demonstration beside it, and from the prompt.

    z_i += demo_gain sum_{j in demo} A_ij v_j + text_gain sum_{j in text} A_ij v_j      for rows i of the query, in two-stream blocks
    z_h *= 1 + head_gain minmax_h( sum_{i in query, j in text} A_ij )                   for every row, in all blocks

Demonstration and query are parts of one picture (two panels side by side); text is the prompt's stream. Both lines are sums over key sets
given the rows' normalisers, so no matrix of joint attention is made.

The weights of an edited row sum to more than one, which is the method and not a slip: nothing is taken from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import register
from headscope.interventions.fold import Fold, as_set, refuse_gradients
from headscope.interventions.head_edit import HeadEdit, Rows, Site, merged, taken
from headscope.interventions.score_edits import _number
from headscope.interventions.streams import part_of, read_part, text_of
from headscope.interventions.where import positions_json

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

GAINS = ("demo_gain", "text_gain", "head_gain")


@register("in_context_brush")
@dataclass(frozen=True)
class InContextBrush(HeadEdit):
    """In-Context Brush (Xu et al. 2025, arXiv 2505.20271; its released code read for the numbers).

    - `query`, `demo`: parts of the picture, counted from its first token: a slice, a list, or a bool mask [n] or [B, n].
      `InContextBrush.panels(heads, grid)` makes them for two panels side by side, the demonstration on the left.
    - `demo_gain`, `text_gain` (0.3): what is added of the attention to demonstration and text. `head_gain` (0.2): how much the head with
      the most attention from query to text is raised; the one with the least stays. Heads are compared within a layer, among those named.
    - `shift`: "joint" adds in blocks that keep two streams, as the code does; "all" also in Flux' single blocks.

    The sums over heads are of the attention as the model computed it; the shift comes first, then the factor. `heads="all"`: every head, as
    in the paper. Works on diffusion transformers with joint attention (SD3, Flux); needs no matrix, O(N (|demo| + |text|) d).
    """

    query: Any
    demo: Any
    demo_gain: float = 0.3
    text_gain: float = 0.3
    head_gain: float = 0.2
    shift: Literal["joint", "all"] = "joint"

    site: ClassVar[Site] = "P"
    folds: ClassVar[bool] = True
    always_written: ClassVar[tuple[str, ...]] = GAINS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query", "demo"):
            object.__setattr__(self, name, read_part(getattr(self, name), name))
        for name in GAINS:
            _number(name, getattr(self, name))
        if self.shift not in ("joint", "all"):
            raise unknown_name(InterventionError, "shift", self.shift, ("joint", "all"))

    @classmethod
    def panels(cls, heads: Any, grid: tuple[int, int], **options: Any) -> InContextBrush:
        """For a picture of `grid` (height, width) tokens whose left half is the demonstration and whose right half is painted."""
        height, width = grid
        if width % 2 or min(grid) < 1:
            raise refusal(InterventionError, f"panels of grid={grid}", "two panels share its width", "pass (height, an even width)")
        right = (torch.arange(width) >= width // 2).expand(height, -1).reshape(-1)
        return cls(heads, right, ~right, **options)

    def bind(self, scope: Scope) -> InContextBrush:
        """A copy that knows its heads and which blocks keep two streams; InterventionError for a model without a text stream."""
        if scope.host.kind != "diffusers":
            given, why = "InContextBrush", f"{scope.name} draws no pictures"
            raise refusal(InterventionError, given, why, "use it on a diffusion transformer with joint attention")
        bound = super().bind(scope)
        names = ("add_k_proj", "to_added_qkv")
        modules = {name: scope._attachment.module_of(scope.topology[name]) for name in bound.bound.heads}
        joint = {name for name, module in modules.items() if any(getattr(module, one, None) is not None for one in names)}
        if not joint:
            given, why = f"InContextBrush on {scope.name}", "none of its blocks has a text stream beside the picture's"
            raise refusal(InterventionError, given, why, "use a model with joint attention (SD3, Flux)")
        bound.bound.state["joint"] = joint
        return bound

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Shifted at the query's rows, then scaled in all; the very output where every gain is 0."""
        if not any(getattr(self, name) for name in GAINS):
            return output
        refuse_gradients(output, "InContextBrush")
        text, query = text_of(call), part_of(call, self.query, "query")
        if not bool(text.any()):
            return output  # SD3's second attention sees the picture alone
        fold = Fold.of(call)
        at = query.any(0).nonzero().flatten()
        m_text, z_text = fold.partial(heads, as_set(text), at)
        new = taken(output, heads).to(z_text.dtype).clone()
        if self.shift == "all" or call.module in self.bound.state["joint"]:
            demo = part_of(call, self.demo, "demo")
            z_demo = fold.partial(heads, as_set(demo), at)[1]
            more = (float(self.demo_gain) * z_demo + float(self.text_gain) * z_text).transpose(1, 2)
            new[:, at] += torch.where(query[:, at, None, None], more, torch.zeros_like(more))
        new *= self._factor(m_text.masked_fill(~query[:, None, at], 0.0))[:, None, :, None]
        fold.close(heads, "InContextBrush")
        return merged(output, heads, rows, new)

    def _factor(self, mass: Tensor) -> Tensor:
        """[B, h] from the query rows' mass on text [B, h, R]; 1 where all heads give the text the same."""
        total = mass.sum(-1)
        low, high = total.amin(1, keepdim=True), total.amax(1, keepdim=True)
        share = (total - low) / torch.where(high > low, high - low, torch.ones_like(low))
        return 1.0 + float(self.head_gain) * share

    def settings(self) -> dict[str, Any]:
        """The fields as they go into JSON."""
        return {**super().settings(), "query": positions_json(self.query), "demo": positions_json(self.demo)}

    def algebra(self) -> str:
        """What it adds depends on the weights it meets."""
        return "brush"

    def what(self) -> str:
        """In words."""
        where = "two-stream blocks" if self.shift == "joint" else "all blocks"
        return (
            f"add {self.demo_gain:g} of what the query's rows read from the demonstration and {self.text_gain:g} of what they read from "
            f"the text, in {where}, and raise heads by up to {self.head_gain:g} by their attention on the text"
        )

    def cost(self) -> str:
        """In words."""
        return "one pass of the statistics kernel over these heads, and sums over demonstration and text, O(N (|demo| + |text|) d)"


__all__ = ["InContextBrush"]

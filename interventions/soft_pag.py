"""SoftPAG: spoil the attention of chosen heads, so that a diffusion model can be steered away from what they then draw.

The edit alone makes pictures worse; `guided` turns it into guidance, and `HeadHunter` finds heads for which that helps.

Three different things are called perturbed attention in joint attention, and they are told apart here by name:

    stream="image", joint="replace"    image rows become z := v, text rows stay (the processors of U-Nets and PixArt, on the image stream)
    stream="image", joint="diagonal"   image rows see themselves and the text, text rows stay (the mask of SD3's processor)
    stream="all",   joint="replace"    every row becomes z := v, text rows too (a guider that returns v from the attention function)

The silent failures this avoids: one of them taken for another; layers matched by a piece of their name, so that block 1 is block 10 as
well; text rows edited because nobody knew which rows were text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions import p_site
from headscope.interventions.base import register
from headscope.interventions.blur import blurred
from headscope.interventions.fold import Fold, refuse_gradients
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.joint_patterns import attention_with, mean_query_of, own_and_text
from headscope.interventions.s_site import cooled
from headscope.interventions.score_edits import _number
from headscope.interventions.where import image_token_of, token_class
from headscope.kernels.partial import exact_attention, select_heads

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

KINDS = ("identity", "uniform", "query_mean", "argmax", "temperature")
COSTS = {
    "identity": "a copy of the heads' outputs, O(N d)",
    "uniform": "a mean of v, O(N d)",
    "query_mean": "one row of attention per head; with sigma, exact attention of these heads in blocks",
    "argmax": "one pass of the statistics kernel over these heads",
    "temperature": "exact attention of these heads in blocks, O(N d) memory",
}


@register("soft_pag")
@dataclass(frozen=True)
class SoftPAG(HeadEdit):
    """A' = (1 - u) A + u P for the rows of `stream`. `u` from 0 (nothing) to 1 (P alone). P by `kind`:

    - "identity": each token its own value (PAG, Ahn et al. 2024, arXiv 2403.17377).
    - "uniform": equal weights on all keys a row may see.
    - "query_mean": attention of the stream's mean query (SEG, Hong 2024, arXiv 2408.00760, with infinite blur); with `sigma`, in tokens, of
      the query blurred over the image, `grid` being its (height, width), None for a square. Text rows are not blurred.
    - "argmax": all weight on the key that has the largest. "temperature": the softmax of the scores divided by `tau`.

    `stream`: "image" edits the rows of image tokens, "all" those of text as well. `joint`, for kind "identity" on image rows: "replace"
    (z := v) or "diagonal" (a softmax over the token itself and all text, whose image part alone is the identity). Without text in the
    sequence the two are one. `steps` (first, end) is a window of denoising steps.

    From HeadHunter (Ahn et al. 2025, arXiv 2506.10978); its code is not public. u below 1 tames what u = 1 overdoes; the paper searches
    with u = 1 or .25 and draws with about .5. Works on diffusion transformers, and with stream="all" on any bidirectional model.
    """

    u: float = 1.0
    kind: Literal["identity", "uniform", "query_mean", "argmax", "temperature"] = "identity"
    stream: Literal["image", "all"] = "image"
    joint: Literal["replace", "diagonal"] = "replace"
    sigma: float | None = None
    tau: float | None = None
    grid: tuple[int, int] | None = None

    site: ClassVar[Site] = "P"
    always_written: ClassVar[tuple[str, ...]] = ("u", "kind", "stream", "joint")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("kind", KINDS), ("stream", ("image", "all")), ("joint", ("replace", "diagonal"))):
            if getattr(self, name) not in known:
                raise unknown_name(InterventionError, name, getattr(self, name), known)
        if not 0.0 <= _number("u", self.u) <= 1.0:
            raise refusal(InterventionError, f"u={self.u}", "it is a share", "pass a number from 0 to 1")
        if self.joint == "diagonal" and (self.kind, self.stream) != ("identity", "image"):
            raise refusal(
                InterventionError,
                f"joint='diagonal' with kind={self.kind!r}, stream={self.stream!r}",
                "it is the identity among image tokens, and says nothing of other patterns and of text rows",
                "pass kind='identity', stream='image', or joint='replace'",
            )
        if (self.kind == "temperature") != (self.tau is not None) or (self.tau is not None and not _number("tau", self.tau) > 0.0):
            given = f"kind={self.kind!r}, tau={self.tau}"
            raise refusal(InterventionError, given, "a temperature has a positive tau", "pass kind='temperature', tau=2.0")
        if self.sigma is not None and (self.kind != "query_mean" or not _number("sigma", self.sigma) > 0.0):
            given = f"kind={self.kind!r}, sigma={self.sigma}"
            raise refusal(InterventionError, given, "only queries are blurred, by some width", "pass kind='query_mean', sigma=1.0")
        if self.grid is not None:
            sides = tuple(self.grid)
            if self.sigma is None or len(sides) != 2 or not all(isinstance(one, int) and one > 0 for one in sides):
                given = f"grid={self.grid}"
                raise refusal(InterventionError, given, "it is the (height, width) a blur runs over", "pass sigma=1.0, grid=(32, 48)")
            object.__setattr__(self, "grid", sides)

    def bind(self, scope: Scope) -> SoftPAG:
        """A copy that knows its heads by module; InterventionError for an image stream in a model of text."""
        if self.stream == "image" and scope.host.kind != "diffusers" and image_token_of(scope) is None:
            raise refusal(InterventionError, "stream='image'", f"{scope.name} has no image tokens to tell from others", "pass stream='all'")
        return super().bind(scope)

    def rows_in(self, call: AttentionCall) -> Any:
        """The rows to edit, of the stream named."""
        rows = super().rows_in(call)
        if rows is None or self.stream == "all":
            return rows
        image = self._image(call, "query")
        if not image.is_cuda and bool(image.all()):
            return rows
        mask = image if rows is True else rows & image
        return mask if mask.is_cuda or bool(mask.any()) else None

    def _image(self, call: AttentionCall, side: Literal["query", "key"]) -> Tensor:
        """Bool [1 or B, N] of image tokens. InterventionError where a call does not say."""
        if self.bound.image_token is None and not isinstance(call.facts.get("streams"), tuple):
            raise refusal(
                InterventionError,
                f"stream='image' in {call.module}",
                "which of its tokens are image tokens cannot be told from the call",
                "pass stream='all' where all of them are (or positions=, a bool mask)",
            )
        return token_class(call, "image", self.bound.image_token, side)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Mixed with the kernel's output; with u = 0 the very output."""
        if self.u == 0.0:
            return output
        pattern: str | Tensor = self.kind
        if self.kind not in ("identity", "uniform") or self.joint == "diagonal":
            refuse_gradients(output, f"SoftPAG, {self.kind}")
            self._refuse_stages(call, heads)
        if self.joint == "diagonal":
            pattern = own_and_text(call, heads, self._image(call, "key"))
        elif self.kind == "temperature":
            assert self.tau is not None
            pattern = exact_attention(cooled(select_heads(call, heads), float(self.tau))).transpose(1, 2)
        elif self.kind == "query_mean":
            pattern = attention_with(call, heads, self._smooth(call, heads))
        return p_site.mix(call, output, heads, pattern, float(self.u), rows)

    def _smooth(self, call: AttentionCall, heads: list[int]) -> Tensor:
        """[B, h, 1 or Nq, D]: the stream's mean query, or the blurred queries."""
        if self.sigma is not None:
            return blurred(call, call.q[:, heads], float(self.sigma), self.grid)
        return mean_query_of(call, heads, self._image(call, "query") if self.stream == "image" else None)

    def _refuse_stages(self, call: AttentionCall, heads: list[int]) -> None:
        if any(set(stage.heads) & set(heads) for stage in Fold.of(call).stages):
            raise refusal(
                InterventionError,
                f"SoftPAG ({self.kind}) in {call.module} after another edit of its weights",
                "its pattern is computed from the scores as the model made them",
                "edit other heads, or use kind='identity' or 'uniform'",
            )

    def algebra(self) -> str:
        """The later of two has the last word."""
        return "mix"

    def what(self) -> str:
        """In words."""
        kinds = {
            "identity": "each token's own value",
            "uniform": "equal weights",
            "query_mean": f"the attention of queries blurred with sigma {self.sigma}" if self.sigma else "the attention of the mean query",
            "argmax": "the largest weight alone",
            "temperature": f"the attention at temperature {self.tau}",
        }
        pattern = "the token itself and all text" if self.joint == "diagonal" else kinds[self.kind]
        return f"mix the attention of {'image rows' if self.stream == 'image' else 'all rows'} with {pattern}, u = {self.u:g}"

    def cost(self) -> str:
        """In words."""
        return "sums over the text keys, O(N |text| d)" if self.joint == "diagonal" else COSTS[self.kind]


__all__ = ["KINDS", "SoftPAG"]

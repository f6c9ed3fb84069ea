"""PAINT: louder scores for image tokens that the vision tower itself attends to, in the rows that write the answer.

Which tokens these are is read off the tower before the answer: its CLS token's attention to the patches in an early layer (what stands
out locally) and in a late one (few tokens that hold a summary). `PAINT.prepared(scope, inputs)` reads it; the boosts are then plain data.

The silent failures this avoids: a key mask that belongs to another picture (the prompt's ids are compared), and a boost of "the last row"
that with a KV cache means every generated token and without one only the last: here the rows from the prompt's last token on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import Intervention, register
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.prompts import (
    inputs_of,
    last_rows,
    prompt_digest,
    real_tokens,
    refuse_blind,
    refuse_other_prompt,
    repeated,
    starts,
)
from headscope.interventions.running import run_once
from headscope.interventions.s_site import abs_boost
from headscope.interventions.score_edits import _number
from headscope.interventions.values import Values
from headscope.interventions.where import image_token_of
from headscope.kernels import measure
from headscope.statistics import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

SHARE = 0.25
FENCE = 1.5


@register("paint")
@dataclass(frozen=True)
class PAINT(HeadEdit):
    """Attention boosts of PAINT ("Fixing Imbalanced Attention", 2025, arXiv 2501.12206; two repositories by hasanar1f, read for formulas).

        s_ij += alpha |s_ij|  for local tokens j,    s_ij += beta |s_ij|  for summary tokens j        (before the softmax)

    in the rows from the prompt's last token on. `local`, `summary`: bool [B, n], which of a prompt's real tokens these are; `lengths` and
    `prompt` say whose. `PAINT.prepared` finds them: summary tokens are those that CLS attends to beyond the third quartile and 1.5
    interquartile ranges in the tower's last layer but one, local tokens the `share` of patches with the most of it in its first layer,
    summary tokens left out; attention is summed over the tower's heads.

    `alpha` 0.9 and `beta` 0.3 are the paper's. `layers`: its code leaves out the first two; so does `prepared`, where there are more than
    three. No head is treated differently from another, whatever the paper's abstract says; `heads` narrows it. A negative score is moved
    towards zero. Contrasting the logits with those of a run without the picture, which the paper adds, is not part of it.
    """

    heads: Any = "all"
    alpha: float = 0.9
    beta: float = 0.3
    local: Any = None
    summary: Any = None
    lengths: tuple[int, ...] = ()
    prompt: str = ""

    site: ClassVar[Site] = "S"
    folds: ClassVar[bool] = True
    always_written: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            _number(name, getattr(self, name))
        for name in ("local", "summary"):
            object.__setattr__(self, name, Values.of(getattr(self, name)))
        object.__setattr__(self, "lengths", tuple(self.lengths))

    @classmethod
    def prepared(cls, scope: Scope, inputs: Any, heads: Any = "all", *, share: float = SHARE, **options: Any) -> PAINT:
        """PAINT for these prompts: one pass of the model, in which the vision tower's CLS rows are read.

        `inputs`: model inputs [B, N], a (picture, question), or a Sample. `options`: PAINT's own. InterventionError for a tower without a
        CLS token, or whose patches are not the image tokens one by one.
        """
        refuse_blind(scope, "PAINT")
        if not 0 < _number("share", share) <= 1:
            raise refusal(InterventionError, f"share={share}", "it is the share of patches that are local", "pass a number from 0 to 1")
        given = inputs_of(scope, inputs)
        ids, real = given["input_ids"], real_tokens(given)
        image = (ids == image_token_of(scope)) & real
        first, late = tower_attention(scope, given)
        summary = torch.stack([outstanding(one) for one in late])
        local = torch.stack([strongest(one, share, ~kept) for one, kept in zip(first, summary, strict=True)])
        if local.numel() != int(image.sum()):
            raise refusal(
                InterventionError,
                f"PAINT on {scope.name}",
                f"its tower has {local.numel()} patches and the prompts {int(image.sum())} image tokens",
                "use a model whose image tokens are the patches, and PAINT's masks by hand elsewhere",
            )
        masks: dict[str, Any] = {}
        for name, chosen in (("local", local), ("summary", summary)):
            whole = torch.zeros(ids.shape, dtype=torch.bool)
            whole[image] = chosen.flatten()
            rows = [row[kept] for row, kept in zip(whole, real, strict=True)]
            masks[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        count = len(scope.topology.main)
        if "layers" not in options and count > 3:
            options["layers"] = (2, count)
        return cls(heads, **options, **masks, lengths=tuple(real.sum(1).tolist()), prompt=prompt_digest(ids, real))

    def bind(self, scope: Scope) -> PAINT:
        """A copy that knows its heads. InterventionError for a model that reads no pictures, and without masks."""
        refuse_blind(scope, "PAINT")
        for name in ("local", "summary"):
            value = getattr(self, name)
            if value is None or value.tensor.dtype != torch.bool or value.tensor.dim() != 2 or len(value.tensor) != len(self.lengths):
                raise refusal(
                    InterventionError,
                    f"PAINT with {name}={value!r}",
                    f"it is a bool mask [{len(self.lengths)} prompts, n]",
                    "use PAINT.prepared(scope, inputs)",
                )
        return super().bind(scope)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Both boosts folded in; their key sets are disjoint, so the second meets scores that the first left alone."""
        ends = last_rows(call, self.lengths, "PAINT")
        t = torch.arange(call.q.shape[2], device=output.device) + call.query_offset
        mine = t[None] >= ends[:, None]
        if rows is not True:
            mine = mine & rows
        if not bool(mine.any()) or (self.alpha == 0.0 and self.beta == 0.0):
            return output
        if call.query_offset == 0 and call.module == next(iter(self.bound.heads)):
            refuse_other_prompt(call, self.lengths, self.prompt, "PAINT")
        for values, factor in ((self.local, self.alpha), (self.summary, self.beta)):
            output = abs_boost(call, output, heads, self._keys(call, values.tensor), float(factor), mine)
        return output

    def _keys(self, call: AttentionCall, mask: Tensor) -> Tensor:
        """Bool [B, Nk]: a mask over real tokens, as the call's keys."""
        table = repeated(mask, call, "PAINT")
        place = torch.arange(call.k.shape[2], device=table.device)[None] + call.key_offset - starts(call)[:, None]
        inside = (place >= 0) & (place < table.shape[1])
        found = table.gather(1, place.clamp(0, table.shape[1] - 1)) & inside
        return found if call.mask.key_valid is None else found & call.mask.key_valid

    def algebra(self) -> str:
        """Depends on the scores it meets."""
        return "boost"

    def what(self) -> str:
        """In words."""
        counts = [0 if one is None else int(one.tensor.sum()) for one in (self.local, self.summary)]
        return (
            f"from the last prompt token on, add {self.alpha:g} times their size to the scores of {counts[0]} local image tokens "
            f"and {self.beta:g} times to those of {counts[1]} summary tokens"
        )

    def cost(self) -> str:
        """In words."""
        return "one pass beforehand; the heads' normalisers by one pass of the statistics kernel and sums over the tokens, O(N |X| d)"


@dataclass(frozen=True)
class _ClsRows(Intervention):
    """Reads the first row's weights, summed over heads, in named modules: module -> [pictures, N] float64. Changes nothing."""

    found: dict[str, Tensor | None] = field(default_factory=dict)

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        if call.module in self.found:
            keys = torch.arange(call.k.shape[2])
            request = StatisticsRequest(("pairs",), pairs={"cls": (torch.zeros_like(keys), keys)})
            with torch.no_grad():
                self.found[call.module] = measure(call, request).pairs["cls"].double().sum(1).cpu()
        return output


def tower_attention(scope: Scope, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """CLS attention [pictures, patches] float64, summed over heads, of the vision tower's first layer and of its last but one.

    InterventionError for a tower without a CLS token in front.
    """
    tower = [module.name for module in scope.topology.modules if module.kind == "vision" and not module.capturable]
    config: Any = getattr(scope.model.config, "vision_config", None)
    if not tower or not _has_cls(scope):
        raise refusal(
            InterventionError,
            f"PAINT on {scope.name}",
            f"its vision tower ({getattr(config, 'model_type', 'none')}) has no CLS token whose attention could be read",
            "pass PAINT(local=..., summary=...) yourself",
        )
    first, late = tower[0], tower[max(0, len(tower) - 2)]
    reader = _ClsRows({first: None, late: None})
    with scope.intervene(reader):
        run_once(scope, inputs)
    rows = [reader.found[name] for name in (first, late)]
    if rows[0] is None or rows[1] is None:
        raise refusal(InterventionError, "inputs without a picture", "the vision tower did not run", "pass pixel_values")
    return rows[0][:, 1:], rows[1][:, 1:]


def _has_cls(scope: Scope) -> bool:
    return any(name.rpartition(".")[2] in ("class_embedding", "cls_token") for name, _ in scope.model.named_parameters())


def outstanding(values: Tensor) -> Tensor:
    """Bool [n]: values beyond the third quartile by more than 1.5 interquartile ranges."""
    low, high = values.quantile(0.25), values.quantile(0.75)
    return values > high + FENCE * (high - low)


def strongest(values: Tensor, share: float, allowed: Tensor) -> Tensor:
    """Bool [n]: the `share` of all n with the largest values, less those that are not allowed."""
    chosen = torch.zeros_like(allowed)
    chosen[values.topk(max(1, int(share * len(values)))).indices] = True
    return chosen & allowed


__all__ = ["PAINT", "outstanding", "strongest", "tower_attention"]

"""SoftplusReweighting: sharpen rows of attention by a power of what each key gets beyond its equal share, or replace the softmax as well.

    reweight    A'_ij ~ relu(n_i A_ij - o_i)^p                         A the model's own softmax, n_i the keys that row i sees
    softplus    A'_ij ~ softplus(c_i cos(q_i, k_j))                    c_i = ln(d) ln(n_i)
    both        the second, normalised, in the place of A in the first

Keys with no more than an equal share get nothing; what is left is raised to a high power, so in long rows, where a softmax grows flat, few
keys keep the weight. The first line alone is defined for any model: given lse it needs nothing but the row itself. The other two replace
the exponential under which a model was trained, which is defined and computed exactly here, but says something only of models trained so.

The paper's first versions have the model's score s_ij = q_i k_j / sqrt(d) in the place of the cosine, its later ones normalise q and k;
`scores` says which, since trained weights fit one only.

Every line needs a whole row at a time, so these heads are computed anew in blocks of rows: O(N d) memory, the arithmetic of one attention.
Powers are taken in logarithms; (n A - o)^15 of a row of 8,192 keys is far beyond float32. Rows in which no key has more than its share
(a single key; exactly equal weights) stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import register
from headscope.interventions.fold import Fold, put, refuse_gradients
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.score_edits import _number
from headscope.kernels.partial import partial_attention

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

STAGES = ("reweight", "softplus", "both")
SCORES = ("cosine", "model")


@register("softplus_reweighting")
@dataclass(frozen=True)
class SoftplusReweighting(HeadEdit):
    """Softplus attention with re-weighting, LSSAR (Gao et al. 2025, arXiv 2501.13428).

    The authors' code (iminfine/freeatten) was not at hand; the formulas are the paper's as reviews and two independent implementations give
    them, which agree on scale, power and offset.

    - `stage`: "reweight" sharpens the model's own attention; "softplus" replaces the softmax (LSSA); "both" is LSSAR.
    - `scores`: what softplus is taken of, "cosine" of query and key, or "model", the model's own scores, bias and softcap included.
    - `power`: p, 15 in the paper. `offset`: o, 1 in the paper, 0 in the first `spared` (3) rows of a sequence.
    - power 1 and offset 0 with "reweight" change nothing, to the bit.

    Padding, windows and packed sequences count: n_i is what the row sees. InterventionError for "softplus" in a model with sink logits,
    which have no place in a sum without exponentials.
    """

    stage: Literal["reweight", "softplus", "both"] = "reweight"
    power: float = 15.0
    offset: float = 1.0
    spared: int = 3
    scores: Literal["cosine", "model"] = "cosine"

    site: ClassVar[Site] = "P"
    folds: ClassVar[bool] = True
    always_written: ClassVar[tuple[str, ...]] = ("stage",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise unknown_name(InterventionError, "stage", self.stage, STAGES)
        if self.scores not in SCORES:
            raise unknown_name(InterventionError, "scores", self.scores, SCORES)
        if not _number("power", self.power) > 0.0:
            raise refusal(InterventionError, f"power={self.power}", "weights would not grow with attention", "pass a positive power")
        if not 0.0 <= _number("offset", self.offset) <= 1.0:
            given, why = f"offset={self.offset}", "it counts in equal shares, and with more than 1 rows could be left without a key"
            raise refusal(InterventionError, given, why, "pass a number from 0 to 1")
        if not isinstance(self.spared, int) or isinstance(self.spared, bool) or self.spared < 0:
            raise refusal(InterventionError, f"spared={self.spared!r}", "it counts rows", "pass spared=3")

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """These heads computed anew under the other weights."""
        if self.stage == "reweight" and self.power == 1.0 and self.offset == 0.0:
            return output
        refuse_gradients(output, "SoftplusReweighting")
        if self.stage != "reweight" and call.sink_logits is not None:
            raise refusal(
                InterventionError,
                f"stage={self.stage!r} in {call.module}",
                "its sink logits are terms of a sum of exponentials, and there is none",
                "pass stage='reweight'",
            )
        fold = Fold.of(call)
        fold.refuse_closed(heads)
        if any(set(stage.heads) & set(heads) for stage in fold.stages):
            raise refusal(
                InterventionError,
                f"SoftplusReweighting in {call.module} after another edit of its weights",
                "its weights are computed from the scores as the model made them",
                "let it come first (order=), or edit other heads",
            )
        sub, lse = fold.sub(heads), fold.lse(heads)
        number = torch.arange(call.q.shape[2], device=output.device)[None] + call.query_offset
        if call.first_token is not None:
            number = number - call.first_token.to(output.device)[:, None]
        offset = (number >= self.spared).to(lse.dtype)[:, None, :, None] * float(self.offset)  # [B or 1, 1, Nq, 1]

        def log_factor(scores: Tensor, part: Tensor, keys: Tensor) -> Tensor:
            seen = scores > -math.inf
            count = seen.sum(-1, keepdim=True).to(scores.dtype)
            own = scores - lse[:, :, part, None].to(scores.dtype)  # ln A
            if self.stage != "reweight":
                factor = math.log(call.q.shape[-1]) * count.clamp_min(1).log()
                base = scores if self.scores == "model" else cosines(sub, part, keys).to(scores.dtype)
                plus = torch.where(seen, torch.nn.functional.softplus(factor * base), torch.zeros_like(scores))
                share = plus / plus.sum(-1, keepdim=True)
                wanted = share.log()
            else:
                share = own.exp()
                wanted = own
            if self.stage != "softplus":
                wanted = float(self.power) * (count * share - offset[:, :, part].to(scores.dtype)).clamp_min(0.0).log()
            wanted = wanted.masked_fill(~seen, -math.inf)
            return wanted - torch.logsumexp(wanted, -1, keepdim=True) - own

        mass, new = partial_attention(sub, lse, log_factor=log_factor)
        counts = mass > 0.5  # 1, or NaN where nothing is left or the row is padding
        fold.close(heads, "SoftplusReweighting")
        return put(output, heads, rows, new, counts)

    def algebra(self) -> str:
        """The later of two would meet what the first one made."""
        return "reweighting"

    def what(self) -> str:
        """In words."""
        sharpened = f"the power {self.power:g} of what each key gets beyond {self.offset:g} equal shares"
        return {
            "reweight": f"give keys weights by {sharpened}",
            "softplus": "replace the softmax by normalised softplus scores",
            "both": f"replace the softmax by softplus scores, then give keys weights by {sharpened}",
        }[self.stage]

    def cost(self) -> str:
        """In words."""
        return "attention of these heads computed anew in blocks of rows, O(N d) memory"


def cosines(call: AttentionCall, rows: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, R, X]: the cosine of each query in `rows` with each key in `keys`; 0 for a query or key of length 0."""
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    q, k = (torch.nn.functional.normalize(one.to(wide), dim=-1) for one in (call.q[:, :, rows], call.k[:, :, keys]))
    batch, heads, count, width = q.shape
    grouped = q.reshape(batch, k.shape[1], call.group * count, width) @ k.transpose(-1, -2)
    return grouped.view(batch, heads, count, -1)


__all__ = ["SoftplusReweighting", "cosines"]

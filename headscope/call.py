"""AttentionCall: the one form that every host's attention call is brought to.

Every host library hands attention over differently: transformers passes a mask whose meaning depends on the name of the kernel
(None, bool, additive, 2-D, BlockMask), diffusers puts the heads elsewhere, a sliding cache hides how many keys it has dropped. All of
that is settled once, in the host's own file under `headscope/capture/`, and nothing behind this seam knows which host it came from:
interventions, sparse plans and statistics see the same record. Positions are absolute, so that a decode step, a chunk of a long
prefill and a whole prefill of one sequence give statistics that can simply be put together.

The silent failure this avoids: a mask of None read as "everything is visible" in one place and as "causal" in another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class MaskFacts:
    """What a query may see. A key is visible when every fact given allows it; a fact that is None allows everything.

    With t and s the absolute positions of a query and a key:

    - `causal`: s <= t.
    - `window`: t - s < window; without `causal`, |t - s| < window.
    - `key_valid` [B, Nk] bool: the key is a real token, not padding.
    - `query_segments` [B, Nq] and `key_segments` [B, Nk] integers: equal numbers see one another (packed sequences).
    - `allowed` [B or 1, H or 1, Nq, Nk] bool: an explicit mask, kept only when the facts above do not say the same in O(N).
    - `bias` [B or 1, H or 1, Nq, Nk] float: added to the scaled (and soft-capped) scores, e.g. T5's relative positions.

    `query_valid` [B, Nq] bool says which rows are real tokens. It does not change what is visible; rows that are padding are
    reported as NaN and never count in a column statistic or a map.
    """

    causal: bool
    window: int | None = None
    key_valid: Tensor | None = None
    query_valid: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    allowed: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One attention call of one module, as every part of headscope sees it.

    - `module`: qualified name of the attention module in the scoped model; `layer`: its number in the topology, None in side towers.
    - `q` [B, Hq, Nq, D]; `k` [B, Hkv, Nk, D]; `v` [B, Hkv, Nk, Dv] or None: after rotary embedding, after the cache update, never
      repeated over the group (query head h reads key head h // (Hq // Hkv)). Any strides.
    - `scale`: factor on q.k. `softcap`: c, scores become c * tanh(score / c) after scaling, before mask and bias.
    - `sink_logits` [Hq] float or None: one extra logit per head in the softmax's denominator, with no value behind it.
    - `query_offset`, `key_offset`: absolute position of q[..., 0, :] and k[..., 0, :]; query row i sits at query_offset + i.
    - `first_token` [B] int64 or None: absolute position of each sequence's first real token (None: 0); where left padding ends.
    - `kernel`: name of the attention kernel that the host ran for this call, e.g. "sdpa".
    """

    module: str
    layer: int | None
    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float
    mask: MaskFacts
    softcap: float | None = None
    sink_logits: Tensor | None = None
    query_offset: int = 0
    key_offset: int = 0
    first_token: Tensor | None = None
    kernel: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    """Whatever else the host knows (step, timestep, guidance branch); never needed to compute a statistic."""

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def is_cross(self) -> bool:
        """True when queries and keys come from different sequences, so that t - s has no meaning."""
        return bool(self.facts.get("cross", False))

    def __repr__(self) -> str:
        batch, heads, rows, width = self.q.shape
        kv_heads, keys = self.k.shape[1], self.k.shape[2]
        return (
            f"AttentionCall({self.module}, B={batch}, Hq={heads}, Hkv={kv_heads}, Nq={rows}@{self.query_offset}, "
            f"Nk={keys}@{self.key_offset}, D={width}, {self.q.dtype}, kernel={self.kernel!r})"
        )

"""CircuitReuse: make a circuit's heads look where they should have looked, at the one token that answers.

Where a model fails a task although it has the circuit for it, a few of the circuit's heads look at the wrong tokens. Setting their row of
attention at the last token of the prompt, equal weights on given keys, repairs them; everything else runs as it is. It is `SetRows` for a
batch of prompts: each sequence has its own keys, counted from its own first token, so padding moves nothing.

Any edit that makes heads copy something changes the answer, so a control belongs to it: `control` sets the same rows on as many other keys.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import register
from headscope.interventions.fold import Fold
from headscope.interventions.head_edit import HeadEdit, Rows, Site, merged
from headscope.interventions.prompts import repeated, starts

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

Keys = tuple[int, ...] | tuple[tuple[int, ...], ...]


@register("circuit_reuse")
@dataclass(frozen=True)
class CircuitReuse(HeadEdit):
    """A'_i = equal weights on `keys` for the last row of the prompt (Merullo et al. 2023, arXiv 2310.08744: GPT-2 medium's three inhibition
    heads and its negative mover head attend to the two wrong colours, and Colored Objects rises from 49.6 to 93.7 %).

    `keys`: token numbers counted from each sequence's first real token, [3, 8] for all sequences or [[3, 8], [2, 9]] for each its own, as
    many in each. `positions`: the last token of the prompt; the KV cache carries it on. The paper has no control; `control` is ours.
    """

    keys: Any
    positions: Any = field(default="last_prompt", kw_only=True)

    site: ClassVar[Site] = "P"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", _read(self.keys))

    @property
    def table(self) -> tuple[tuple[int, ...], ...]:
        """The keys, one tuple per sequence, or one for all."""
        nested: tuple[tuple[int, ...], ...] = self.keys if isinstance(self.keys[0], tuple) else (self.keys,)
        return nested

    def control(self, length: int, seed: int = 0) -> CircuitReuse:
        """The same edit on as many other keys below `length`, drawn by seed; of short prompts pass the shortest length."""
        draw, rows = random.Random(seed), []
        for row in self.table:
            pool = [one for one in range(length) if one not in row]
            if len(pool) < len(row):
                given = f"a control of {len(row)} keys among {length}"
                raise refusal(InterventionError, given, f"{len(pool)} others are left", "use longer prompts, or fewer keys")
            rows.append(tuple(sorted(draw.sample(pool, len(row)))))
        return replace(self, keys=tuple(rows) if isinstance(self.keys[0], tuple) else rows[0])

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Rows set. InterventionError for keys that a row does not see."""
        assert call.v is not None
        device, count = call.q.device, call.q.shape[2]
        index = repeated(torch.tensor(self.table), call, "CircuitReuse") if len(self.table) > 1 else torch.tensor(self.table).to(device)
        index = starts(call)[:, None] + index  # [B, X], absolute
        t = torch.arange(count, device=device) + call.query_offset
        edited = (t[None] >= 0) if rows is True else rows
        earliest = torch.where(edited, t[None], torch.iinfo(torch.int64).max).expand(len(index), -1).amin(1)
        outside = (index < call.key_offset) | (index >= call.key_offset + call.k.shape[2])
        late = (index > earliest[:, None]) if call.mask.causal else torch.zeros_like(outside)
        local = (index - call.key_offset).clamp(0, call.k.shape[2] - 1)
        valid = call.mask.key_valid
        hidden = torch.zeros_like(outside) if valid is None else ~valid.gather(1, local)
        wrong = (outside | late | hidden) & edited.expand(len(index), -1).any(1, keepdim=True)
        if bool(wrong.any()):
            b, place = wrong.nonzero()[0].tolist()
            key = self.table[b % len(self.table)][place]
            raise refusal(
                InterventionError,
                f"CircuitReuse with key {key} of sequence {b}",
                f"the edited row of {call.module} does not see it (it comes later, is padding, or has left the cache)",
                "name tokens before the row, counted from the sequence's first token",
            )
        kv = [head // call.group for head in heads]
        values = call.v[:, kv].to(torch.promote_types(call.v.dtype, torch.float32))
        at = local[:, None, :, None].expand(-1, len(heads), -1, values.shape[-1])
        new = values.gather(2, at).mean(2)  # [B, h, Dv]
        Fold.of(call).close(heads, "CircuitReuse")
        return merged(output, heads, rows, new[:, None].expand(-1, count, -1, -1))

    def settings(self) -> dict[str, Any]:
        """The fields as they go into JSON."""
        keys = [list(row) for row in self.table]
        return {**super().settings(), "keys": keys if isinstance(self.keys[0], tuple) else keys[0]}

    def algebra(self) -> str:
        """Puts other rows in place."""
        return "rows"

    def what(self) -> str:
        """In words."""
        listed = ", ".join(str(one) for one in self.table[0]) if len(self.table) == 1 else f"each sequence's own {len(self.table[0])}"
        return f"attend in equal parts to the tokens {listed} alone"

    def cost(self) -> str:
        """In words."""
        return "a gather of a few values per head"


def _read(given: Any) -> Keys:
    rows = list(given) if isinstance(given, list | tuple) else given.tolist() if isinstance(given, torch.Tensor) else []
    nested = bool(rows) and all(isinstance(row, list | tuple) for row in rows)
    listed = [tuple(row) for row in rows] if nested else [tuple(rows)]
    fits = all(row and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in row) for row in listed)
    if not rows or not fits or len({len(row) for row in listed}) != 1 or any(len(set(row)) != len(row) for row in listed):
        raise refusal(
            InterventionError,
            f"keys={str(given)[:60]}",
            "they are different token numbers from 0, as many for each sequence",
            "pass keys=[3, 8], or keys=[[3, 8], [2, 9]]",
        )
    return tuple(listed) if nested else listed[0]


__all__ = ["CircuitReuse"]

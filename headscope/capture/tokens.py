"""Token ids of a call's sequence, for interventions that speak of kinds of tokens ("image").

A decode step is given one id; which of the cached keys were image tokens was only known when they were read. So ids are kept per cache,
as long as an intervention is active; a cache that was filled before it became active has none, and whoever asks for them is refused by
name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.capture.forward import ForwardState, ModuleRun


class TokenMemory:
    """Ids of the sequences that run in one thread."""

    def __init__(self) -> None:
        self._by_cache: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def ids(self, call: AttentionCall, run: ModuleRun, state: ForwardState) -> Tensor | None:
        """[B, positions so far] ids, from position 0 to the call's last query; None where they are not known."""
        if call.is_cross:
            return None
        batch, rows = call.q.shape[0], call.q.shape[2]
        new = state.tokens(batch, rows)
        if run.cache is None:
            return new if call.query_offset == 0 else None
        end = call.query_offset + rows
        known = self._by_cache.get(run.cache)
        if known is not None and known.shape == (batch, end):
            return known  # an earlier layer of the same pass
        if new is None:
            return None
        if call.query_offset == 0:
            found = new
        elif known is not None and known.shape[0] == batch and known.shape[1] >= call.query_offset:
            found = torch.cat([known[:, : call.query_offset], new.to(known.device)], 1)
        else:
            return None
        self._by_cache[run.cache] = found
        return found


__all__ = ["TokenMemory"]

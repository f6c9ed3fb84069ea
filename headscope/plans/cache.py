"""FreeCache: a KV cache for generate() that holds what a plan keeps, and nothing else.

A transformers cache hands every layer's attention all keys so far, [B, Hkv, N, D]. Where heads keep different keys there is no such tensor.
So this cache hands back the new keys only, tells the mask makers so, and leaves the old ones to the plan's executor, which finds them in
the layer's store. Position ids stay those of the whole text, and keys stay as they were rotated.

The silent failure this avoids: attention over the newest token alone, which is what a model would compute with such a cache and no
executor. Every key that comes in is noted until the executor has served it; a cache that is used outside of its `scope.execute` block, or
by a model that changes keys behind its cache, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from transformers.cache_utils import Cache, CacheLayerMixin

from headscope.errors import PlanError, refusal
from headscope.plans.cache_store import LayerStore

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.plans.patterns import Pattern
    from headscope.plans.plan import SparsePlan
    from headscope.topology import AttentionModule


@dataclass(eq=False)
class _Notes:
    """What a cache and its layers share: whether the block is open, and the reorderings that the executor has not heard of. (Layers that
    held their cache would be a circle, and its memory would wait for the garbage collector.)
    """

    open: bool = True
    selected: dict[int, list[Tensor]] = field(default_factory=dict)

    def check_open(self) -> None:
        """Raises PlanError outside of the block that made the cache."""
        if not self.open:
            raise refusal(
                PlanError,
                "a freeing cache outside of its scope.execute block",
                "the model would attend to its newest tokens only",
                "run the model inside the block",
            )


class FreeLayer(CacheLayerMixin):
    """One layer of a FreeCache. `store` holds its keys; `waiting`: new keys and values that no executor has served yet."""

    is_sliding = False

    def __init__(self, notes: _Notes, number: int, store: LayerStore) -> None:
        super().__init__()
        self.notes = notes
        self.number = number
        self.store = store
        self.waiting: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: a store takes its shape from the first keys that it keeps."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, noted for the executor."""
        self.notes.check_open()
        if self.waiting is not None:
            self._unserved()
        self.is_initialized = True
        self.waiting = (key_states, value_states)
        return key_states, value_states

    def _unserved(self) -> NoReturn:
        raise refusal(
            PlanError,
            f"layer {self.number}",
            "its model changes keys after they were cached, or does not attend to them where a plan can see it",
            "run the plan with the model's own cache: scope.execute(plan)",
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that attention will be given, position of the first): the new ones."""
        return int(query_length), self.store.length

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.store.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Empty again."""
        self.store = LayerStore(self.store.patterns, self.store.kv_heads, self.store.window)
        self.waiting, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams change places."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        import torch

        part = next((part for part in self.store.parts if part.k is not None), None)
        if part is not None and part.k is not None:
            self.batch_select_indices(torch.arange(part.k.shape[0], device=part.k.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences of these numbers."""
        self.store.select(indices)
        self.notes.selected.setdefault(self.number, []).append(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused beyond 0: what was dropped since cannot come back."""
        if tokens_to_remove:
            raise refusal(
                PlanError,
                f"crop({tokens_to_remove})",
                "this cache has dropped keys for good",
                "use a cache that keeps them: scope.execute(plan)",
            )

    def offload(self) -> None:
        """Refused."""
        raise refusal(PlanError, "an offloaded cache", "this cache frees its memory instead", "leave offloading out")

    prefetch = offload


class FreeCache(Cache):
    """The cache of a plan. Made by `scope.execute(plan, cache="free")`, which uses a fresh one for every generate(), or by its
    `new_cache()` for direct calls of the model. `bytes`: what it holds now.
    """

    frees_keys = True

    def __init__(self, plan: SparsePlan, modules: Sequence[AttentionModule]) -> None:
        patterns: dict[int, list[Pattern]] = {}
        for (layer, _), pattern in plan.patterns.items():
            patterns.setdefault(layer, []).append(pattern)
        self.notes = _Notes()
        layers = [
            FreeLayer(self.notes, module.layer or 0, LayerStore(tuple(patterns[module.layer or 0]), module.kv_heads, module.window))
            for module in modules
        ]
        super().__init__(layers=list(layers))

    @property
    def stores(self) -> list[LayerStore]:
        """What each layer holds."""
        return [layer.store for layer in self.layers if isinstance(layer, FreeLayer)]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held, room included."""
        return sum(store.bytes for store in self.stores)

    @property
    def dense_bytes(self) -> int:
        """Bytes that a cache of all keys would hold after the same tokens, without room."""
        total = 0
        for store in self.stores:
            part = next((part for part in store.parts if part.k is not None), None)
            if part is not None and part.k is not None and part.v is not None:
                each = part.k.shape[3] * part.k.element_size() + part.v.shape[3] * part.v.element_size()
                total += part.k.shape[0] * store.kv_heads * store.length * each
        return total

    def served(self, key: Tensor) -> FreeLayer | None:
        """The layer that waits with these very keys."""
        for layer in self.layers:
            if isinstance(layer, FreeLayer) and layer.waiting is not None and layer.waiting[0] is key:
                return layer
        return None

    def __repr__(self) -> str:
        return f"FreeCache({len(self.layers)} layers, {self.get_seq_length()} tokens seen, {self.bytes} bytes)"

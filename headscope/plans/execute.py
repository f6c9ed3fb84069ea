"""PlanExecutor: runs a plan in a live model, prefill and decode, at the seam where every attention call passes.

It answers a call with the heads' outputs, or leaves it to the model's own kernel: where the plan drops nothing at this length, where dense
attention would be faster, and in modules that the plan does not cover (vision towers, cross attention). `report` counts heads and calls,
`ran` what computed them and `reasons` why calls were left to the model, so that a plan that in truth ran dense cannot pass for a sparse
one.

Dynamic patterns choose their keys at the call: vertical-slash and block choices per prefill chunk, budgets at the end of the prefill, top
keys per decode step or every `refresh` steps, or from the layer whose choice they take over. State belongs to one sequence of calls and is
dropped when a text begins again at position 0.

With `cache="free"` the keys lie in a FreeCache, which gives the model its new keys only; this executor alone knows the others. Observers
and interventions would see those few keys and take them for all, so they are refused beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from weakref import ref

import torch

from headscope.errors import PlanError, refusal, unknown_name
from headscope.kernels.sparse_blocked import blocked_sparse_attention
from headscope.kernels.sparse_decode_call import decode_worth_it
from headscope.kernels.sparse_dispatch import sparse_attention, sparse_backend, worth_it
from headscope.kernels.sparse_lists import forget as forget_lists
from headscope.plans.cache import FreeCache, FreeLayer
from headscope.plans.cache_store import LayerStore, joined, subcalls, with_sums
from headscope.plans.choices import Choice, choose_budgets
from headscope.plans.dynamic import Budget, TopKeys
from headscope.plans.execute_checks import as_chosen, refuse_holes, refuse_unfreeable
from headscope.plans.execute_decode import Keys, Memory, call_step, choose_due, picked, refuses, store_step
from headscope.plans.execute_heads import Heads
from headscope.plans.execute_steps import StepExecutor
from headscope.plans.indices import choose, element
from headscope.plans.patterns import Dense, Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.plan import SparsePlan
    from headscope.scope import Scope

Place = tuple[int, int]
CacheKind = Literal["model", "free"]
CACHES = ("model", "free")


@dataclass(eq=False)
class _LayerState:
    """What a layer remembers between calls: per (sequence, head) the keys chosen, and at which decode step; on a device, as tensors."""

    chosen: dict[Place, Pattern] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    step: int = 0
    tail: Tensor | None = None

    def select(self, index: Tensor) -> None:
        """The sequences of these numbers, in this order."""
        order = index.tolist()
        heads = {head for _, head in self.chosen}
        self.chosen = {(b, head): self.chosen[old, head] for b, old in enumerate(order) for head in heads if (old, head) in self.chosen}
        self.memory.select(index)


@dataclass(eq=False)
class PlanExecutor:
    """Executes `plan`; denoising steps (calls that are not causal) through `steps`.

    `report`: how many heads of calls ran "sparse", "dense" within a sparse call, and calls left to the "host". `ran`: calls per backend.
    `reasons`: why calls were left to the host. `fallback`: leave calls to the model where dense attention is faster. `watching`: says what
    else is active on the model, "" for nothing. `windows`: of each layer itself. `cache`: the newest freeing cache.
    """

    plan: SparsePlan
    report: Counter[str] = field(default_factory=Counter)
    steps: StepExecutor = field(default_factory=StepExecutor)
    watching: Callable[[], str] = lambda: ""
    ran: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    windows: dict[int, int | None] = field(default_factory=dict)
    fallback: bool = True
    cache: FreeCache | None = None
    _state: dict[int, _LayerState] = field(default_factory=dict)
    _caches: list[ref[FreeCache]] = field(default_factory=list)
    _make: Callable[[], FreeCache] | None = None

    def __post_init__(self) -> None:
        layers: dict[int, list[Pattern]] = {}
        for (layer, _), pattern in self.plan.patterns.items():
            # a layer with a window of its own has no far keys to choose from
            own = Dense() if self.windows.get(layer) is not None and isinstance(pattern, Budget | TopKeys) else pattern
            layers.setdefault(layer, []).append(own)
        alike: dict[tuple[Pattern, ...], Heads] = {}
        self._layers = {layer: alike.setdefault(tuple(own), Heads(own)) for layer, own in layers.items()}

    # ---- caches -------------------------------------------------------------------------------------------------

    def new_cache(self) -> FreeCache:
        """A fresh freeing cache, for the model's own `past_key_values`; `cache` is the newest. Several may be in use at once only where
        the plan chooses no keys per input.
        """
        if self._make is None:
            raise refusal(PlanError, "a freeing cache", "this block runs with the model's own cache", 'open it with cache="free"')
        self.cache = None  # the memory of the one before goes first
        self.cache = self._make()
        self._caches = [one for one in self._caches if one() is not None] + [ref(self.cache)]
        return self.cache

    @property
    def frees(self) -> bool:
        """Whether generate() is to use freeing caches."""
        return self._make is not None

    def close(self) -> None:
        """The block ended: caches made in it are of no use outside."""
        for cache in self._alive():
            cache.notes.open = False

    def _alive(self) -> list[FreeCache]:
        return [cache for cache in (one() for one in self._caches) if cache is not None]

    def _waiting(self, call: AttentionCall) -> FreeLayer | None:
        """The layer of a freeing cache whose new keys this call has; PlanError when one waits and its keys are not these."""
        caches = self._alive()
        for cache in caches:
            found = cache.served(call.k)
            if found is not None:
                return found
        for cache in caches:
            for layer in cache.layers:
                if isinstance(layer, FreeLayer) and layer.waiting is not None and layer.number == call.layer:
                    what = self.watching()
                    raise refusal(
                        PlanError,
                        f"{call.module} with a freeing cache",
                        f"its keys were changed between the cache and attention{f' ({what})' if what else ''}",
                        "use the model's own cache: scope.execute(plan)",
                    )
        return None

    # ---- one call -----------------------------------------------------------------------------------------------

    def execute(self, call: AttentionCall) -> Tensor | None:
        """[B, Nq, Hq, Dv], or None for a call that the model's own kernel is to run."""
        patterns = self._layers.get(call.layer) if call.layer is not None else None
        if patterns is None or call.is_cross:
            return None
        if not call.mask.causal:
            return self.steps.execute(call, list(patterns), self.report)
        layer = int(call.layer or 0)
        if call.query_offset == 0:
            self._state[layer] = _LayerState()
        state = self._state.setdefault(layer, _LayerState())
        free = self._waiting(call) if self._caches else None
        if free is not None:
            return self._with_store(call, patterns, state, free)
        return self._with_call(call, patterns, state)

    def _with_call(self, call: AttentionCall, patterns: Heads, state: _LayerState) -> Tensor | None:
        """A call that holds all keys its rows may see."""
        decode = self._enters(call, patterns, state)
        now = patterns.decode if decode else patterns.prefill
        if not now.drop_at(call.k.shape[2] + call.key_offset):
            self._left("the plan drops nothing at this length")
            return None
        if decode and now.holding:
            self._refuse_moved(call, state)
        if decode and on_device(call) and not refuses(call, now):
            why = decode_worth_it(call, now) if self.fallback and now.static else ""
            if why:
                self._left(why)
                return None
            choose_due(call, now, state.memory, state.step)
            self._counted(now, "decode")
            made = picked(now, state.memory, self._memory)
            return call_step(call, now, {} if made else self._seen(now, state), state.memory, made)
        if not decode or now.static:
            why = worth_it(call, now) if self.fallback else ""
            if why:
                self._left(why)
                return None
            self._counted(now, sparse_backend(call, now))
            return sparse_attention(call, now)[0]
        self._counted(now, "blocked")
        return torch.cat([self._element(element(call, b), b, now, state) for b in range(call.q.shape[0])])

    def _memory(self, layer: int) -> Memory:
        """What a layer's heads chose."""
        return self._state[layer].memory

    def _refuse_moved(self, call: AttentionCall, state: _LayerState) -> None:
        """Keys chosen some steps ago belong to their sequence: in a cache that beam search reorders they would be another's."""
        place, before = call.query_offset - 1 - call.key_offset, state.tail
        if before is not None and before.shape[0] == call.k.shape[0] and place >= 0 and not torch.equal(before, call.k[:, :, place]):
            raise refusal(
                PlanError,
                f"a reordered cache under {call.module}",
                "keys that were chosen for one sequence would be used for another",
                'generate with num_beams=1, or with scope.execute(plan, cache="free"), which hears of the reordering',
            )
        state.tail = call.k[:, :, -1].clone()

    def _enters(self, call: AttentionCall, patterns: Heads, state: _LayerState) -> bool:
        """Whether a call is a decode step; budgets choose at the end of what is none."""
        decode = call.q.shape[2] == 1 and call.query_offset > 0
        state.step = state.step + 1 if decode else 0
        if patterns.budgets and not decode:
            self._choose_budgets(call, patterns, patterns.budgets, patterns.budgets, state)
        return decode

    def _choose_budgets(self, call: AttentionCall, patterns: Heads, at: Sequence[int], heads: Sequence[int], state: _LayerState) -> None:
        """`at`: the heads' numbers in the call, `heads`: in the layer."""
        own = [pattern for pattern in (patterns[head] for head in heads) if isinstance(pattern, Budget)]
        if on_device(call):
            found = choose_budgets(call, at, own)
            state.memory.take(Choice(tuple(heads), found.columns, found.since))
            return
        for b in range(call.q.shape[0]):
            one = element(call, b)
            for place, head, pattern in zip(at, heads, own, strict=True):
                state.chosen[b, head] = choose(one, place, pattern)

    def _seen(self, patterns: Heads, state: _LayerState) -> Keys:
        """What each head with chosen keys sees, its own choice or another layer's."""
        out: Keys = {}
        for head in patterns.listed:
            source = getattr(patterns[head], "source", None)
            memory, own = (state.memory, head) if source is None else (self._memory(source[0]), source[1])
            if memory.chose(own):  # the keys of a compressed budget lie in the store
                out[head] = memory.row(own)
        return out

    def _element(self, call: AttentionCall, b: int, patterns: Heads, state: _LayerState) -> Tensor:
        """One sequence of a call whose keys are chosen per input."""
        chosen = [self._chosen(call, b, head, head, pattern, state) for head, pattern in enumerate(patterns)]
        return blocked_sparse_attention(call, chosen)[0]

    def _chosen(self, call: AttentionCall, b: int, at: int, head: int, pattern: Pattern, state: _LayerState) -> Pattern:
        """`at`: the head's number in the call, `head`: in the layer."""
        place = (b, head)
        if isinstance(pattern, Budget):  # chosen at the end of the prefill
            return state.chosen[place]
        if isinstance(pattern, TopKeys):
            if pattern.source is not None:
                layer, other = pattern.source
                return self._state[layer].chosen[b, other]
            if place not in state.chosen or (state.step - 1) % pattern.refresh == 0:
                state.chosen[place] = choose(call, at, pattern)
            return Dense() if pattern.full else state.chosen[place]
        return choose(call, at, pattern)

    def _left(self, why: str) -> None:
        self.report["host"] += 1
        self.reasons[why] += 1

    def _counted(self, now: Heads, backend: str = "") -> None:
        self.report["dense"] += now.dense
        self.report["sparse"] += len(now) - now.dense
        if backend:
            self.ran[backend] += 1

    # ---- freeing caches -----------------------------------------------------------------------------------------

    def _with_store(self, call: AttentionCall, patterns: Heads, state: _LayerState, layer: FreeLayer) -> Tensor | None:
        """A call whose older keys lie in a freeing cache."""
        what = self.watching()
        if what:
            raise refusal(
                PlanError,
                f"{what} beside a freeing cache",
                "it would see the newest keys and take them for all",
                "use the model's own cache: scope.execute(plan)",
            )
        refuse_holes(call)
        assert layer.waiting is not None
        store = layer.store
        for index in layer.notes.selected.pop(layer.number, []):
            state.select(index)
        output: Tensor | None
        if call.query_offset == 0:
            output = self._with_call(call, patterns, state)
            store.append(*layer.waiting, call.first_token)
        else:
            output = self._later(call, patterns, state, store, layer.waiting)
        layer.waiting = None
        return output

    def _later(self, call: AttentionCall, patterns: Heads, state: _LayerState, store: LayerStore, new: tuple[Tensor, Tensor]) -> Tensor:
        """A chunk or a decode step over a store."""
        decode = call.q.shape[2] == 1
        state.step = state.step + 1 if decode else 0
        now = patterns.decode if decode else patterns.prefill
        if decode:
            if state.step == 1:
                forget_lists()
            self._compress(store, patterns, state)
        elif store.tails:
            raise refusal(
                PlanError,
                f"{call.q.shape[2]} tokens at once after decoding",
                "the budgets have dropped keys that these tokens would be entitled to see",
                "give the whole prompt at once, or use the model's own cache",
            )
        store.append_lasting(*new, store.starts)
        if decode and on_device(call) and not refuses(call, now, stored=True):
            store.append_passing(*new)
            for heads, one in store.full_calls(call) if now.choosing else ():
                choose_due(one, now.part(tuple(heads)), state.memory, state.step, heads, len(now))
            self._counted(now, "decode")
            made = picked(now, state.memory, self._memory)
            return store_step(call, now, store, {} if made else self._seen(now, state), state.memory, made)
        if decode:
            store.append_passing(*new)
            return self._by_parts(call, patterns, now, state, store)
        output = self._by_parts(call, patterns, now, state, store)
        store.append_passing(*new)  # a chunk's first rows still see what its last ones push out
        return output

    def _by_parts(self, call: AttentionCall, patterns: Heads, now: Heads, state: _LayerState, store: LayerStore) -> Tensor:
        """The same as ordinary calls over the parts of the store, sequence by sequence."""
        batch, heads, rows, _ = call.q.shape
        assert call.v is not None
        out = call.q.new_zeros(batch, rows, heads, call.v.shape[-1])
        lse = torch.full((batch, heads, rows), -torch.inf, dtype=torch.promote_types(call.q.dtype, torch.float32), device=call.q.device)
        for b in range(batch):
            found: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for own, one, seen in subcalls(store, call, b, now):
                resolved = []
                for at, (head, pattern) in enumerate(zip(own, seen, strict=True)):
                    if isinstance(patterns[head], Budget) and rows > 1:  # a chunk more of the prompt: chosen anew at its end
                        state.chosen[b, head] = choose(one, at, patterns[head])
                        state.memory.keys.pop(head, None)
                    resolved.append(pattern if pattern.static else self._chosen(one, b, at, head, pattern, state))
                found.setdefault(tuple(own), []).append(sparse_attention(one, resolved))
                self.ran[sparse_backend(one, resolved)] += 1
            for own_heads, parts in found.items():
                sinks = None if call.sink_logits is None else call.sink_logits[list(own_heads)]
                output, total = joined(parts, sinks)
                out[b, rows - output.shape[1] :, list(own_heads)] = output[0].to(out.dtype)
                lse[b, list(own_heads), rows - output.shape[1] :] = total[0].to(lse.dtype)
        self._counted(now)
        return with_sums(store, call, out, lse)[0] if rows == 1 else out

    def _compress(self, store: LayerStore, patterns: Heads, state: _LayerState) -> None:
        """At the first decode step: drop what the budgets leave out."""
        heads = patterns.budgets
        if state.step != 1 or not heads or store.tails:
            return
        chosen = {head: state.memory.keys[head] for head in heads if head in state.memory.keys}
        if len(chosen) < len(heads):
            batch = 1 + max(b for b, _ in state.chosen)
            starts = [0] * batch if store.starts is None else store.starts.tolist()
            listed = [[as_chosen(state.chosen[b, head]) for head in heads] for b in range(batch)]
            choice = Choice.of(listed, heads, starts, store.device)
        else:
            choice = Choice.of_rows(chosen)
        store.compress(choice)
        for head in heads:  # what lies in the store itself need not be remembered here
            state.memory.keys.pop(head, None)
        left = {head: choice.row(head) for head in heads if not store.compressed(head)}
        if left:
            state.memory.take(Choice.of_rows(left))

    def __repr__(self) -> str:
        ran = ", ".join(f"{count} {what}" for what, count in self.report.items()) or "nothing yet"
        why = "".join(f"; {count} calls left to the model: {reason}" for reason, count in self.reasons.items())
        return f"PlanExecutor({self.plan.method!r}: ran {ran}{why})"


def on_device(call: AttentionCall) -> bool:
    """Whether decode steps run in the kernels and choices stay in tensors, without the host looking at them."""
    return call.q.is_cuda


@contextmanager
def executing(
    scope: Scope, plan: SparsePlan, *, force: bool = False, cache: CacheKind = "model", fallback: bool = True
) -> Iterator[PlanExecutor]:
    """Runs the model under a plan inside the block: see `Scope.execute`."""
    if cache not in CACHES:
        raise unknown_name(PlanError, "cache", cache, CACHES)
    if not hasattr(plan, "check"):
        raise refusal(PlanError, f"{plan!r:.60}", "it is no SparsePlan", "pass SparsePlan.load(path), or what profile.plan(...) gave")
    plan.check(scope, force=force)
    if any(isinstance(one, PlanExecutor) for one in scope.executors):
        why = "another plan is being executed already, and a call is computed under one"
        raise refusal(PlanError, f"a second plan ({plan.method})", why, "leave the first block, or make one plan with plan.replace")
    modules = scope.topology.main
    windows = {module.layer or 0: module.window for module in modules}
    executor = PlanExecutor(plan, windows=windows, watching=lambda: scope.active_besides_plans, fallback=fallback)
    if cache == "free":
        refuse_unfreeable(scope)
        executor._make = lambda: FreeCache(plan, modules)
    try:
        with scope.executing(executor):
            yield executor
    finally:
        executor.close()

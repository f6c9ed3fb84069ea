"""What is known about a forward pass while it runs: which module is in, what its cache holds, which tokens are padding.

An attention function is told neither where its queries stand in the sequence nor which of its keys a sliding cache has already dropped.
Both are in the cache object that the attention module gets, but only before the module has updated it; so pre-hooks read them on the way
in. The two-dimensional padding mask, too, is only seen by the enclosing model, which turns it into something else.

One `ForwardState` exists per scope and thread, so that a second thread's forward pass cannot move the first one's positions.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headscope.topology import AttentionModule


@dataclass(slots=True, eq=False)
class ModuleRun:
    """One run of an attention module's forward, from its pre-hook to its post-hook."""

    record: AttentionModule
    cross: bool
    cache: Any
    query_offset: int
    key_offset: int | None
    static: bool
    rows: int | None
    serial: int
    calls: int = 0
    rows_seen: int = 0


@dataclass(slots=True, eq=False)
class ModelRun:
    """One run of a model or sub-model's forward: its two-dimensional masks and token ids."""

    padding: Tensor | None
    encoder_padding: Tensor | None
    tokens: Tensor | None


@dataclass(slots=True, eq=False)
class ForwardState:
    """The forward pass that is running in this thread. `number` counts the outermost ones, `serial` the runs of attention modules."""

    number: int = 0
    serial: int = 0
    models: list[ModelRun] = field(default_factory=list)
    modules: list[ModuleRun] = field(default_factory=list)
    offsets: dict[int, int] = field(default_factory=dict)
    masks: dict[tuple[object, ...], tuple[object, object]] = field(default_factory=dict)
    shared_keys: dict[int, int] = field(default_factory=dict)
    main_offset: int = 0
    main_valid: Tensor | None = None
    known_valid: WeakKeyDictionary[Any, Tensor] = field(default_factory=WeakKeyDictionary)
    unpadded: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary)
    """Of a cached sequence without padding: how many of its positions have been seen from its start on."""

    # ---- models -------------------------------------------------------------------------------------------------

    def enter_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model or sub-model starts; caches read before it may have moved on, so their offsets are read anew."""
        if not self.models:
            self.begin()
        self.offsets.clear()
        given = _by_name(model, args, kwargs)
        padding = _matrix(given.get("attention_mask"))
        encoder_padding = _matrix(given.get("encoder_attention_mask"))
        if self.models:  # sub-models that are not told (a decoder stack without encoder mask) inherit nothing: masks are per tower
            outer = self.models[-1]
            encoder_padding = encoder_padding if encoder_padding is not None else outer.encoder_padding
        tokens = given.get("input_ids", given.get("decoder_input_ids"))
        tokens = tokens if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 else None
        self.models.append(ModelRun(padding, encoder_padding, tokens))

    def leave_model(self) -> None:
        """The innermost model ended."""
        if self.models:
            self.models.pop()
        if not self.models:
            self.clear()

    def begin(self) -> None:
        """A new outermost forward pass."""
        self.number += 1
        self.clear()

    def clear(self) -> None:
        """Forget everything that holds tensors of a finished pass."""
        self.modules.clear()
        self.offsets.clear()
        self.masks.clear()
        self.shared_keys.clear()
        self.main_valid = None

    # ---- attention modules --------------------------------------------------------------------------------------

    def enter_module(self, record: AttentionModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleRun:
        """An attention module starts: read its cache before it is updated."""
        if not self.models and not self.modules:
            self.begin()  # called by itself, outside of any model
        given = _by_name(module, args, kwargs)
        other = given.get("key_value_states", given.get("encoder_hidden_states"))
        named = {"key_value_states", "encoder_hidden_states"} & _parameters(module).keys()
        cross = record.kind == "cross" or bool(named and other is not None)
        hidden = given.get("hidden_states")
        hidden = (
            hidden
            if isinstance(hidden, torch.Tensor)
            else next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        )
        cache = next((value for value in (*kwargs.values(), *args) if _is_cache(value)), None)
        offset, key_offset, static = 0, None, False
        if cross:
            offset = self.main_offset
        elif cache is not None:
            offset, key_offset, static = self._read_cache(cache, module)
        self.serial += 1
        run = ModuleRun(record, cross, cache, offset, key_offset, static, hidden.shape[-2] if hidden is not None else None, self.serial)
        self.modules.append(run)
        return run

    def _read_cache(self, cache: Any, module: nn.Module) -> tuple[int, int | None, bool]:
        """Absolute position of the first new row; that of the first key handed over where the cache says so; whether it is static."""
        from transformers.cache_utils import StaticLayer

        layer = getattr(module, "layer_idx", None)
        inner = getattr(cache, "self_attention_cache", cache)
        if id(cache) not in self.offsets:
            self.offsets[id(cache)] = int(cache.get_query_offset(layer or 0))
        offset = self.offsets[id(cache)]
        layers = getattr(inner, "layers", [])
        if not isinstance(layer, int) or layer >= len(layers):
            return offset, None, False
        static = isinstance(layers[layer], StaticLayer)
        return offset, int(inner.get_mask_sizes(1, layer)[1]) if static else None, static

    def leave_module(self, run: ModuleRun) -> None:
        """An attention module ended (also by an exception, which may have left inner runs behind)."""
        while self.modules and self.modules.pop() is not run:
            pass

    # ---- padding ------------------------------------------------------------------------------------------------

    def padding(self, batch: int, length: int) -> Tensor | None:
        """The [B, length] bool mask of real tokens that the enclosing model was given, None when it was given none that fits."""
        mask = self.models[-1].padding if self.models else None
        if mask is None or mask.shape[0] != batch or mask.shape[1] < length:
            return None
        return mask[:, :length].bool()

    def encoder_padding(self, batch: int, length: int) -> Tensor | None:
        """The same for the keys of cross-attention."""
        mask = self.models[-1].encoder_padding if self.models else None
        if mask is None or mask.shape != (batch, length):
            return None
        return mask.bool()

    def tokens(self, batch: int, rows: int) -> Tensor | None:
        """[B, rows] ids of the running forward, from the innermost model that was given such."""
        for model in reversed(self.models):
            if model.tokens is not None and model.tokens.shape == (batch, rows):
                return model.tokens
        return None


def cache_reference(cache: Any) -> Any:
    """A weak reference to a cache object, or a callable that gives None."""
    return (lambda: None) if cache is None else ref(cache)


def _matrix(value: Any) -> Tensor | None:
    return value if isinstance(value, torch.Tensor) and value.dim() == 2 else None


def _is_cache(value: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


_SIGNATURES: WeakKeyDictionary[type, dict[str, inspect.Parameter]] = WeakKeyDictionary()


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    kind = type(module)
    if kind not in _SIGNATURES:
        _SIGNATURES[kind] = dict(inspect.signature(inspect.unwrap(kind.forward)).parameters)
    return _SIGNATURES[kind]


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name."""
    names = [name for name in _parameters(module) if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}

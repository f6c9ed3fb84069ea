"""Topology: which attention modules a live model has, read from its modules and not from a list of model names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from headscope.errors import CaptureError, unknown_name

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["full", "sliding", "cross", "vision"]


@dataclass(frozen=True, slots=True)
class AttentionModule:
    """One attention module. `layer` is its number in the model's main stack, None in a side tower (vision, audio, encoder of an
    encoder-decoder) or a cross-attention; `name` is its qualified name in the scoped model and always identifies it.

    `window`: keys in (t - window, t]. `softcap`, `has_sinks`: see AttentionCall. `output`: qualified name of the linear module that
    mixes the heads (W_O), None when there is none. `capturable`: "" when its attention reaches a seam, else the reason why it does not.
    """

    name: str
    layer: int | None
    kind: Kind
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    output: str | None = None
    capturable: str = ""

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    def kv_head(self, head: int) -> int:
        """The key head that a query head reads."""
        return head // self.group


@dataclass(frozen=True, slots=True)
class Topology:
    """Every attention module of a model, in the order of its modules."""

    modules: tuple[AttentionModule, ...]
    model_class: str = ""
    _by_name: dict[str, AttentionModule] = field(default_factory=dict, repr=False, compare=False)
    _by_layer: dict[int, AttentionModule] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for module in self.modules:
            self._by_name[module.name] = module
            if module.layer is not None:
                self._by_layer[module.layer] = module

    @property
    def main(self) -> tuple[AttentionModule, ...]:
        """The modules of the main stack, by layer number."""
        return tuple(self._by_layer[layer] for layer in sorted(self._by_layer))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer numbers of the main stack, ascending."""
        return tuple(sorted(self._by_layer))

    @property
    def heads(self) -> int:
        """Query heads in all layers of the main stack."""
        return sum(module.heads for module in self.main)

    def __getitem__(self, key: int | str) -> AttentionModule:
        """The module of a layer number or a qualified name; CaptureError that lists what there is otherwise."""
        found = self._by_layer.get(key) if isinstance(key, int) else self._by_name.get(key)
        if found is not None:
            return found
        if isinstance(key, int):
            span = f"{self.layers[0]}..{self.layers[-1]}" if self.layers else "none"
            raise CaptureError(f"layer {key}: this model's attention layers are {span}; pass one of them, or a module's name")
        raise unknown_name(CaptureError, "attention module", key, self._by_name)

    def __repr__(self) -> str:
        side = len(self.modules) - len(self._by_layer)
        more = f" + {side} in side towers" if side else ""
        shape = "no layers"
        if self.main:
            first = self.main[0]
            shape = f"{len(self.main)} layers x {first.heads} heads ({first.kv_heads} kv), head_dim {first.head_dim}"
        return f"Topology({self.model_class}: {shape}{more})"


def derive(model: nn.Module) -> Topology:
    """The topology of a live model; see `headscope.capture` for what makes a module capturable."""
    from headscope.capture.discover import discover

    return discover(model)

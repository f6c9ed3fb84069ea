"""Intervention: a named, stackable, reversible change of a model's attention.

An intervention is a small frozen dataclass of plain values: what it does and to which heads. It is bound to a scope when a block opens,
which checks it against that model's topology, and from then on acts on every attention call of the modules it names, in `before` (the
call's q, k, v, mask, scale) or `after` (the heads' outputs). Acting on the call, and not on weights or on hidden states, has two merits:
there is nothing to put back when the block ends, and prefill, chunks and decode steps with a KV cache are all the same to it.

The silent failure this avoids: "head h" taken as a slice of the attention module's output. After W_O every head is spread over all
coordinates; a head is a slice of W_O's input only, and that is what `after` is given, per head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from headscope.errors import InterventionError, refusal, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope
    from headscope.topology import AttentionModule, Topology

Head = tuple[int | str, int]
"""A head: (layer number or module name, query head)."""

REGISTRY: dict[str, type[Intervention]] = {}
"""Every intervention by the name it has in JSON."""

C_ = TypeVar("C_", bound="type[Intervention]")


def register(name: str) -> Callable[[C_], C_]:
    """Class decorator: enter an intervention under a name; a name that is taken is refused."""

    def enter(cls: C_) -> C_:
        if name in REGISTRY:
            raise refusal(
                InterventionError, f"a second intervention {name!r}", f"the name belongs to {REGISTRY[name].__name__}", "choose another"
            )
        REGISTRY[name] = cls
        cls.name = name
        return cls

    return enter


@dataclass(frozen=True)
class Intervention:
    """Base of all interventions. Subclasses are frozen dataclasses of JSON values, and override `bind` and `before` or `after`.

    `bind(scope)` validates against the scope's model and returns the object that acts (itself, or a copy with what it looked up). Then, for
    every attention call of the scope, in order:

    - `before(call)` returns the call to run: itself, or `dataclasses.replace(call, q=..., k=..., v=..., mask=..., scale=...)`. Changes of
      q, k and v are run by the model's own kernel; a change of mask, scale, softcap or sink logits, which no host kernel can be told, is
      computed by headscope's exact attention in O(N) memory.
    - `after(call, output)` gets the heads' outputs [B, Nq, Hq, Dv], before W_O, and returns them, changed on a copy.
    """

    name: ClassVar[str] = ""

    def bind(self, scope: Scope) -> Intervention:
        """Check against a model; InterventionError when it does not fit."""
        return self

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call to run."""
        return call

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The heads' outputs [B, Nq, Hq, Dv] to go on with."""
        return output

    def to_json(self) -> str:
        """The intervention as JSON: {"intervention": name, ...its fields}."""
        return json.dumps({"intervention": self.name, **asdict(self)})

    @staticmethod
    def from_json(text: str) -> Intervention:
        """An intervention from `to_json`; InterventionError for anything else."""
        return from_json(text)


def from_json(text: str) -> Intervention:
    """The intervention that a JSON text describes. Raises InterventionError for unknown names, fields or values."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise refusal(InterventionError, f"{text[:60]!r}", f"it is no JSON ({error})", "pass what Intervention.to_json gave") from None
    if not isinstance(given, dict) or "intervention" not in given:
        raise refusal(InterventionError, f"{text[:60]!r}", 'it has no "intervention"', 'pass {"intervention": name, ...}')
    name = given.pop("intervention")
    if name not in REGISTRY:
        raise unknown_name(InterventionError, "intervention", name, REGISTRY)
    cls = REGISTRY[name]
    known = {field.name for field in fields(cls)}
    for field in given:
        if field not in known:
            raise unknown_name(InterventionError, f"field of {name}", field, known)
    try:
        return cls(**given)
    except TypeError as error:
        raise refusal(InterventionError, f"{text[:60]!r}", str(error), f"{name} takes {', '.join(sorted(known))}") from None


def heads_of(heads: Any) -> tuple[Head, ...]:
    """Heads as (layer, head) pairs, in order and once each, from pairs, "18.6,17.3", or anything iterable of these."""
    if isinstance(heads, str):
        pairs = [_parse(part) for part in heads.split(",") if part.strip()]
    elif isinstance(heads, Iterable):
        pairs = []
        for one in heads:
            pairs += [_parse(part) for part in one.split(",")] if isinstance(one, str) else [_pair(one)]
    else:
        raise refusal(InterventionError, f"heads={heads!r}", "heads are pairs", 'pass [(18, 6), (17, 3)] or "18.6,17.3"')
    if not pairs:
        raise refusal(InterventionError, f"heads={heads!r}", "no head is named", 'pass [(18, 6), (17, 3)] or "18.6,17.3"')
    return tuple(dict.fromkeys(pairs))


def _parse(text: str) -> Head:
    layer, dot, head = text.strip().rpartition(".")
    if not dot or not head.isdigit() or not layer:
        raise refusal(InterventionError, f"head {text.strip()!r}", "a head is written layer.head", 'write "18.6"')
    return (int(layer) if layer.isdigit() else layer, int(head))


def _pair(one: Any) -> Head:
    try:
        layer, head = one
        return (layer if isinstance(layer, str) else int(layer), int(head))
    except (TypeError, ValueError):
        raise refusal(InterventionError, f"head {one!r}", "a head is a pair (layer, head)", "pass e.g. (18, 6)") from None


def resolve(heads: Iterable[Head], topology: Topology) -> dict[str, list[int]]:
    """Module name -> its heads, checked; InterventionError for a layer or head that the model does not have."""
    out: dict[str, list[int]] = {}
    for layer, head in heads:
        module = _module(layer, head, topology)
        if module.capturable:
            raise refusal(InterventionError, f"head {layer}.{head}", module.capturable, "choose a head of another layer")
        if not 0 <= head < module.heads:
            raise refusal(InterventionError, f"head {layer}.{head}", f"layer {layer} has heads 0..{module.heads - 1}", "pass one of those")
        out.setdefault(module.name, []).append(head)
    return out


def _module(layer: int | str, head: int, topology: Topology) -> AttentionModule:
    from headscope.errors import CaptureError

    try:
        return topology[layer]
    except CaptureError as error:
        raise InterventionError(f"head {layer}.{head}: {error}") from None

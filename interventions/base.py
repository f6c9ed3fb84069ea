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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
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

VERSION = 1
"""The version of specifications that this code writes, and the newest one it reads."""

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

    def opened(self, scope: Scope) -> AbstractContextManager[object]:
        """Entered with the block, on the bound object, and left with it whatever ends it: for what has to look beside the calls."""
        return nullcontext()

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call to run."""
        return call

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The heads' outputs [B, Nq, Hq, Dv] to go on with."""
        return output

    def wants_lse(self, call: AttentionCall) -> bool:
        """Whether `after` will ask for the rows' normalisers, so that the host's own kernel may be asked to hand them out."""
        return False

    def passes_over(self, module: str) -> bool:
        """Whether a module's calls are nothing to it, neither to edit nor to look at, so that in a side tower they need not be read."""
        return False

    def settings(self) -> dict[str, Any]:
        """The fields as they go into JSON; tensors are Values."""
        return {one.name: getattr(self, one.name) for one in fields(self) if not one.name.startswith("_")}

    def explain(self) -> str:
        """In words: what is done, to which heads, where, and at what cost."""
        return repr(self)

    def to_json(self, tensors: str | Path | None = None) -> str:
        """The intervention as JSON: {"intervention": name, "version": 1, ...its fields}.

        `tensors`: the safetensors file to write an intervention's tensors to; JSON keeps its name, not its folder, so put the JSON beside
        it. InterventionError for one that has tensors and no file to go to.
        """
        return json.dumps(spec_of(self, tensors))

    @staticmethod
    def from_json(text: str, folder: str | Path = ".") -> Intervention:
        """An intervention from `to_json`; InterventionError for anything else. `folder`: where its tensors are."""
        return from_json(text, folder)


def spec_of(one: Intervention, tensors: str | Path | None = None, prefix: str = "") -> dict[str, Any]:
    """An intervention as plain data; its tensors go to a file, under names that begin with `prefix`, beside those already in it."""
    from headscope.interventions.values import Values, write_values

    settings = one.settings()
    values = {key: value for key, value in settings.items() if isinstance(value, Values)}
    if values:
        known = {value.file for value in values.values()}
        path = Path(tensors) if tensors is not None else next(iter(known)) if len(known) == 1 else None
        if path is None:
            raise refusal(
                InterventionError,
                f"{type(one).__name__} with {', '.join(values)}",
                "JSON holds no tensors",
                "pass to_json(tensors='spec.safetensors')",
            )
        stored = {f"{prefix}{key}": value for key, value in values.items()}
        if tensors is not None:
            write_values(path, stored)
        settings |= {key: value.to_dict(f"{prefix}{key}", path.name) for key, value in values.items()}
    return {"intervention": one.name, "version": VERSION, **settings}


def from_json(text: str, folder: str | Path = ".") -> Intervention:
    """The intervention that a JSON text describes. Raises InterventionError for unknown names, fields or values, and for a newer
    version."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise refusal(InterventionError, f"{text[:60]!r}", f"it is no JSON ({error})", "pass what Intervention.to_json gave") from None
    return from_spec(given, folder)


def check_version(given: dict[str, Any]) -> None:
    """Takes "version" off a specification. InterventionError for a newer one: what it says could mean something else here."""
    version = given.pop("version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise refusal(InterventionError, f"version {version!r}", "versions are 1, 2, ...", f'write "version": {VERSION}, or leave it out')
    if version > VERSION:
        raise refusal(
            InterventionError,
            f"a specification of version {version}",
            f"it comes from a newer headscope, and this one reads up to version {VERSION}",
            "update headscope, or write the specification again with this one",
        )


def from_spec(given: Any, folder: str | Path = ".") -> Intervention:
    """The intervention that plain data describes; see `from_json`."""
    from headscope.interventions.values import MARK, Values

    if not isinstance(given, dict) or "intervention" not in given:
        raise refusal(InterventionError, f"{str(given)[:60]!r}", 'it has no "intervention"', 'pass {"intervention": name, ...}')
    given = dict(given)
    name = given.pop("intervention")
    check_version(given)
    if name not in REGISTRY:
        raise unknown_name(InterventionError, "intervention", name, REGISTRY)
    cls = REGISTRY[name]
    known = {field.name for field in fields(cls) if not field.name.startswith("_")}
    for field, value in given.items():
        if field not in known:
            raise unknown_name(InterventionError, f"field of {name}", field, known)
        if isinstance(value, dict) and MARK in value:
            given[field] = Values.from_dict(value, Path(folder))
    try:
        return cls(**given)
    except TypeError as error:
        raise refusal(InterventionError, f"{str(given)[:60]!r}", str(error), f"{name} takes {', '.join(sorted(known))}") from None


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
        instead = 'write "18.6", or HeadSet.select(profile, "top 5 induction") for heads of a role or metric'
        raise refusal(InterventionError, f"head {text.strip()!r}", "a head is written layer.head", instead)
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

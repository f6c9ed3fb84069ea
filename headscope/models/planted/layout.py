"""Where everything lives: features in the residual stream, and per key head the dimensions that its query heads read.

The heads of a group share one key head, so its key must carry what every one of them looks for, each in dimensions of its own; a query is
zero elsewhere and so sees only its own. Two features in one dimension would add up silently and no row would be what the truth table says:
what does not fit is refused here, before any weight is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headscope.errors import ModelError, refusal
from headscope.models.planted.kinds import BlockLocal, Duplicate, Induction, Kind, Offset, Previous, Uniform, Vertical, VisionLabel
from headscope.models.planted.rotary import Rotary, rotary

Place = tuple[int, int]
Slot = tuple[str, tuple[int, ...]]
"""A feature and its detail: ("bos", ()), ("token", ()), ("previous", ()), ("tokens", ids), ("positions", positions), ("block", (width,))
in keys; besides, in the residual stream, ("const", ()), ("copy", ()), ("meter", ()), ("step", (p,))."""

BOS = 0
PAD = 1
BOS_SLOT: Slot = ("bos", ())
_CODE_DIMS = (32, 24, 16, 12, 8)
_HEAD_DIMS = (64, 128, 256)


@dataclass
class Layout:
    """The plan of a model; `heads` names every head, `groups[layer, kv_head]` the key dimensions of each slot, `residual` the columns of
    each feature. `feeder`: the previous-token head that writes for induction; `meter`: the uniform head that measures positions."""

    layers: int
    n_heads: int
    kv_heads: int
    vocab: int
    positions: int
    heads: dict[Place, Kind]
    rotary: Rotary
    feeder: Place | None = None
    meter: Place | None = None
    head_dim: int = 0
    code_dims: int = 0
    groups: dict[Place, dict[Slot, tuple[int, ...]]] = field(default_factory=dict)
    residual: dict[Slot, slice] = field(default_factory=dict)
    hidden: int = 0

    @property
    def steps(self) -> list[int]:
        """Positions p of every step feature 1[t >= p] that some planted head needs."""
        found: set[int] = set()
        for kind in self.heads.values():
            if isinstance(kind, Vertical):
                found |= {edge for p in kind.positions if p for edge in (p, p + 1)}
            elif isinstance(kind, BlockLocal):
                found |= set(range(kind.width, self.positions, kind.width))
        return sorted(found)

    def blocks(self, width: int) -> int:
        """Blocks of that width in the context."""
        return -(-self.positions // width)

    def width(self, slot: Slot) -> int:
        """Dimensions that a slot takes in a key."""
        if slot[0] in ("token", "previous"):
            return self.code_dims
        return min(self.blocks(slot[1][0]), _CODE_DIMS[0]) if slot[0] == "block" else 1


def slots(kind: Kind) -> tuple[Slot, ...]:
    """What a head of this kind looks for in a key; offset heads also read the constant on the fast rotary pairs."""
    if isinstance(kind, Uniform):
        return ()
    if isinstance(kind, Duplicate):
        return (("token", ()),)
    if isinstance(kind, BlockLocal):
        return (("block", (kind.width,)),)
    if isinstance(kind, Induction):
        return (BOS_SLOT, ("previous", ()))
    if isinstance(kind, Vertical) and kind.positions:
        return (BOS_SLOT, ("positions", tuple(sorted(set(kind.positions)))))
    if isinstance(kind, Vertical | VisionLabel):
        return (BOS_SLOT, ("tokens", tuple(sorted(set(kind.tokens)))))
    return (BOS_SLOT,)


def plan(
    heads: Mapping[Place, Kind], *, layers: int, n_heads: int, kv_heads: int, vocab: int, positions: int, head_dim: int | None
) -> Layout:
    """Checks the request and places every feature. Raises ModelError that names the head and what would make it possible."""
    least_of = {
        "layers": (layers, 1),
        "n_heads": (n_heads, 1),
        "kv_heads": (kv_heads, 1),
        "vocab": (vocab, 4),
        "max_positions": (positions, 2),
    }
    for name, (value, least) in least_of.items():
        if value < least:
            raise refusal(ModelError, f"{name}={value}", f"a planted model needs at least {least}", f"pass {name}={least} or more")
    if n_heads % kv_heads:
        given = f"n_heads={n_heads}, kv_heads={kv_heads}"
        raise refusal(ModelError, given, "query heads share key heads in equal groups", "pass a divisor of n_heads")
    full: dict[Place, Kind] = {(layer, head): Uniform() for layer in range(layers) for head in range(n_heads)}
    for place, kind in heads.items():
        if place not in full:
            why = f"the model has layers 0..{layers - 1} and heads 0..{n_heads - 1}"
            raise refusal(ModelError, f"a head at {place!r}", why, "pass (layer, head) within it, or a larger model")
        _check_kind(place, kind, vocab, positions)
        full[place] = kind
    out = Layout(layers, n_heads, kv_heads, vocab, positions, full, rotary(_HEAD_DIMS[0], positions))
    out.feeder = _earlier(out, Induction, Previous, "a previous-token head", "plant Previous() in an earlier layer, e.g. (0, 0)")
    measured = [place for place, kind in full.items() if isinstance(kind, BlockLocal) or (isinstance(kind, Vertical) and kind.positions)]
    if measured:
        out.meter = _first_before(out, min(measured), Uniform, "a uniform head", "leave one head of an earlier layer unplanted")
    _place_keys(out, head_dim)
    _place_residual(out)
    return out


def _check_kind(place: Place, kind: Kind, vocab: int, positions: int) -> None:
    given = f"{kind!r} at {place}"
    if not isinstance(kind, Kind) or not kind.name:
        raise refusal(ModelError, given, "it is not a kind of head", "pass Previous(), Offset(5), Induction(), ...")
    if isinstance(kind, Offset) and not 0 <= kind.delta < positions:
        raise refusal(ModelError, given, f"the context has {positions} positions", f"pass an offset in 0..{positions - 1}")
    if isinstance(kind, BlockLocal) and not 1 <= kind.width <= positions:
        raise refusal(ModelError, given, f"the context has {positions} positions", f"pass a width in 1..{positions}")
    if isinstance(kind, Vertical) and bool(kind.positions) == bool(kind.tokens):
        raise refusal(ModelError, given, "columns are named by position or by token", "pass positions=(...) or tokens=(...), not both")
    if isinstance(kind, Vertical) and any(not 0 <= p < positions for p in kind.positions):
        raise refusal(ModelError, given, f"the context has {positions} positions", f"pass positions in 0..{positions - 1}")
    if isinstance(kind, Vertical | VisionLabel):
        if isinstance(kind, VisionLabel) and not kind.tokens:
            raise refusal(ModelError, given, "no token stands for an image patch", "pass tokens=(...)")
        if any(not 0 <= token < vocab or token == PAD for token in kind.tokens):
            raise refusal(ModelError, given, f"ids are 0..{vocab - 1}, and {PAD} is padding", "pass ids of real tokens")


def _earlier(layout: Layout, reader: type[Kind], feeder: type[Kind], what: str, instead: str) -> Place | None:
    """The one feeder that serves every reader: the first of its kind, in a layer before all readers; None when nothing reads."""
    readers = [place for place, kind in layout.heads.items() if isinstance(kind, reader)]
    return _first_before(layout, min(readers), feeder, what, instead) if readers else None


def _first_before(layout: Layout, reader: Place, feeder: type[Kind], what: str, instead: str) -> Place:
    found = [place for place, kind in layout.heads.items() if isinstance(kind, feeder) and place[0] < reader[0]]
    if not found:
        given, why = f"{layout.heads[reader]!r} at {reader}", f"it reads what {what} of an earlier layer writes, and there is none"
        raise refusal(ModelError, given, why, instead)
    return min(found)


def _place_keys(layout: Layout, head_dim: int | None) -> None:
    """Chooses the head dimension and the length of the token codes: the first pair, largest codes first, in which every group fits."""
    if head_dim is not None and (head_dim < 8 or head_dim % 2):
        raise refusal(ModelError, f"head_dim={head_dim}", "rotary embedding turns pairs, and 4 are the least", "pass an even number from 8")
    tokens = layout.vocab - 2
    lengths = dict.fromkeys(min(tokens, length) for length in _CODE_DIMS)
    reason = ""
    for dims in _HEAD_DIMS if head_dim is None else (head_dim,):
        turning = rotary(dims, layout.positions)
        for length in lengths:
            layout.head_dim, layout.code_dims, layout.rotary, layout.groups = dims, length, turning, {}
            reason = _fill_groups(layout, turning)
            if not reason:
                return
    instead = "pass a larger head_dim, more kv_heads, fewer kinds per group or a shorter max_positions"
    raise refusal(ModelError, f"head_dim={layout.head_dim}", reason, instead)


def _fill_groups(layout: Layout, turning: Rotary) -> str:
    """Gives each slot of each group its dimensions; returns why it cannot, or ""."""
    if layout.code_dims + 1 > layout.head_dim:
        return f"values of {layout.code_dims + 1} dimensions do not fit"
    free = turning.content_dims
    group = layout.n_heads // layout.kv_heads
    for layer in range(layout.layers):
        for kv_head in range(layout.kv_heads):
            kinds = [layout.heads[layer, kv_head * group + i] for i in range(group)]
            wanted = dict.fromkeys(slot for kind in kinds for slot in slots(kind))
            need = sum(layout.width(slot) for slot in wanted)
            if need > len(free):
                names = ", ".join(sorted({kind.name for kind in kinds if slots(kind)}))
                return f"key head {kv_head} of layer {layer} serves {names}, which takes {need} dimensions of {len(free)} that stand still"
            layout.groups[layer, kv_head] = {}
            used = 0
            for slot in wanted:
                layout.groups[layer, kv_head][slot] = free[used : used + layout.width(slot)]
                used += layout.width(slot)
    return ""


def _place_residual(layout: Layout) -> None:
    """Columns of the residual stream: constant, BOS flag, codes of the own, the previous and the copied token, meter, flags, steps."""
    code = layout.code_dims
    fixed = {"const": 1, "bos": 1, "token": code, "previous": code, "copy": code, "meter": 1}
    wanted: list[tuple[Slot, int]] = [((name, ()), width) for name, width in fixed.items()]
    flags = dict.fromkeys(slot for kind in layout.heads.values() for slot in slots(kind) if slot[0] == "tokens")
    wanted += [(slot, 1) for slot in flags]
    wanted += [(("step", (p,)), 1) for p in layout.steps]
    used = 0
    for slot, width in wanted:
        layout.residual[slot] = slice(used, used + width)
        used += width
    layout.hidden = -(-used // layout.n_heads) * layout.n_heads

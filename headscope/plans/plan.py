"""SparsePlan: one pattern per (layer, query head) of one model, static data that can be read, checked, drawn, saved and run.

A plan says for which model it is, by the shape of its attention and by its fingerprint: a plan of another model has heads in the right
places and the wrong meaning, and would run without a word. It says how it was made (`method`, `parameters`), and from which run.

What it costs and keeps is computed from the patterns (density, FLOPs, cached bytes) or from measured statistics (kept mass); a number from
a rule whose keys are chosen per input is marked as an expectation by `dynamic`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import PlanError, refusal
from headscope.plans.patterns import Dense, Pattern, Streaming
from headscope.plans.registry import pattern_from

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headscope.export import LossReport
    from headscope.plans.mass import KeptMass
    from headscope.profile import HeadProfile
    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics
    from headscope.topology import Topology

SCHEMA_VERSION = 1
Place = tuple[int, int]


@dataclass(frozen=True)
class PlanModel:
    """For which model a plan is. `heads`, `kv_heads`, `head_dim` per layer of the main stack, in order; `fingerprint` may be empty."""

    name: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    fingerprint: str = ""

    @classmethod
    def of(cls, source: Scope | HeadProfile) -> PlanModel:
        """From a live model, or from the profile of one."""
        from headscope.profile.head_profile import HeadProfile

        if not isinstance(source, HeadProfile):
            topology: Topology = source.topology
            main = topology.main
            return cls(
                source.name,
                topology.layers,
                tuple(module.heads for module in main),
                tuple(module.kv_heads for module in main),
                tuple(module.head_dim for module in main),
                source.fingerprint,
            )
        table, facts = source.table, source.card.model
        grouped = table.groupby("layer", sort=True)
        layers = tuple(int(layer) for layer in grouped.groups)
        return cls(
            str(facts["name"]),
            layers,
            tuple(int(part["head"].max()) + 1 for _, part in grouped),
            tuple(int(part["kv_head"].max()) + 1 for _, part in grouped),
            (int(facts["head_dim"]),) * len(layers),
            str(facts.get("fingerprint") or ""),
        )

    @property
    def places(self) -> list[Place]:
        """Every (layer, head), in order."""
        return [(layer, head) for layer, count in zip(self.layers, self.heads, strict=True) for head in range(count)]

    def kv_head(self, layer: int, head: int) -> int:
        """The key head that a query head reads."""
        at = self.layers.index(layer)
        return head // (self.heads[at] // self.kv_heads[at])

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "layers": list(self.layers),
            "heads": list(self.heads),
            "kv_heads": list(self.kv_heads),
            "head_dim": list(self.head_dim),
        }


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """`patterns`: (layer, query head) -> Pattern, for every head of `model`. `method`, `parameters`: how it was made. `notes`: what a
    reader must know.
    """

    model: PlanModel
    patterns: Mapping[Place, Pattern]
    method: str = "by hand"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = self.model.places
        given = {(int(layer), int(head)): pattern for (layer, head), pattern in self.patterns.items()}
        for place, pattern in given.items():
            if place not in set(known):
                raise refusal(PlanError, f"head {_word(place)}", self._shape(), "plan for the model's own heads")
            if not isinstance(pattern, Pattern):
                raise refusal(
                    PlanError, f"{pattern!r} for head {_word(place)}", "it is no pattern", "use headscope.plans.Streaming(...) etc."
                )
            source = getattr(pattern, "source", None)
            if source is not None and (source not in set(known) or source[0] >= place[0]):
                raise refusal(
                    PlanError,
                    f"head {_word(place)} reusing head {_word(source)}",
                    "a head can take over keys only from a head of an earlier layer of the same model",
                    "name an earlier layer",
                )
            if source is not None and (getattr(given.get(source), "kind", "") != pattern.kind or getattr(given[source], "source", None)):
                raise refusal(
                    PlanError,
                    f"head {_word(place)} reusing head {_word(source)}",
                    "that head chooses no keys of its own",
                    f"give head {_word(source)} a pattern of kind {pattern.kind} without a source",
                )
        missing = [place for place in known if place not in given]
        if missing:
            listed = ", ".join(_word(place) for place in missing[:4])
            raise refusal(
                PlanError, f"a plan without heads {listed}", f"{self._shape()}, and each needs a pattern", "give Dense() to the others"
            )
        object.__setattr__(self, "patterns", {place: given[place] for place in known})

    @classmethod
    def uniform(cls, source: Scope | HeadProfile | PlanModel, pattern: Pattern, **facts: Any) -> SparsePlan:
        """One pattern for every head."""
        model = source if isinstance(source, PlanModel) else PlanModel.of(source)
        return cls(model, dict.fromkeys(model.places, pattern), **facts)

    def replace(self, patterns: Mapping[Place, Pattern]) -> SparsePlan:
        """A copy with some heads' patterns changed."""
        return SparsePlan(self.model, {**self.patterns, **patterns}, self.method, self.parameters, self.notes)

    def __getitem__(self, place: Place) -> Pattern:
        if place not in self.patterns:
            raise refusal(PlanError, f"head {_word(place)}", self._shape(), "name one of the model's heads")
        return self.patterns[place]

    @property
    def dynamic(self) -> bool:
        """True when a head's keys are chosen per input, so that densities are expectations."""
        return any(not pattern.static for pattern in self.patterns.values())

    # ---- cost ---------------------------------------------------------------------------------------------------

    def density(self, length: int) -> float:
        """Kept share of the causal (row, key) entries over all heads of a prefill of `length` tokens."""
        return self._mean(lambda pattern: pattern.density(length), length)

    def densities(self, length: int) -> np.ndarray:
        """[L, H] float64 density per head; NaN where a layer has fewer heads."""
        return self._matrix(lambda place, pattern: pattern.density(length))

    def flops(self, length: int) -> float:
        """Floating-point operations of the two products (QK and AV) of a prefill: 4 * head_dim per kept entry, over all heads."""
        _check(length)
        dims = dict(zip(self.model.layers, self.model.head_dim, strict=True))
        kept = _cached(lambda pattern: pattern.kept(length))
        return sum(4.0 * dims[layer] * kept(pattern) for (layer, _), pattern in self.patterns.items())

    def cached_keys(self, length: int) -> dict[tuple[int, int], float]:
        """(layer, key head) -> keys that must stay cached after `length` tokens.

        Heads of a group with different patterns need the union of their keys; a streaming head inside a dense head's group saves compute
        and no memory. Sinks and windows are joined exactly; of other kinds beside each other the neediest counts, the least it can be.
        """
        _check(length)
        cached = _cached(lambda pattern: pattern.cached(length))
        groups: dict[tuple[int, int], set[Pattern]] = {}
        for (layer, head), pattern in self.patterns.items():
            groups.setdefault((layer, self.model.kv_head(layer, head)), set()).add(pattern.fixed(length))
        return {place: max(cached(pattern) for pattern in (*patterns, *_joined(patterns))) for place, patterns in groups.items()}

    def kv_bytes(self, length: int, bytes_per_value: int = 2) -> float:
        """Bytes of keys and values that stay cached after `length` tokens, over all layers, for one sequence."""
        dims = dict(zip(self.model.layers, self.model.head_dim, strict=True))
        return sum(2.0 * dims[layer] * bytes_per_value * keys for (layer, _), keys in self.cached_keys(length).items())

    def kv_share(self, length: int) -> float:
        """Cached bytes as a share of the dense cache's."""
        return self.kv_bytes(length) / SparsePlan.uniform(self.model, Dense()).kv_bytes(length)

    def layer(self, layer: int) -> list[Pattern]:
        """The patterns of a layer's query heads, in order. PlanError for a layer that the plan does not have."""
        if layer not in self.model.layers:
            raise refusal(PlanError, f"layer {layer}", self._shape(), "name one of the model's layers")
        return [self.patterns[layer, head] for head in range(self.model.heads[self.model.layers.index(layer)])]

    def kept_mass(
        self, source: Scope | HeadProfile | HeadStatistics, length: int | None = None, data: Any = None, *, exact: bool = False
    ) -> KeptMass:
        """Share of each head's attention that the plan keeps at `length` tokens, from statistics: see `headscope.plans.mass`."""
        from headscope.plans.mass import kept_mass

        return kept_mass(self, source, length, data, exact=exact)

    def _mean(self, value: Callable[[Pattern], float], length: int) -> float:
        _check(length)
        cached = _cached(value)
        return sum(cached(pattern) for pattern in self.patterns.values()) / len(self.patterns)

    def _matrix(self, value: Callable[[Place, Pattern], float]) -> np.ndarray:
        out = np.full((len(self.model.layers), max(self.model.heads)), np.nan)
        index = {layer: at for at, layer in enumerate(self.model.layers)}
        for (layer, head), pattern in self.patterns.items():
            out[index[layer], head] = value((layer, head), pattern)
        return out

    # ---- checks -------------------------------------------------------------------------------------------------

    def check(self, scope: Scope, *, force: bool = False) -> None:
        """Raises PlanError when the plan is not for this model. `force` lets another fingerprint pass, never another shape."""
        live = PlanModel.of(scope)
        for name in ("layers", "heads", "kv_heads", "head_dim"):
            mine, its = getattr(self.model, name), getattr(live, name)
            if mine != its:
                raise refusal(
                    PlanError,
                    f"a plan for {self.model.name} ({name} {_short(mine)})",
                    f"{live.name} has {name} {_short(its)}",
                    "plan for this model",
                )
        if self.model.fingerprint and self.model.fingerprint != live.fingerprint and not force:
            raise refusal(
                PlanError,
                f"a plan for {self.model.name} (fingerprint {self.model.fingerprint})",
                f"{live.name} has the same shape and other weights (fingerprint {live.fingerprint})",
                "plan for this model, or pass force=True if its heads are known to be the same",
            )

    # ---- files --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As plain data: equal patterns stand once, heads name them by number."""
        listed = list(dict.fromkeys(self.patterns.values()))
        number = {pattern: at for at, pattern in enumerate(listed)}
        rows = [
            [number[self.patterns[layer, head]] for head in range(count)]
            for layer, count in zip(self.model.layers, self.model.heads, strict=True)
        ]
        return {
            "schema": "headscope-plan",
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_dict(),
            "method": self.method,
            "parameters": dict(self.parameters),
            "notes": list(self.notes),
            "patterns": [pattern.to_dict() for pattern in listed],
            "heads": rows,
        }

    def to_json(self) -> str:
        """The plan as JSON; the same plan gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, given: Any) -> SparsePlan:
        """From plain data. Raises PlanError for another schema, a newer version, and a plan whose tables do not fit each other."""
        from headscope.plans.schema import check_plan

        check_plan(given)
        facts = given["model"]
        model = PlanModel(
            facts["name"],
            tuple(facts["layers"]),
            tuple(facts["heads"]),
            tuple(facts["kv_heads"]),
            tuple(facts["head_dim"]),
            facts.get("fingerprint", ""),
        )
        listed = [pattern_from(one) for one in given["patterns"]]
        patterns = {
            (layer, head): listed[number]
            for layer, row in zip(model.layers, given["heads"], strict=True)
            for head, number in enumerate(row)
        }
        return cls(model, patterns, given["method"], given["parameters"], tuple(given["notes"]))

    @classmethod
    def from_json(cls, text: str) -> SparsePlan:
        """From `to_json`; PlanError for anything else."""
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists too deep
            raise refusal(PlanError, f"{text[:60]!r}", f"it is no JSON ({error})", "pass what SparsePlan.to_json gave") from None

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the plan as JSON, whole or not at all. PlanError when the file exists and `overwrite` is false."""
        from headscope.plans.schema import write_text

        return write_text(Path(path), self.to_json(), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> SparsePlan:
        """Reads a plan. PlanError when it is missing, damaged or newer than this code."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise refusal(PlanError, str(path), f"it cannot be read ({error})", "pass the path of a plan.json") from None
        return cls.from_json(text)

    def export(self, format: str, path: str | Path, **options: Any) -> LossReport:
        """Writes the plan as another engine's files: `plan.export("minference", "out/", lossy=True)`; see `headscope.export.Format.write`
        for `lossy`, `force`, `length` and `profile`.
        """
        from headscope.export import write

        return write(self, format, path, **options)

    # ---- showing ------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Heads per kind of pattern, most first."""
        return dict(Counter(pattern.kind for pattern in self.patterns.values()).most_common())

    def plot(self, length: int = 32768) -> go.Figure:
        """Heat map of the density per head at one length."""
        import plotly.graph_objects as go

        text = [
            [str(self.patterns[layer, head]) if head < count else "" for head in range(max(self.model.heads))]
            for layer, count in zip(self.model.layers, self.model.heads, strict=True)
        ]
        figure = go.Figure(
            go.Heatmap(
                z=self.densities(length),
                y=list(self.model.layers),
                text=text,
                hovertemplate="layer %{y} head %{x}: %{z:.1%}<br>%{text}<extra></extra>",
                colorscale="Cividis",
                zmin=0,
                zmax=1,
                colorbar={"title": "kept share", "tickformat": ".0%"},
            )
        )
        figure.update_layout(
            title=f"{self.method}: {self.density(length):.1%} of the entries kept at {length:,} tokens",
            xaxis_title="head",
            yaxis={"title": "layer", "autorange": "reversed"},
        )
        return figure

    def _shape(self) -> str:
        return f"{self.model.name} has layers {self.model.layers[0]}..{self.model.layers[-1]} of {_short(self.model.heads)} heads"

    def __repr__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
        return f"SparsePlan({self.method!r} for {self.model.name!r}: {kinds}; {self.density(32768):.1%} kept at 32,768 tokens)"

    def _repr_mimebundle_(self, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None) -> dict[str, str]:
        import html

        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{value}</td></tr>"
            for name, value in (
                ("method", html.escape(self.method)),
                *((kind, f"{count} heads") for kind, count in self.counts().items()),
                *((f"kept at {length:,} tokens", f"{self.density(length):.1%}") for length in (8192, 32768, 131072)),
                ("KV cache at 131,072 tokens", f"{self.kv_share(131072):.1%} of dense"),
            )
        )
        return {"text/plain": repr(self), "text/html": f"<table><tbody>{rows}</tbody></table>"}


def _joined(patterns: set[Pattern]) -> tuple[Pattern, ...]:
    """The union of the sinks and windows among these patterns; none where there are fewer than two."""
    found = [one for one in patterns if isinstance(one, Streaming)]
    if len(found) < 2:
        return ()
    return (Streaming(max(one.sink for one in found), max(one.window for one in found), any(one.compensate for one in found)),)


def _cached(value: Callable[[Pattern], float]) -> Callable[[Pattern], float]:
    """The same function, computed once per pattern: most heads share theirs, and some counts go row by row."""
    known: dict[Pattern, float] = {}

    def get(pattern: Pattern) -> float:
        if pattern not in known:
            known[pattern] = value(pattern)
        return known[pattern]

    return get


def _check(length: int) -> None:
    if length < 1:
        raise refusal(PlanError, f"length={length}", "it counts tokens and is 1 or more", "pass e.g. 32768")


def _word(place: Place) -> str:
    return f"{place[0]}.{place[1]}"


def _short(values: tuple[int, ...]) -> str:
    distinct = sorted(set(values))
    return str(distinct[0]) if len(distinct) == 1 else f"{len(values)} values {distinct[0]}..{distinct[-1]}"

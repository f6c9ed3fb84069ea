"""The view of a head page: what the controls say, as it is written to and read from the address.

The same checks serve the address and the callbacks, so neither can ask for what the run does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headscope.app.components import token_series
from headscope.app.components.token_strip import PAGE
from headscope.app.finder import heads_of, names_of
from headscope.app.runs import Run
from headscope.app.tiles import PLANES
from headscope.app.urls import choice, choices, position, span

DEFAULT_PLANE, DEFAULT_SCALE = "mass", "log"
SCALES = ("log", "linear", "row")
Window = tuple[int, int, int, int]
"""First and last-plus-one query, first and last-plus-one key, in tokens."""


def default_colour(run: Run) -> str:
    """The statistic that shades the text at first: what each token receives."""
    names = token_series.available(run)
    return "column_sum" if "column_sum" in names else next(iter(names), "")


def usual(run: Run) -> dict[str, str]:
    """The defaults, which an address leaves out."""
    return {
        "plane": DEFAULT_PLANE,
        "scale": DEFAULT_SCALE,
        "colour": default_colour(run),
        "plots": ",".join(token_series.default_series(run)),
    }


@dataclass(frozen=True, slots=True)
class HeadState:
    """Plane and scale of the map, whether the first keys are hidden, the zoom, the plots, the text's colour, the chosen query and key, the
    plan laid over the map.
    """

    plane: str = DEFAULT_PLANE
    scale: str = DEFAULT_SCALE
    hide_sink: bool = False
    window: Window | None = None
    series: list[str] = field(default_factory=list)
    colour: str = ""
    token: int | None = None
    key: int | None = None
    plan: str = ""
    pins: str = ""
    page: int = 0

    @classmethod
    def read(cls, query: Mapping[str, object], run: Run) -> HeadState:
        """The state of an address: `plane`, `scale`, `sink=hidden`, `q` and `k` (ranges), `plots`, `colour`, `token`, `key`, `plan`."""
        tokens = run.maps.tokens if run.maps else 0
        length = len(run.tokens) or tokens
        plan = query.get("plan")
        names = token_series.available(run)
        queries, keys = span(query, "q", tokens), span(query, "k", tokens)
        token = position(query, "token", length)
        return cls(
            plane=choice(query, "plane", PLANES, DEFAULT_PLANE),
            scale=choice(query, "scale", SCALES, DEFAULT_SCALE),
            hide_sink=query.get("sink") == "hidden",
            window=(*queries, *keys) if queries and keys else None,
            series=choices(query, "plots", names, token_series.default_series(run)),
            colour=choice(query, "colour", names, default_colour(run)),
            token=token,
            key=position(query, "key", length),
            plan=plan if isinstance(plan, str) and len(plan) < 200 else "",
            pins=names_of(heads_of(query.get("pins"), run)),
            page=0 if token is None else token // PAGE,
        )

    @classmethod
    def checked(
        cls,
        run: Run,
        *,
        plane: str = DEFAULT_PLANE,
        scale: str = DEFAULT_SCALE,
        hide_sink: bool = False,
        window: Sequence[int] | None = None,
        series: list[str] | None = None,
        colour: str = "",
        token: int | None = None,
        key: int | None = None,
        plan: str = "",
        page: int = 0,
    ) -> HeadState:
        """The state that a callback was sent, with whatever the run does not have replaced by the default."""
        query: dict[str, object] = {"plane": plane, "scale": scale, "colour": colour, "sink": "hidden" if hide_sink else ""}
        if window is not None and len(window) == 4:
            query |= {"q": f"{window[0]}-{window[1]}", "k": f"{window[2]}-{window[3]}"}
        if series is not None:
            query["plots"] = ",".join(series)
        query |= {name: str(value) for name, value in (("token", token), ("key", key)) if value is not None}
        query["plan"] = plan
        state = cls.read(query, run)
        return cls(**{**{name: getattr(state, name) for name in cls.__slots__}, "page": max(int(page), 0)})

    def query(self, run: Run) -> dict[str, str]:
        """The state as query values, defaults left out."""
        out: dict[str, Any] = {
            "plane": "" if self.plane == DEFAULT_PLANE else self.plane,
            "scale": "" if self.scale == DEFAULT_SCALE else self.scale,
            "sink": "hidden" if self.hide_sink else "",
            "plots": "" if self.series == token_series.default_series(run) else ",".join(self.series),
            "colour": "" if self.colour == default_colour(run) else self.colour,
            "token": "" if self.token is None else str(self.token),
            "key": "" if self.key is None else str(self.key),
            "plan": self.plan,
            "pins": self.pins,
        }
        if self.window is not None:
            out |= {"q": f"{self.window[0]}-{self.window[1]}", "k": f"{self.window[2]}-{self.window[3]}"}
        return {key: value for key, value in out.items() if value}

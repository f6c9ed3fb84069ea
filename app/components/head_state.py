"""The view of a head page: what the controls say, as it is written to and read from the address.

The same checks serve the address and the callbacks, so neither can ask for what the run does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headscope.app.components import block_map, token_series
from headscope.app.components.token_strip import PAGE
from headscope.app.runs import Run
from headscope.app.urls import choice, choices, position, span

DEFAULT_PLANE, DEFAULT_SCALE = "mass", "log"


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
    """Plane and scale of the map, whether the first keys are hidden, the zoom, the plots, the text's colour, the chosen token."""

    plane: str = DEFAULT_PLANE
    scale: str = DEFAULT_SCALE
    hide_sink: bool = False
    window: block_map.Window | None = None
    series: list[str] = field(default_factory=list)
    colour: str = ""
    token: int | None = None
    page: int = 0

    @classmethod
    def read(cls, query: Mapping[str, object], run: Run) -> HeadState:
        """The state of an address: `plane`, `scale`, `sink=hidden`, `q` and `k` (ranges), `plots`, `colour`, `token`."""
        tokens = run.maps.tokens if run.maps else 0
        names = token_series.available(run)
        queries, keys = span(query, "q", tokens), span(query, "k", tokens)
        token = position(query, "token", len(run.tokens))
        return cls(
            plane=choice(query, "plane", block_map.PLANES, DEFAULT_PLANE),
            scale=choice(query, "scale", block_map.SCALES, DEFAULT_SCALE),
            hide_sink=query.get("sink") == "hidden",
            window=(*queries, *keys) if queries and keys else None,
            series=choices(query, "plots", names, token_series.default_series(run)),
            colour=choice(query, "colour", names, default_colour(run)),
            token=token,
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
        page: int = 0,
    ) -> HeadState:
        """The state that a callback was sent, with whatever the run does not have replaced by the default."""
        query: dict[str, object] = {"plane": plane, "scale": scale, "colour": colour, "sink": "hidden" if hide_sink else ""}
        if window is not None and len(window) == 4:
            query |= {"q": f"{window[0]}-{window[1]}", "k": f"{window[2]}-{window[3]}"}
        if series is not None:
            query["plots"] = ",".join(series)
        if token is not None:
            query["token"] = str(token)
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
        }
        if self.window is not None:
            out |= {"q": f"{self.window[0]}-{self.window[1]}", "k": f"{self.window[2]}-{self.window[3]}"}
        return {key: value for key, value in out.items() if value}

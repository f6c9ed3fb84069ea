"""The pages: their addresses, what draws them, and which page an address is.

One table for Dash, which draws a page when its scripts are there, and for the first paint, which sends the same page as HTML before that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import dash
from dash.development.base_component import Component

from headscope.app.pages import compare, head, heads, live, not_found, pictures, plan, runs


@dataclass(frozen=True, slots=True)
class Page:
    """One page: its name in Dash's registry, its module, its address with <variables>, its place in the order."""

    name: str
    module: ModuleType
    address: str
    order: int

    @property
    def layout(self) -> Callable[..., Component]:
        """Draws the page from the address's variables and query."""
        found: Callable[..., Component] = self.module.layout
        return found

    @property
    def first(self) -> Callable[..., Component]:
        """Draws what the first paint shows: the page, or the part of it that is there at once (`first` of its module)."""
        found: Callable[..., Component] = getattr(self.module, "first", self.module.layout)
        return found

    @property
    def title(self) -> str:
        """The document's title."""
        return str(self.module.TITLE)


# Dash takes the first template that matches, and a run's would match the longer addresses below it: those come first.
PAGES = (
    Page("plan", plan, "/run/<run>/plan", -1),
    Page("head", head, "/run/<run>/head/<layer>/<head>", 0),
    Page("pictures", pictures, "/run/<run>/pictures", 0),
    Page("heads", heads, "/run/<run>", 1),
    Page("runs", runs, "/", 2),
    Page("not_found_404", not_found, "/not-found", 3),
    Page("compare", compare, "/compare", 4),
    Page("live", live, "/live", 8),
)


def register(app: dash.Dash) -> None:
    """Registers the pages with Dash, and installs their callbacks."""
    for page in PAGES:
        where = {"path_template": page.address} if "<" in page.address else {"path": page.address}
        dash.register_page(f"headscope.app.pages.{page.name}", layout=page.layout, title=page.title, order=page.order, **where)
    for page in PAGES:
        if hasattr(page.module, "register"):
            page.module.register(app)


def page_at(path: str) -> tuple[Page, dict[str, Any]] | None:
    """The page of a path below the application's own, and the variables in it; None for an address that leads nowhere."""
    parts = path.strip("/").split("/")
    for page in PAGES:
        wanted = page.address.strip("/").split("/")
        pairs = list(zip(wanted, parts, strict=False))
        if len(wanted) == len(parts) and all(name == part or name.startswith("<") for name, part in pairs):
            return page, {name[1:-1]: part for name, part in pairs if name.startswith("<")}
    return None

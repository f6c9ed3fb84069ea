"""The frame around every page: header, colour scheme, notices, and the stores that pages share.

`scheme-now` changes only when a person flips the scheme (assets/headscope.js watches for it), so a page that was drawn in the right
scheme from the start (the cookie) is not drawn twice. `nav` is the one place that callbacks write to in order to go to another page.
"""

from __future__ import annotations

import dash
import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component

from headscope.app import theme
from headscope.app.components.panel import icon
from headscope.app.urls import home_url

_THEME = {
    "fontFamily": theme.SANS,
    "fontFamilyMonospace": theme.MONO,
    "primaryColor": "ocean",
    "colors": {
        "ocean": ["#e6f4f8", "#cfe8f0", "#a5d5e3", "#83c9dc", "#6cc4d9", "#5cc3d8", "#3a9fb8", "#23849f", "#0f6f8f", "#0b566f"],
        "dark": ["#e8ecf2", "#c3cbd7", "#9aa5b5", "#6f7b8c", "#3a4352", "#2f3745", "#202735", "#171c26", "#131821", "#0f131a"],
    },
    "primaryShade": {"light": 8, "dark": 5},
    "defaultRadius": "sm",
    "cursorType": "pointer",
}


def shell() -> Component:
    """The layout of the application."""
    return dmc.MantineProvider(
        [
            dcc.Location(id="nav", refresh="callback-nav"),
            dcc.Store(id="scheme-now", data=""),
            header(),
            html.Div(id="notice", className="notice", role="status"),
            html.Main(dash.page_container, className="page"),
        ],
        theme=_THEME,
        defaultColorScheme="auto",
    )


def header() -> Component:
    """Logo, pages and scheme switch."""
    logo = html.Img(src=dash.get_asset_url("logo.svg"), alt="", width=24, height=24)
    return html.Header(
        [
            dcc.Link([logo, html.Span("headscope")], href=home_url(), className="brand"),
            html.Nav(
                [
                    dcc.Link(label, href=dash.get_relative_path(path), className="header-link")
                    for label, path in (("Runs", "/"), ("Compare", "/compare"), ("Live model", "/live"))
                ],
                className="header-nav",
                **{"aria-label": "Pages"},
            ),
            html.Div(
                dmc.ColorSchemeToggle(
                    id="scheme",
                    lightIcon=icon("sun"),
                    darkIcon=icon("moon"),
                    variant="subtle",
                    color="gray",
                    size="md",
                    **{"aria-label": "Switch between light and dark"},
                ),
                className="header-side",
            ),
        ],
        className="header",
    )


def crumbs(*parts: tuple[str, str | None]) -> Component:
    """Where the page is: (label, address) pairs, the last without an address."""
    items: list[Component] = []
    for label, href in parts:
        items.append(dcc.Link(label, href=href) if href else html.Span(label, **{"aria-current": "page"}))
    return html.Nav(items, className="crumbs", **{"aria-label": "Where you are"})

"""The document that a browser gets first: the page itself, drawn and usable, and after it the application.

An application of Dash is an empty document and 3 MB of scripts; on a slow machine a new visitor looked at a frame for seconds. Here the
document holds the page's own layout as HTML (`static_html`), with the real numbers, and our own small scripts draw the map from its tiles
and zoom in it. When the map is there, assets/visit/2-boot.js loads the application's scripts one after the other, out of the way of a hand
that is moving; the application draws into a hidden element, takes over the viewer with the place it shows, and the first page goes.

Scripts of the application are in the document with a type that no browser runs, so that none of them is fetched before its turn.
"""

from __future__ import annotations

import json
import re
from typing import Any

import dash
import flask

from headscope.app import bundle
from headscope.app.components.shell import header
from headscope.app.pages import not_found
from headscope.app.site import Page, page_at
from headscope.app.static_html import static_html, values_of
from headscope.app.theme import COOKIE

LATER = "headscope/later"
"""The type of scripts that wait for their turn."""
SPARE = "headscope/spare"
"""The type of scripts that only some pages need: loaded when a page uses them."""
CARRIED = (
    *("viewer-facts", "plane", "map-scale", "hide-sink", "plan", "token", "key", "series", "colour", "pins", "usual"),
    *("picture-facts", "all-facts", "picture-frame", "picture-scale"),
)
_SCRIPT = re.compile(r'<script src="([^"]+)"></script>')
_NEVER = re.compile(r"/dash_table/")
_SPARE = re.compile(r"/dash_ag_grid/")

DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
{metas}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<script>
(function () {{
  var kept = null;
  try {{ kept = localStorage.getItem("mantine-color-scheme-value"); }} catch (error) {{ kept = null; }}
  var dark = kept === "dark" || (kept !== "light" && window.matchMedia("(prefers-color-scheme: dark)").matches);
  var scheme = dark ? "dark" : "light";
  document.documentElement.setAttribute("data-mantine-color-scheme", scheme);
  document.cookie = "{cookie}=" + scheme + "; path=/; SameSite=Lax";
}})();
</script>
{favicon}
{css}
{hints}
{early}
</head>
<body class="first-visit">
<div id="first">{first}</div>
<script id="first-values" type="application/json">{values}</script>
{app_entry}
<footer>
{config}
{later}
{renderer}
</footer>
</body>
</html>
"""


def document(app: dash.Dash, parts: dict[str, str]) -> str:
    """The document of this request; `parts` are what Dash would put into its own (see `dash.Dash.interpolate_index`)."""
    scripts = parts["scripts"]
    own = app.get_asset_url("")
    style, early = bundle.tags_of(app, scripts, parts["css"])
    wanted = [source for source in _SCRIPT.findall(scripts) if not source.startswith(own) and not _NEVER.search(source)]
    later = [f'<script type="{SPARE if _SPARE.search(source) else LATER}" src="{source}"></script>' for source in wanted]
    later += re.findall(r"<script>.*?</script>", scripts, flags=re.DOTALL)  # small: names of callbacks, no address
    found = page_at(app.strip_relative_path(flask.request.path) or "")
    page, values = _page(found)
    return DOCUMENT.format(
        metas=parts["metas"],
        title=found[0].title if found else not_found.TITLE,
        cookie=COOKIE,
        favicon=parts["favicon"],
        css=style,
        hints=_hints(values),
        early=early,
        first=static_html(header()) + f'<div class="notice"></div><main class="page">{page}</main>',
        values=_script_json(values),
        app_entry=parts["app_entry"],
        config=parts["config"],
        later="\n".join(later),
        renderer=parts["renderer"].replace("application/javascript", LATER),
    )


def _page(found: tuple[Page, dict[str, Any]] | None) -> tuple[str, dict[str, Any]]:
    """The page as HTML, and what its stores and controls hold."""
    if found is None:
        return static_html(not_found.layout()), {}
    page, variables = found
    query = {key: many[0] if len(many) == 1 else many for key, many in flask.request.args.lists()}
    drawn = page.first(**{**variables, **query})
    return static_html(drawn), values_of(drawn, CARRIED)


def _hints(values: dict[str, Any]) -> str:
    """Lets the browser fetch the map's coarsest tile while it still reads the document."""
    facts = values.get("viewer-facts")
    if not facts:
        return ""
    plane = values.get("plane", "mass")
    address = f"{facts['base']}/tile/{plane}/{facts['stored'][-1]}/0/0?v={facts['version']}"
    return f'<link rel="preload" as="fetch" crossorigin="anonymous" href="{address}">'


def _script_json(values: Any) -> str:
    """JSON that no text can end early."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


__all__ = ["CARRIED", "LATER", "SPARE", "document"]

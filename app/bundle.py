"""Our own scripts and styles as one file each: a first visit asks for two small files in place of twenty.

They stay single files in the repository, in the order in which Dash lists them (folders after files, by name). The address names the
content, so a browser keeps it for good and never keeps an old one.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import dash
import flask
import werkzeug.exceptions

KINDS = {"js": "text/javascript", "css": "text/css"}
_ASSETS = Path(__file__).parent / "assets"
_LISTED = re.compile(r'(?:src|href)="[^"]*/assets/([^"?]+)\?m=([\d.]+)"')


class Bundle(NamedTuple):
    """The content of one kind, and its address below the assets."""

    data: bytes
    name: str


def bundle(tags: str, kind: str) -> Bundle:
    """The files of one kind (js or css) that `tags`, written by Dash, ask for."""
    return _bundle(tuple(found for found in _LISTED.findall(tags) if found[0].endswith("." + kind)), kind)


@functools.lru_cache(maxsize=8)
def _bundle(listed: tuple[tuple[str, str], ...], kind: str) -> Bundle:
    data = b"\n".join((_ASSETS / name).read_bytes() for name, _ in listed)
    return Bundle(data, f"all.{kind}?v={hashlib.blake2b(data, digest_size=10).hexdigest()}")


def install(app: dash.Dash) -> None:
    """Serves what `addresses` names."""

    def serve(kind: str) -> flask.Response:
        if kind not in KINDS:
            raise werkzeug.exceptions.NotFound
        tags = app._generate_scripts_html() if kind == "js" else app._generate_css_dist_html()
        response = flask.Response(bundle(tags, kind).data, mimetype=KINDS[kind])
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable"
        return response

    app.server.add_url_rule(f"{app.get_asset_url('')}all.<kind>", "hs_bundle", serve)


def tags_of(app: dash.Dash, scripts: str, styles: str) -> tuple[str, str]:
    """(link to the styles, script): both small; the script runs when the document has been read."""
    style, script = bundle(styles, "css"), bundle(scripts, "js")
    root = app.get_asset_url("")
    return f'<link rel="stylesheet" href="{root}{style.name}">', f'<script defer src="{root}{script.name}"></script>'

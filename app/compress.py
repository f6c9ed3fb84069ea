"""Answers packed with gzip: plotly's script is 4.8 MB as it is and 1.4 packed, and a table of a large model shrinks to a tenth.

What does not change while the server runs (scripts, styles) is packed once and kept; what is made for one request is packed fast, and only
where it is large enough to be worth the time. Tiles pack themselves (`api`).
"""

from __future__ import annotations

import gzip

import flask

from headscope.app.cache import SizedCache

_KINDS = {"text/html", "text/css", "text/javascript", "application/javascript", "application/json", "image/svg+xml"}
_FIXED = ("/_dash-component-suites/", "/assets/")
FOREVER = 31_536_000
LEAST_FIXED, LEAST_MADE = 2_048, 65_536
KEPT = 32 * 2**20


def install(server: flask.Flask) -> None:
    """Packs the answers of an application."""
    kept: SizedCache[bytes] = SizedCache(KEPT, len)

    @server.after_request
    def pack(response: flask.Response) -> flask.Response:
        request = flask.request
        fixed = any(part in request.path for part in _FIXED)
        named = request.args.get("m") or response.cache_control.max_age == FOREVER
        if fixed and response.status_code == 200 and named:  # the address names the version
            response.headers["Cache-Control"] = "private, max-age=31536000, immutable"
        fits = response.status_code == 200 and request.method in ("GET", "POST") and response.mimetype in _KINDS
        if not fits or "Content-Encoding" in response.headers or not request.accept_encodings.quality("gzip"):
            return response
        if (response.content_length or 0) < (LEAST_FIXED if fixed else LEAST_MADE):
            return response
        response.direct_passthrough = False
        data = response.get_data()
        if fixed:
            name = (request.full_path, len(data), response.headers.get("Last-Modified", ""))
            packed = kept.get(name, lambda: gzip.compress(data, 6, mtime=0))
        else:
            packed = gzip.compress(data, 1, mtime=0)
        response.set_data(packed)
        response.headers["Content-Encoding"] = "gzip"
        response.headers.add("Vary", "Accept-Encoding")
        return response

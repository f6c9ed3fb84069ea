"""`POST /api/upload?name=<file name>`: a zip of a run directory as the request's body.

The body must be named application/zip, which a page elsewhere cannot send without asking first, and an Origin must be this server's. It is
read as it comes; the general cap on request bodies is lifted for this route alone and replaced by that of `uploads`.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import flask

from headscope.app import context, uploads
from headscope.app.urls import run_url
from headscope.errors import RunError, refusal


def install(server: flask.Flask) -> None:
    """Adds the route."""
    server.add_url_rule("/api/upload", "hs_upload", upload, methods=["POST"])


def upload() -> flask.typing.ResponseReturnValue:
    """Takes the archive; answers {"run": id, "url": address} or one line of what is wrong, with 400."""
    request = flask.request
    request.max_content_length = uploads.MOST_BYTES
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        return flask.Response("Runs are uploaded from this dashboard's own pages.\n", 403, mimetype="text/plain")
    if request.mimetype != "application/zip":
        return flask.Response("Send a zip of a run directory as application/zip.\n", 415, mimetype="text/plain")
    index = context.index()
    try:
        if index.single is not None:
            why = "this dashboard shows one run, not a directory of runs"
            raise refusal(RunError, "an upload", why, "start it on a directory: headscope app RUNS")
        run = uploads.receive(request.stream, index.root, uploads.run_name(request.args.get("name", "")))
    except RunError as error:
        return flask.Response(f"{error}\n", 400, mimetype="text/plain")
    return flask.jsonify(run=run, url=run_url(run))

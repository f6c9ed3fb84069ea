"""create_app: the dashboard as a Dash application on a run or a directory of runs.

A factory in the package, with pages registered by explicit import: Dash's own page discovery imports files under a wrong top-level
name when the app lives in a package, and fails in notebooks. Callbacks are installed on the application, not in Dash's global list,
which the first application of a process would take for itself.
"""

from __future__ import annotations

from pathlib import Path

import dash
import flask

from headscope.app import api, application, bundle, compress, context, site, upload_routes
from headscope.app import pictures as picture_routes
from headscope.app.application import Dashboard
from headscope.app.components import shell
from headscope.app.live import access
from headscope.app.live.owner import ModelOwner
from headscope.app.runs import RunIndex
from headscope.app.security import protect

_ASSETS = Path(__file__).parent / "assets"


def create_app(path: str | Path, *, token: str | None = None, model: ModelOwner | None = None) -> dash.Dash:
    """The dashboard on `path`: a run directory, or a directory of run directories. RunError when there is no such directory.

    `model`: the owner of a model, for the live page. Without a `token` only requests to a loopback name are answered; with one, every
    request must carry it (see `security`).
    """
    index = RunIndex(path)
    app = Dashboard(
        "headscope.app",
        use_pages=True,
        pages_folder="",
        assets_folder=str(_ASSETS),
        title="headscope",
        update_title="",
        serve_locally=True,
        compress=False,
        suppress_callback_exceptions=True,
        include_pages_meta=False,
        on_error=_on_error,
    )
    app.layout = shell.shell
    site.register(app)
    application.install(app)
    bundle.install(app)
    context.bind(app.server, index)
    api.install(app.server)
    picture_routes.install(app.server)
    upload_routes.install(app.server)
    compress.install(app.server)
    access.bind(app.server, model)
    protect(app.server, token)
    app.server.before_request(_to_the_only_run)
    return app


def _to_the_only_run() -> flask.typing.ResponseReturnValue | None:
    single = context.index().single
    if flask.request.path == dash.get_relative_path("/") and single is not None:
        query = flask.request.query_string.decode("utf-8", "replace")
        from headscope.app.urls import run_url

        return flask.redirect(run_url(single) + (f"?{query}" if query else ""))
    return None


def _on_error(error: Exception) -> None:
    """A refusal becomes a notice on the page; anything else is a defect and is raised."""
    from dash import html, set_props

    from headscope.errors import HeadscopeError

    if not isinstance(error, HeadscopeError):
        raise error
    set_props("notice", {"children": html.P(str(error), role="alert")})

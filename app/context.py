"""Which runs the application that answers this request may show.

Dash keeps pages in one registry per process; two dashboards in one process (tests, notebooks) would see each other's runs if a page
held them. A page asks the Flask application of the request instead.
"""

from __future__ import annotations

import flask

from headscope.app.runs import Run, RunIndex

_KEY = "headscope.runs"


def bind(server: flask.Flask, index: RunIndex) -> None:
    """Gives an application its runs."""
    server.extensions[_KEY] = index


def index() -> RunIndex:
    """The runs of the application that answers this request."""
    found = flask.current_app.extensions[_KEY]
    assert isinstance(found, RunIndex)
    return found


def open_run(run: str) -> Run:
    """A run by id; RunError when it is not listed or cannot be read."""
    return index().open(run)

"""The dashboard: every head of a model in a browser. Dash is imported when the first application is made.

create_app(path)     the Dash application (WSGI: `create_app(path).server`)
serve(path)          serve it on 127.0.0.1:8050 until interrupted
dashboard(path)      show it in a notebook
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headscope.app.jupyter import dashboard
from headscope.app.server import serve

if TYPE_CHECKING:
    import dash

__all__ = ["create_app", "dashboard", "serve"]


def create_app(path: str | Path, *, token: str | None = None) -> dash.Dash:
    """The Dash application on a run directory or a directory of runs; see `headscope.app.factory.create_app`."""
    from headscope.app.factory import create_app as make

    return make(path, token=token)

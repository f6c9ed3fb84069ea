"""`headscope app [RUNS]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    runs: Annotated[Path, typer.Argument(help="A run directory, or a directory of run directories.")] = Path("runs"),
    host: Annotated[str, typer.Option(envvar="HOST", help="Address to listen on; anything but 127.0.0.1 needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8050,
    token: Annotated[str | None, typer.Option(envvar="HEADSCOPE_TOKEN", help="Secret that visitors from elsewhere must give.")] = None,
    model: Annotated[str | None, typer.Option(help="Model for the live page: a name, a path, pypi:... or bundled:...")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve the dashboard on a run or on a directory of runs."""
    from headscope.app import serve as serve_app

    serve_app(runs, host=host, port=port, token=token, open_browser=open_browser, model=model)

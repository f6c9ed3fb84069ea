"""serve: the dashboard behind a threaded production server, on this machine unless told otherwise."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import UnavailableError, refusal

if TYPE_CHECKING:
    from headscope.app.live.owner import ModelOwner
    from headscope.scope import Scope

THREADS = 12


def listen(path: str | Path, host: str, port: int, token: str | None = None, model: ModelOwner | None = None) -> Any:
    """A waitress server on `host`, its port bound and not yet serving. RunError when `path` is not there, UnavailableError when the host or
    the port cannot be used.
    """
    from waitress import create_server

    from headscope.app.factory import create_app
    from headscope.app.security import LOOPBACK_HOSTS, check_host
    from headscope.app.warm import warm

    check_host(host, token)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a browser asks for more files at once than there are threads
    app = create_app(path, token=token, model=model)
    if token is None:
        app.server.config["TRUSTED_HOSTS"] = sorted({*LOOPBACK_HOSTS, host})
    threading.Thread(target=warm, args=(app.server, token), name="headscope-warm", daemon=True).start()
    try:
        return create_server(app.server, host=host, port=port, threads=THREADS, ident="headscope")
    except OSError as error:
        raise refusal(UnavailableError, f"{host}:{port}", str(error), "choose another port with --port, 0 for a free one") from error


def visible_name(host: str) -> str:
    """What to type for an address that is listened on: this machine's name for all of them, localhost for an IPv6 loopback."""
    if host in ("0.0.0.0", "::", ""):
        return socket.gethostname()
    return "localhost" if host == "::1" else host


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8050,
    *,
    token: str | None = None,
    open_browser: bool = False,
    model: Scope | str | None = None,
) -> None:
    """Serves the dashboard on a run or a directory of runs until interrupted.

    `port` 0 takes a free one. A `host` that other machines can reach needs a `token` (or HEADSCOPE_TOKEN); visitors open the printed
    address once. `model`: a Scope, or what `headscope.load` takes, for the live page; a name is loaded while the pages are served already.
    Raises RunError when `path` is not there, UnavailableError when the host or the port cannot be used.
    """
    token = token or os.environ.get("HEADSCOPE_TOKEN") or None
    owner = owner_of(model)
    server = listen(path, host, port, token, owner)
    address = f"http://{visible_name(host)}:{server.effective_port}/" + (f"?token={token}" if token else "")
    print(f"headscope dashboard: {address}  (Ctrl+C stops it)", file=sys.stderr, flush=True)
    if open_browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
        if owner is not None:
            owner.close()


def owner_of(model: Scope | str | None) -> ModelOwner | None:
    """The owner of a model: a Scope that is there, or a name to load."""
    from headscope.app.live.owner import ModelOwner

    if model is None:
        return None
    if isinstance(model, str):
        from headscope.models import load

        return ModelOwner(load=lambda: load(model), name=model)
    return ModelOwner(model)

"""dashboard: the same pages inside a notebook, or in a tab next to it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal


def dashboard(path: str | Path, *, mode: Literal["inline", "tab", "external"] = "inline", height: int = 900, port: int = 0) -> None:
    """Shows the dashboard on a run or a directory of runs from a notebook cell; the server stays up as long as the kernel.

    `mode` "inline" draws it in the cell's output, `height` pixels high; "tab" opens a browser tab; "external" prints the address.
    `port` 0 takes a free one.
    """
    from headscope.app.factory import create_app

    create_app(path).run(host="127.0.0.1", port=port or _free_port(), jupyter_mode=mode, jupyter_height=height, debug=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""dashboard: the same pages inside a notebook, or in a tab next to it.

The server runs in a thread of the kernel. Dash's own notebook mode is not used: without its optional packages (or a front end that
answers) it serves in the foreground, and the cell never ends.
"""

from __future__ import annotations

import threading
import warnings
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headscope.app.server import listen, owner_of

if TYPE_CHECKING:
    from headscope.scope import Scope

Mode = Literal["inline", "tab", "external"]
_servers: list[Any] = []


def dashboard(path: str | Path, *, mode: Mode = "inline", height: int = 900, port: int = 0, model: Scope | str | None = None) -> None:
    """Shows the dashboard on a run or a directory of runs from a notebook cell; its server stays up as long as the kernel.

    `mode` "inline" draws it in the cell's output, `height` pixels high; "tab" opens a browser tab; "external" only prints the address.
    `port` 0 takes a free one. `model`: a Scope, or what `headscope.load` takes, for the live page; while a job of that page runs, do
    not run the model in a cell. Outside a notebook "inline" opens a tab. The address is one of this machine: where the kernel runs
    elsewhere, forward the port. Raises RunError when `path` is not there, UnavailableError when the port is taken.
    """
    address = _start(path, port, model)
    if mode == "inline" and _in_notebook():
        from IPython.display import IFrame, display

        display(IFrame(address, width="100%", height=height))  # type: ignore[no-untyped-call]
        return
    print(f"headscope dashboard: {address}")
    if mode != "external":
        _open_tab(address)


def _start(path: str | Path, port: int, model: Scope | str | None = None) -> str:
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, imported by the server, would be the cell's first output
    server = listen(path, "127.0.0.1", port, model=owner_of(model))
    threading.Thread(target=server.run, name="headscope-dashboard", daemon=True).start()
    _servers.append(server)
    return f"http://127.0.0.1:{server.effective_port}/"


def _open_tab(address: str) -> None:
    if _in_notebook():
        from IPython.display import Javascript, display

        display(Javascript(f"window.open({address!r})"))  # type: ignore[no-untyped-call]
    else:
        webbrowser.open(address)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()  # type: ignore[no-untyped-call]
    return shell is not None and hasattr(shell, "kernel")

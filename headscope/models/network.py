"""Is a host there? Asked before the hub client is, which would retry for three quarters of a minute before it says no."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PORTS = {"http": 80, "https": 443}


def reachable(url: str, timeout: float = 3.0) -> bool:
    """True when a TCP connection to the URL's host, or to the proxy that serves it, opens within `timeout` seconds.

    The name look-up has no time limit of its own, so all of it runs in a thread that is left behind when it takes too long.
    """
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (parts.hostname or "", parts.port or PORTS.get(parts.scheme, 443))
    answered: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection(address, timeout=timeout).close()
        except OSError:
            return
        answered.append(True)

    thread = threading.Thread(target=knock, name="headscope-reachable", daemon=True)
    thread.start()
    thread.join(timeout + 0.5)
    return bool(answered)

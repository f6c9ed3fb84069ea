"""Addresses: where a run and a head live, and the view state in the query string.

The query string is written by anyone, so every value read from it is checked against the choices there are and falls back to the
default; an address from another version of a run opens the page rather than an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import quote, urlencode

import dash


def run_url(run: str, **state: str) -> str:
    """Address of a run's page."""
    return _address(f"/run/{quote(run, safe='')}", state)


def head_url(run: str, layer: int, head: int, **state: str) -> str:
    """Address of a head's page."""
    return _address(f"/run/{quote(run, safe='')}/head/{layer}/{head}", state)


def api_url(run: str, *parts: str) -> str:
    """Address of what the viewer asks for, without a query."""
    return str(dash.get_relative_path("/".join((f"/api/run/{quote(run, safe='')}", *parts))))


def pictures_url(run: str, **state: str) -> str:
    """Address of all heads of a run on its picture."""
    return _address(f"/run/{quote(run, safe='')}/pictures", state)


def compare_url(first: str, second: str, **state: str) -> str:
    """Address of two runs side by side."""
    return _address("/compare", {"a": first, "b": second, **state})


def plan_url(run: str, **state: str) -> str:
    """Address of a run's plan page."""
    return _address(f"/run/{quote(run, safe='')}/plan", state)


def home_url() -> str:
    """Address of the list of runs."""
    return str(dash.get_relative_path("/"))


def choice(query: Mapping[str, object], key: str, choices: Collection[str], default: str) -> str:
    """The value of `key` if it is one of the choices, else the default."""
    value = query.get(key)
    return value if isinstance(value, str) and value in choices else default


def choices(query: Mapping[str, object], key: str, allowed: Collection[str], default: list[str]) -> list[str]:
    """The comma-separated values of `key` that are allowed, in the order given; the default where the key is absent or all are unknown."""
    value = query.get(key)
    if not isinstance(value, str):
        return default
    if value == "":
        return []
    found = [name for name in dict.fromkeys(value.split(",")) if name in allowed]
    return found or default


def span(query: Mapping[str, object], key: str, tokens: int) -> tuple[int, int] | None:
    """A range `a-b` of token positions inside 0 .. tokens with a < b; None where absent or impossible."""
    value = query.get(key)
    if not isinstance(value, str):
        return None
    first, dash_, last = value.partition("-")
    if not (dash_ and first.isdecimal() and last.isdecimal()) or len(value) > 24:
        return None
    a, b = int(first), min(int(last), tokens)
    return (a, b) if a < b else None


def position(query: Mapping[str, object], key: str, tokens: int) -> int | None:
    """A token position 0 .. tokens - 1; None where absent or impossible."""
    value = query.get(key)
    if isinstance(value, str) and value.isdecimal() and len(value) < 12 and int(value) < tokens:
        return int(value)
    return None


def _address(path: str, state: Mapping[str, str]) -> str:
    query = urlencode({key: value for key, value in state.items() if value})
    return f"{dash.get_relative_path(path)}{'?' + query if query else ''}"

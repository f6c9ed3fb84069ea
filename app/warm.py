"""Before the first visitor: what would make them wait is done once when the server starts, in the order in which a visit needs it.

The first document opens a run and imports what its pages are drawn with, the scripts are packed, the first tile opens the maps; last, since
it takes seconds and only exact cells need it, torch is imported.
"""

from __future__ import annotations

import contextlib
import re
import time

import flask

from headscope.app import api, context
from headscope.app.urls import head_url, home_url, run_url
from headscope.errors import HeadscopeError

RUNS = 4
"""Runs that are opened."""
PAUSE = 2.0
"""Seconds in which a visitor who comes with the first line has the machine to himself."""
PLOTLY = "_dash-component-suites/plotly/package_data/plotly.min.js"


def warm(server: flask.Flask, token: str | None = None, pause: float = PAUSE) -> None:
    """Visits the application of `server` as a browser would: the first run's head, and after `pause` seconds everything else."""
    client = server.test_client()
    headers = {"Host": "localhost", "Accept-Encoding": "gzip", **({"Authorization": f"Bearer {token}"} if token else {})}

    def get(address: str) -> str:
        return client.get(address, headers=headers).get_data(as_text=True)

    client.get(home_url(), headers=headers)  # sets the application up
    with server.test_request_context("/", headers=headers):
        runs = list(context.index().paths())[:RUNS]
        opened = {}
        for run in runs:
            with contextlib.suppress(HeadscopeError):  # a damaged run says so on its page
                opened[run] = context.open_run(run)
        pages = [head_url(run, found.layers[0], 0) for run, found in opened.items()] + [run_url(run) for run in opened]
    for page in pages[:1]:
        document = client.get(page, headers={**headers, "Accept-Encoding": ""}).get_data(as_text=True)
        for address in re.findall(r'(?:src|href)="(/[^"]+\.(?:js|css)[^"]*)"', document):
            client.get(address, headers=headers)
        for address in re.findall(r'as="fetch"[^>]*href="([^"]+)"', document):
            client.get(address, headers=headers)
    time.sleep(pause)
    for page in pages[1:]:
        get(page)
    client.get(home_url() + PLOTLY, headers=headers)
    with server.app_context():
        for found in opened.values():
            with contextlib.suppress(HeadscopeError):
                if found.maps is not None:
                    found.tile(found.maps.planes[0], len(found.maps.sizes) - 1, found.layers[0], 0, 0, 0)
                exact = api.exact_head(found, found.kept_layers[0], 0) if found.kept_layers else None
                if exact is not None:
                    exact.window(exact.layer.first, exact.layer.first + 1, 0, 1)

"""An address that leads nowhere."""

from __future__ import annotations

from dash.development.base_component import Component

from headscope.app.components.states import failure

TITLE = "Not found · headscope"


def layout(**_query: object) -> Component:
    """Says so, and leads to the runs."""
    return failure("There is nothing at this address", "It may belong to a run that was moved or deleted.")

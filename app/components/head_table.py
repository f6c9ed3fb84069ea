"""The table of heads: every metric, sortable and filterable; a click opens the head."""

from __future__ import annotations

from typing import Any

import dash_ag_grid as dag
import numpy as np
from dash.development.base_component import Component

from headscope.app.finder import Head
from headscope.app.metrics import describe
from headscope.app.runs import Run

_THEME = (
    "themeQuartz.withParams({backgroundColor: 'var(--hs-panel)', foregroundColor: 'var(--hs-text)',"
    " headerBackgroundColor: 'var(--hs-panel)',"
    " headerTextColor: 'var(--hs-muted)', borderColor: 'var(--hs-line)', accentColor: 'var(--hs-accent)', rowHoverColor: 'var(--hs-hover)',"
    " oddRowBackgroundColor: 'var(--hs-panel)', chromeBackgroundColor: 'var(--hs-panel)', inputBackgroundColor: 'var(--hs-panel)',"
    " fontFamily: 'inherit', fontSize: 12.5, wrapperBorder: false, wrapperBorderRadius: 0, spacing: 6})"
)
MAX_VALUES = 90_000  # numbers in one table, so that its rows stay under 2 MB


def table_metrics(run: Run, first: str) -> list[str]:
    """The metrics that the table shows: all of them, the chosen one first; for very large models as many as fit."""
    ordered = [first, *(name for name in run.metrics if name != first)]
    return ordered[: max(MAX_VALUES // max(len(run.table), 1), 1)]


def table_rows(run: Run, metrics: list[str], picked: list[Head] | None = None) -> list[dict[str, Any]]:
    """One row per head, or per picked one: layer, head, kv_head, roles as text, and m0, m1, ... the metrics in four significant digits
    (short keys: a key is sent with every number).
    """
    columns = [run.table[name].to_numpy(dtype=np.float64) for name in metrics]
    rows = []
    wanted = set(picked or ())
    for index, (layer, head, kv_head) in enumerate(zip(run.table["layer"], run.table["head"], run.table["kv_head"], strict=True)):
        if wanted and (int(layer), int(head)) not in wanted:
            continue
        row: dict[str, Any] = {"layer": int(layer), "head": int(head), "kv_head": int(kv_head)}
        row["roles"] = ", ".join(run.reasons[int(layer), int(head)]).replace("_", " ")
        for position, values in enumerate(columns):
            value = float(values[index])
            row[f"m{position}"] = float(f"{value:.4g}") if np.isfinite(value) else None
        rows.append(row)
    return rows


def table_columns(run: Run, metrics: list[str]) -> list[dict[str, Any]]:
    """Column definitions: the head's place is pinned, the first metric sorts."""
    place = [
        {"field": field, "headerName": label, "pinned": "left", "width": 78, "filter": "agNumberColumnFilter", "type": "numericColumn"}
        for field, label in (("layer", "Layer"), ("head", "Head"), ("kv_head", "KV"))
    ]
    roles = {"field": "roles", "headerName": "Roles", "width": 200, "filter": "agTextColumnFilter", "tooltipField": "roles"}
    numbers = []
    for position, name in enumerate(metrics):
        metric = describe(run.card, name)
        column: dict[str, Any] = {
            "field": f"m{position}",
            "headerName": metric.label,
            "headerTooltip": metric.meaning or metric.label,
            "filter": "agNumberColumnFilter",
            "type": "numericColumn",
            "width": 138,
            "valueFormatter": {"function": "params.value == null ? '' : d3.format('.4~g')(params.value)"},
            "sort": "desc" if position == 0 else None,
            "cellClass": "ag-right-aligned-cell cell-chosen" if position == 0 else "ag-right-aligned-cell",
        }
        numbers.append(column)
    return [*place, roles, *numbers]


def table_note(run: Run, metrics: list[str], picked: list[Head] | None = None) -> str:
    """What to know about the table."""
    if picked:
        return f"{len(picked):,} of {len(run.table):,} heads: the picked ones"
    cut = "" if len(metrics) == len(run.metrics) else f"{len(metrics)} of {len(run.metrics)} metrics, the chosen one first; "
    return f"{cut}click a row to open the head, tick rows to pin them"


def head_table(height: int = 380) -> Component:
    """The empty table, id `table`; rows come after the first paint."""
    return dag.AgGrid(
        id="table",
        rowData=[],
        columnDefs=[],
        defaultColDef={"sortable": True, "resizable": True, "floatingFilter": True, "suppressHeaderMenuButton": True},
        dashGridOptions={
            "theme": {"function": _THEME},
            "rowHeight": 32,
            "headerHeight": 36,
            "tooltipShowDelay": 300,
            "animateRows": False,
            "rowSelection": {"mode": "multiRow", "checkboxes": True, "headerCheckbox": False, "enableClickSelection": False},
            "selectionColumnDef": {"pinned": "left", "width": 40},
        },
        style={"height": height, "width": "100%"},
        className="ag-headscope",
    )

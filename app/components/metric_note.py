"""What the chosen metric means, its unit and its source, in one line, with the spread of its values."""

from __future__ import annotations

import numpy as np
from dash import html
from dash.development.base_component import Component

from headscope.app.format import number
from headscope.app.metrics import Metric
from headscope.app.runs import Run


def metric_note(run: Run, metric: Metric) -> Component:
    """Meaning, unit, source and range of a metric over all heads of the run."""
    values = run.grid(metric.name)
    known = values[np.isfinite(values)]
    line: list[Component | str] = []
    if metric.unit:
        line.append(html.Span(["unit ", html.B(metric.unit)]))
    if known.size:
        line.append(html.Span(["range ", html.B(f"{number(float(known.min()))} to {number(float(known.max()))}")]))
        line.append(html.Span(["median ", html.B(number(float(np.median(known))))]))
    else:
        line.append(html.Span("no head has a value"))
    if metric.text:
        line.append(html.Span(["on ", html.B(f"{metric.text.replace('_', ' ')} text")]))
    if metric.source:
        line.append(html.Span(["source ", html.B(metric.source)]))
    return html.Div([html.P(metric.meaning, className="note-meaning") if metric.meaning else None, html.P(line, className="note-line")])

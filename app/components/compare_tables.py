"""Two runs in tables: what differs in their cards, how far each metric agrees, which heads changed most, roles, whole-model numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.role_legend import role_glyph
from headscope.app.components.run_card import changes, measured_tokens, shape_line
from headscope.app.format import MINUS, number, words
from headscope.app.metrics import describe
from headscope.app.runs import Run
from headscope.app.urls import compare_url, head_url

if TYPE_CHECKING:
    from headscope.profile.comparison import Comparison

HEADS_SHOWN = 12


def card_table(first: Run, second: Run) -> Component:
    """The facts of both cards side by side; those that differ are marked."""
    rows = []
    for label, a, b in card_rows(first.card, second.card):
        if a or b:
            rows.append(html.Tr([html.Th(label, scope="row"), html.Td(a), html.Td(b)], className="differs" if a != b else ""))
    return html.Table([html.Thead(html.Tr([html.Th(""), html.Th("First"), html.Th("Second")])), html.Tbody(rows)], className="metrics two")


def card_rows(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, first, second) of what decides whether two runs may be compared."""

    def facts(card: dict[str, Any]) -> dict[str, str]:
        model = card.get("model", {})
        texts = {row.get("kind", ""): f"{row.get('name', '')} ({row.get('tokens', 0):,} tokens)" for row in card.get("data", [])}
        return {
            "Model": str(model.get("name", "")),
            "Weights": str(model.get("fingerprint", ""))[:12],
            "Shape": shape_line(card),
            "Precision": f"{model.get('dtype', '')} on {model.get('device', '')}",
            "Attention": ", ".join(card.get("attention_kernels", [])),
            "Natural text": texts.get("natural", ""),
            "Tokens": f"{measured_tokens(card):,}",
            "Interventions": "; ".join(changes(card)) or "none",
            "Notes": "; ".join(card.get("notes", [])),
            "Made": str(card.get("created", ""))[:16].replace("T", " "),
        }

    a, b = facts(first), facts(second)
    return [(label, a[label], b[label]) for label in a]


def metric_table(first: Run, second: Run, found: Comparison, chosen: str) -> Component:
    """One row per metric: rank correlation, Pearson's r, overlap of the strongest heads, what changed most. A name chooses the metric."""
    rows = []
    for row in sorted(found.rows(), key=lambda one: (not math.isnan(one["spearman"]), one["spearman"])):
        name = row["metric"]
        metric = describe(first.card, name)
        rows.append(
            html.Tr(
                [
                    html.Th(
                        dcc.Link(metric.label, href=compare_url(first.id, second.id, metric=name), title=metric.meaning or None),
                        scope="row",
                    ),
                    html.Td(_signed(row["spearman"]), className="num"),
                    html.Td(_signed(row["pearson"]), className="num"),
                    html.Td("n/a" if math.isnan(row["overlap"]) else f"{row['overlap']:.0%}", className="num"),
                    html.Td(row["most_changed"], className="muted"),
                ],
                className="row-chosen" if name == chosen else "",
            )
        )
    columns = ("Metric", "Spearman", "Pearson", f"Top {found.top} shared", "Changed most (second less first)")
    head = html.Tr([html.Th(name, className="" if at in (0, 4) else "num") for at, name in enumerate(columns)])
    return html.Div(html.Table([html.Thead(head), html.Tbody(rows)], className="metrics wide"), className="metrics-scroll")


def changed_heads(first: Run, second: Run, found: Comparison, metric: str) -> Component:
    """The heads that changed most in the metric: each opens its pair of maps, or its page in either run."""
    rows = []
    if metric not in found.metrics or not any(a != b for _, _, a, b in found.changed(metric, 1)):
        return html.P("No head changed.", className="muted")
    for layer, head, a, b in found.changed(metric, HEADS_SHOWN):
        name = f"{layer}.{head}"
        rows.append(
            html.Tr(
                [
                    html.Th(
                        html.Button(name, type="button", className="link-button", title="Show both maps", **{"data-pair": name}),
                        scope="row",
                    ),
                    html.Td(number(a), className="num"),
                    html.Td(number(b), className="num"),
                    html.Td(_signed(b - a), className="num"),
                    html.Td(
                        [
                            dcc.Link("first", href=head_url(first.id, layer, head)),
                            html.Span(" · ", className="muted"),
                            dcc.Link("second", href=head_url(second.id, layer, head)),
                        ],
                        className="num",
                    ),
                ]
            )
        )
    head_row = html.Tr([html.Th("Head"), *[html.Th(name, className="num") for name in ("First", "Second", "Change", "Open in")]])
    return html.Table([html.Thead(head_row), html.Tbody(rows)], className="metrics wide")


def role_table(first: Run, second: Run) -> Component:
    """Heads per role in both runs, in number and share; heads that have it in both, where heads can be matched."""
    names = list(dict.fromkeys([*first.roles, *second.roles]))
    if not names:
        return html.P("No head of either run has a role.", className="muted")
    matched = set(first.reasons) == set(second.reasons)
    rows = []
    for role in names:
        a, b = first.roles.get(role, []), second.roles.get(role, [])
        owner = first if role in first.roles else second
        cells = [
            html.Td(f"{len(heads):,} ({len(heads) / len(run.reasons):.0%})", className="num") for run, heads in ((first, a), (second, b))
        ]
        both = html.Td(f"{len(set(a) & set(b)):,}" if matched else "", className="num")
        rows.append(html.Tr([html.Th([role_glyph(owner, role), words(role)], scope="row", title=owner.rule(role) or None), *cells, both]))
    head = html.Tr([html.Th("Role"), *[html.Th(name, className="num") for name in ("First", "Second", "In both" if matched else "")]])
    return html.Table([html.Thead(head), html.Tbody(rows)], className="metrics wide")


def number_table(first: Run, second: Run) -> Component | None:
    """Whole-model numbers of both cards."""
    a, b = first.card.get("numbers", {}), second.card.get("numbers", {})
    names = list(dict.fromkeys([*a, *b]))
    if not names:
        return None
    rows = [
        html.Tr(
            [
                html.Th(words(name), scope="row"),
                *[html.Td(number(card[name]) if name in card else "n/a", className="num") for card in (a, b)],
            ]
        )
        for name in names
    ]
    head = html.Tr([html.Th("Whole model"), html.Th("First", className="num"), html.Th("Second", className="num")])
    return html.Table([html.Thead(head), html.Tbody(rows)], className="metrics wide")


def _signed(value: float) -> str:
    if math.isnan(value):
        return "n/a"
    text = number(abs(value))
    return f"{MINUS}{text}" if value < 0 else text

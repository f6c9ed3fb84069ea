"""The run card: what was measured, on what, and with which kernels, so that a number on the screen can be traced."""

from __future__ import annotations

from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.panel import facts, tag
from headscope.app.format import TIMES, count, number, words
from headscope.app.runs import Entry
from headscope.app.urls import run_url


def shape_line(card: dict[str, Any]) -> str:
    """`30 layers x 9 heads, 3 KV heads`."""
    model = card.get("model", {})
    layers, heads, kv_heads = (model.get(key) for key in ("layers", "heads", "kv_heads"))
    if not layers or not heads:
        return ""
    line = f"{layers} layers {TIMES} {heads} heads"
    return f"{line}, {count(int(kv_heads), 'KV head')}" if kv_heads and kv_heads != heads else line


def measured_tokens(card: dict[str, Any]) -> int:
    """Tokens of all texts together."""
    return sum(int(row.get("sequences", 1)) * int(row.get("tokens", 0)) for row in card.get("data", []))


def changes(card: dict[str, Any]) -> list[str]:
    """What was changed in the model while it was measured, in words; empty for the model as it is."""
    return [str(one.get("what") or one.get("name", "")) if isinstance(one, dict) else str(one) for one in card.get("interventions", [])]


def change_tags(card: dict[str, Any]) -> list[Component]:
    """A warning per intervention, for the head of a page: its numbers are not the plain model's."""
    names = [str(one.get("name", "")) if isinstance(one, dict) else str(one) for one in card.get("interventions", [])]
    return [tag(f"measured under {name}", className="tag-warning", title=what) for name, what in zip(names, changes(card), strict=True)]


def card_facts(card: dict[str, Any]) -> Component:
    """The whole card as a list of facts."""
    model = card.get("model", {})
    parameters = model.get("parameters")
    seconds = card.get("seconds", {})
    total = seconds.get("total") or sum(value for value in seconds.values() if isinstance(value, int | float))
    return facts(
        ("Model", model.get("name")),
        ("Class", html.Code(model["class"]) if model.get("class") else None),
        ("Source", _joined(model.get("source"), model.get("revision"), sep=" @ ")),
        ("Weights", html.Code(str(model["fingerprint"])[:12], title=str(model["fingerprint"])) if model.get("fingerprint") else None),
        ("Shape", shape_line(card)),
        ("Head size", model.get("head_dim")),
        ("Parameters", _millions(parameters) if parameters else None),
        ("Precision", _joined(model.get("dtype"), model.get("device"), sep=" on ")),
        ("Attention", [html.Code(name, className="spaced") for name in card.get("attention_kernels", [])]),
        ("Statistics", _joined(card.get("statistics_kernel"), "kernel", sep=" ") if card.get("statistics_kernel") else None),
        ("Changed", html.Ul([html.Li(what) for what in changes(card)]) if changes(card) else None),
        ("Data", html.Ul([html.Li(_data_line(row)) for row in card.get("data", [])]) if card.get("data") else None),
        ("Whole model", html.Ul([html.Li(f"{words(name)} {number(value)}") for name, value in card.get("numbers", {}).items()])),
        ("Took", f"{total:,.1f} s" if total else None),
        ("Machine", _machine_line(card.get("machine", {}))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())),
        ("Made", f"{card['created'][:16].replace('T', ' ')} UTC" if card.get("created") else None),
        ("headscope", card.get("headscope_version")),
    )


def entry_card(entry: Entry) -> Component:
    """One run in the list of runs."""
    if entry.card is None:
        return html.Div(
            [
                html.Div([html.H2(entry.id), tag("damaged", className="tag-warning")], className="card-title"),
                html.P(entry.error, className="muted"),
            ],
            className="panel run-entry run-damaged",
        )
    card, model = entry.card, entry.card.get("model", {})
    return dcc.Link(
        [
            html.Div([html.H2(model.get("name") or entry.id)], className="card-title"),
            html.P(shape_line(card), className="muted"),
            html.Div(
                [
                    tag(count(measured_tokens(card), "token")),
                    tag(count(len(card.get("probes", [])), "probe")),
                    *[tag(kernel) for kernel in card.get("attention_kernels", [])],
                    tag(str(model.get("dtype", ""))),
                    *change_tags(card),
                ],
                className="tags",
            ),
            html.Div([html.Code(entry.id), html.Span(str(card.get("created", ""))[:10])], className="card-foot"),
        ],
        href=run_url(entry.id),
        className="panel run-entry",
    )


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _machine_line(machine: dict[str, Any]) -> str:
    cpus, threads = machine.get("cpus"), machine.get("threads")
    parts = [_joined(machine.get("system"), machine.get("architecture"), sep=" "), machine.get("gpu")]
    parts += [count(int(cpus), "CPU") if cpus else None, count(int(threads), "thread") if threads else None]
    return _joined(*parts, sep=", ")


def _data_line(row: dict[str, Any]) -> list[Any]:
    size = f"{int(row.get('sequences', 1)):,} {TIMES} {count(int(row.get('tokens', 0)), 'token')}"
    return [html.Span(str(row.get("name", "data"))), html.Span(size, className="muted block")]


def _joined(*parts: Any, sep: str) -> str:
    return sep.join(str(part) for part in parts if part)

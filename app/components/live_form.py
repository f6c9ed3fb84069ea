"""The form of the live page: a prompt, a change of heads, and the buttons that make jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dash_mantine_components as dmc
from dash import html
from dash.development.base_component import Component

from headscope.app.components.panel import control
from headscope.app.live.change import KINDS, MASKS
from headscope.app.live.compare import MOST_NEW
from headscope.app.urls import choice

STRENGTHS = {
    "mask": ("", 1.0),
    "act": ("beta: what a sink keeps", 0.4),
    "scale": ("gamma: factor on the output", 0.0),
    "noise": ("sigma: spread of the noise", 1.0),
    "temperature": ("tau: scores are divided by it", 2.0),
    "json": ("", 1.0),
}
"""Kind of change -> (what its number means, its usual value)."""
DEFAULT_PROMPT = "The ship left the harbour at dawn, and the captain said that the"


def live_form(query: Mapping[str, object], runs: Sequence[str]) -> Component:
    """The form, filled from the address."""
    kind = choice(query, "change", KINDS, "mask")
    prompt = query.get("prompt")
    heads = query.get("heads")
    return html.Div(
        [
            dmc.Textarea(
                id="live-prompt",
                label="Prompt",
                value=prompt if isinstance(prompt, str) and prompt else DEFAULT_PROMPT,
                autosize=True,
                minRows=3,
                maxRows=12,
                spellCheck=False,
            ),
            html.Div(
                [
                    control(
                        "Change",
                        dmc.Select(
                            id="live-change",
                            value=kind,
                            data=[{"value": name, "label": label} for name, label in KINDS.items()],
                            allowDeselect=False,
                            size="sm",
                            w=190,
                            **{"aria-label": "Change"},
                        ),
                    ),
                    html.Div(
                        control(
                            "By",
                            dmc.SegmentedControl(
                                id="live-mode",
                                value=choice(query, "mode", MASKS, "zero"),
                                data=[{"value": m, "label": m} for m in MASKS],
                                size="xs",
                            ),
                        ),
                        id="live-mode-frame",
                    ),
                    html.Div(
                        control(
                            html.Span(id="live-strength-label"),
                            dmc.NumberInput(
                                id="live-strength", value=strength_of(query, kind), step=0.1, size="sm", w=96, **{"aria-label": "Strength"}
                            ),
                        ),
                        id="live-strength-frame",
                    ),
                ],
                className="toolbar toolbar-tight",
            ),
            html.Div(
                [
                    dmc.TextInput(
                        id="live-heads",
                        label="Heads",
                        description='"3.0, 4.1"; by a run: "top 5 induction" or "sink > 0.5".',
                        value=heads if isinstance(heads, str) else "",
                        placeholder="layer.head, ...",
                        style={"flex": "1 1 300px"},
                    ),
                    dmc.Select(
                        id="live-run",
                        label="Chosen by run",
                        description="For roles and metrics.",
                        value=choice(query, "run", runs, "") or None,
                        data=list(runs),
                        clearable=True,
                        placeholder="none",
                        w=230,
                    ),
                ],
                className="toolbar live-heads",
                id="live-heads-frame",
            ),
            html.Div(
                dmc.Textarea(
                    id="live-spec",
                    label="Interventions as JSON",
                    description="What Stack.to_json gives: one intervention, a list, or a stack.",
                    value="",
                    autosize=True,
                    minRows=3,
                    maxRows=14,
                    spellCheck=False,
                    placeholder='[{"intervention": "head_mask", "heads": [[3, 0]], "mode": "zero"}]',
                ),
                id="live-spec-frame",
            ),
            html.Div(
                [
                    control(
                        "New tokens",
                        dmc.NumberInput(
                            id="live-tokens", value=32, min=1, max=MOST_NEW, step=8, size="sm", w=84, **{"aria-label": "New tokens"}
                        ),
                    ),
                    dmc.Button("Generate and compare", id="live-compare", size="sm"),
                    dmc.Button("Capture the prompt", id="live-capture", size="sm", variant="default"),
                    dmc.Button("Capture with the change", id="live-capture-changed", size="sm", variant="default"),
                ],
                className="toolbar toolbar-tight live-buttons",
            ),
        ],
        className="live-form",
    )


def strength_of(query: Mapping[str, object], kind: str) -> float:
    """The number of the address, else the usual one of this change."""
    given = query.get("strength")
    try:
        value = float(given) if isinstance(given, str) else STRENGTHS[kind][1]
    except ValueError:
        return STRENGTHS[kind][1]
    return value if abs(value) < 1e6 else STRENGTHS[kind][1]


def shown_fields(kind: str) -> tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, str], str]:
    """Styles of the mode, strength, heads and JSON fields for a kind of change, and the strength's label."""
    hidden: dict[str, str] = {"display": "none"}
    shown: dict[str, str] = {}
    return (
        shown if kind == "mask" else hidden,
        shown if STRENGTHS[kind][0] else hidden,
        hidden if kind == "json" else shown,
        shown if kind == "json" else hidden,
        STRENGTHS[kind][0],
    )

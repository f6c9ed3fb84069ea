"""The figure and the tables of `headscope bench quality`: one column per phase, one row per model.

Points stand at what was kept, never at what was asked for, with the standard error of what they show: of a share of answers (Wilson's
interval, one standard error wide), or of a difference from dense attention on the same texts, text by text. Texts differ from each other
by far more than plans do, so an error bar that ignored the pairing would hide every difference there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "headscope's own": ("#0072b2", ("allocate",)),
    "windows per head": ("#d55e00", ("duo", "razor", "moa", "task_kv")),
    "chosen per prompt": ("#009e73", ("minference", "tca", "flexprefill", "anchor", "xattention", "snapkv", "headkv")),
    "chosen per step": ("#cc79a7", ("tidal", "hylra")),
    "fixed masks": ("#6e6e6e", ("power", "s2")),
}
"""Colours that stay apart for colour-blind readers (Okabe and Ito), one a family; labels tell the members apart."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
X = {
    "prefill": ("density", "share of the entries that the prefill computes"),
    "decode": ("read", "share of the keys that a decode step reads"),
}


def colour(method: str) -> str:
    """Of a method's family; black for one that is in none."""
    return next((shade for shade, members in FAMILIES.values() if method in members), "#000000")


def value(row: Mapping[str, Any]) -> float | None:
    """What a row is judged by: the share of right answers, or the perplexity of its phase's tokens."""
    if "reason" in row:
        return None
    if "accuracy" in row:
        return float(row["accuracy"])
    return math.exp(row[f"nll_{row['phase']}"])


def against(row: Mapping[str, Any], dense: Mapping[str, Any]) -> tuple[float, float] | None:
    """(mean, standard error) of a row's nats per token above the dense row's, text by text; None for rows of answers or without texts.

    Of a row on fewer texts, those that both have, which are the first ones.
    """
    mine, other = row.get(str(row["phase"])), dense.get(str(row["phase"]))
    if not mine or not other:
        return None
    gaps = [a - b for a, b in zip(mine, other, strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1))
    return mean, spread / math.sqrt(len(gaps))


def wilson(share: float, count: int, z: float = 1.0) -> tuple[float, float]:
    """(low, high) of a share of `count` trials: Wilson's interval, z standard errors to either side."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def judged(row: Mapping[str, Any], dense: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """(y, low, high) of a point: the share of right answers, or perplexity as a multiple of dense attention's on the same texts."""
    at = value(row)
    if at is None:
        return None
    if "accuracy" in row:
        return (at, *wilson(at, int(row["n"])))
    gap = against(row, dense)
    if gap is None:
        ratio = at / (value(dense) or 1.0)
        return ratio, ratio, ratio
    return math.exp(gap[0]), math.exp(gap[0] - gap[1]), math.exp(gap[0] + gap[1])


def dense_row(rows: Sequence[Mapping[str, Any]], phase: str) -> Mapping[str, Any]:
    """The row without a plan; an empty one where there is none."""
    return next((row for row in rows if row["method"] == "dense" and row["phase"] == phase), {})


def tables(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One table per model: what was asked for, what was kept, how good the model was, by how many texts and which kernels."""
    out = []
    for one in result["results"]:
        needle = any("accuracy" in row for row in one["rows"])
        kinds = list(dict.fromkeys(kind for row in one["rows"] for kind in row.get("right", {})))
        measured = [*kinds, "accuracy", "error"] if needle else ["perplexity", "above dense, nats", "error"]
        columns = ["method", "phase", "asked", "computed", "read", "cached", *measured, "n", "kernels", "why not"]
        rows = []
        for row in one["rows"]:
            kept = [_text(row.get(name)) for name in ("density", "read", "cache")]
            if needle:
                at = value(row)
                error = None if at is None else math.sqrt(at * (1 - at) / row["n"])
                found = [*(_text(row.get(name)) for name in (*kinds, "accuracy")), _text(error)]
            else:
                gap = None if "reason" in row else against(row, dense_row(one["rows"], row["phase"]))
                found = [_text(value(row), 2), *(_text(part, 4) for part in gap or (None, None))]
            end = [str(row.get("n", "")), str(row.get("kernels", "")), str(row.get("reason", ""))[:80]]
            rows.append([row["method"], row["phase"], f"{row['target']:g}", *kept, *found, *end])
        out.append({"title": f"{one['model']}: {one['task']} ({one['data']}), {one['device']}", "columns": columns, "rows": rows})
    return out


def draw(result: dict[str, Any], methods: Sequence[str] | None = None) -> go.Figure:
    """Quality against what was kept, a line per method; the dashed line is dense attention."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    results = result["results"]
    present = [phase for phase in X if any(row["phase"] == phase for one in results for row in one["rows"])]
    names = [name for name in names_of(results) if methods is None or name in methods]
    titles = [f"{one['task']}: {phase}" for one in results for phase in present]
    figure = make_subplots(len(results), len(present), subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.12)
    shown: set[str] = set()
    for line, one in enumerate(results, start=1):
        for column, phase in enumerate(present, start=1):
            rows = [row for row in one["rows"] if row["phase"] == phase]
            base = dense_row(rows, phase)
            for number, name in enumerate(names):
                points = points_of(rows, base, name, phase)
                if not points:
                    continue
                trace = go.Scatter(
                    x=[x for x, *_ in points],
                    y=[y for _, y, *_ in points],
                    error_y={"array": [high - y for _, y, _, high in points], "arrayminus": [y - low for _, y, low, _ in points]},
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    mode="lines+markers",
                    line={"color": colour(name), "width": 3 if name == "allocate" else 1.5},
                    marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
                )
                figure.add_trace(trace, row=line, col=column)
                shown.add(name)
            needle = any("accuracy" in row for row in rows)
            if base:
                figure.add_hline(y=base["accuracy"] if needle else 1.0, line={"dash": "dash", "color": "#555"}, row=line, col=column)
            figure.update_xaxes(title=X[phase][1], tickformat=".0%", row=line, col=column)
            figure.update_yaxes(title="whole answers right" if needle else "perplexity, dense = 1", row=line, col=column)
            if not needle:
                figure.update_yaxes(type="log", row=line, col=column)
    figure.update_layout(template="plotly_white", width=1100, height=420 * len(results) + 60, legend={"title": "planner"})
    return figure


def names_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods that have rows, ours first."""
    found = dict.fromkeys(str(row["method"]) for one in results for row in one["rows"] if row["method"] != "dense")
    return sorted(found, key=lambda name: name != "allocate")


def points_of(
    rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], method: str, phase: str
) -> list[tuple[float, float, float, float]]:
    """(x, y, low, high) of a method's points, by what was kept."""
    found = ((row, judged(row, dense)) for row in rows if row["method"] == method and row["phase"] == phase)
    return sorted((float(row[X[phase][0]]), *at) for row, at in found if at is not None)


def _text(number: Any, digits: int = 3) -> str:
    return "" if number is None else f"{float(number):.{digits}f}"

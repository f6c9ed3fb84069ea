"""MInference's list of patterns, which vLLM's and SGLang's dual-chunk attention read too: per layer, head number -> [type, a, b, score]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headscope.errors import ExportError, refusal
from headscope.export.base import Export
from headscope.export.files import read_json
from headscope.plans.plan import Place

Entry = tuple[str, int, int, float]


def number(value: float) -> int | float:
    """A score as JSON: whole numbers without a point."""
    return int(value) if float(value).is_integer() else float(value)


def listed(export: Export, entries: dict[Place, Entry]) -> list[dict[str, list[Any]]]:
    """The list: layers in order, heads in order, exactly four items each."""
    model = export.model
    return [
        {str(head): [kind, a, b, number(score)] for head in range(heads) for kind, a, b, score in [entries[layer, head]]}
        for layer, heads in zip(model.layers, model.heads, strict=True)
    ]


def read_list(value: Any, path: Path, kinds: tuple[str, ...], *, every_head: bool) -> tuple[list[int], dict[Place, Entry]]:
    """(heads of each layer, entries by head). ExportError that names the layer and head which is wrong."""
    if not isinstance(value, list) or not value or not all(isinstance(layer, dict) for layer in value):
        raise refusal(ExportError, str(path), 'it is no list of {"head": [type, a, b, score]}', "check that the file is of this format")
    counts: list[int] = []
    entries: dict[Place, Entry] = {}
    for layer, heads in enumerate(value):
        numbers = sorted(int(key) if key.isdecimal() else -1 for key in heads)
        if every_head and numbers != list(range(len(numbers))):
            missing = next((at for at, one in enumerate(numbers) if at != one), len(numbers))
            raise refusal(
                ExportError, str(path), f"layer {layer} has no head {missing}", "the engine needs every head; copy the file again"
            )
        if numbers and numbers[0] < 0:
            raise refusal(ExportError, str(path), f"layer {layer} names a head that is no number", "check that the file is of this format")
        counts.append((numbers[-1] + 1) if numbers else 0)
        for key, entry in heads.items():
            entries[layer, int(key)] = _entry(entry, f"head {layer}.{key}", path, kinds)
    if not every_head:  # a missing head runs with the engine's default
        counts = [max(counts)] * len(counts)
    if len(set(counts)) > 1 or not counts[0]:
        raise refusal(ExportError, str(path), f"its layers have {sorted(set(counts))} heads", "it is ragged; copy the file again")
    return counts, entries


def _entry(entry: Any, where: str, path: Path, kinds: tuple[str, ...]) -> Entry:
    if not isinstance(entry, list) or len(entry) != 4:
        size = len(entry) if isinstance(entry, list) else 0
        raise refusal(ExportError, str(path), f"{where} has {size} items", "the engine unpacks exactly 4; correct the file")
    kind, a, b, score = entry
    if kind not in kinds:
        raise refusal(ExportError, str(path), f"{where} has type {kind!r}", f"the engine has {', '.join(kinds)}; correct the file")
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in (a, b)):
        raise refusal(ExportError, str(path), f"{where} has sizes {a!r}, {b!r}", "they count keys; correct the file")
    score = 1.0 if score is None else score
    if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
        raise refusal(ExportError, str(path), f"{where} has score {score!r}", "it is a number; correct the file")
    return str(kind), a, b, float(score)


def read_list_file(path: Path, kinds: tuple[str, ...], *, every_head: bool) -> tuple[list[int], dict[Place, Entry]]:
    """`read_list` of a file."""
    return read_list(read_json(path), path, kinds, every_head=every_head)

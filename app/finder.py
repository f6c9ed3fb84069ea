"""The head finder: a few words that pick heads. `18.6`, `layer 3`, `induction`, `sink > 0.5`, `top 5 distance`, joined by `and`; lists of
heads and roles joined by commas.

Everything that is typed is either understood whole or refused with what could be typed instead: a finder that drops the half it does not
understand shows the wrong heads with confidence.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable

import numpy as np

from headscope.app.runs import Run
from headscope.errors import RunError, refusal

Head = tuple[int, int]
_COMPARE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "=": operator.eq, "==": operator.eq,
}  # fmt: skip
_HELP = "type for example 18.6, layer 3, induction, sink > 0.5, top 5 distance, or two of them joined by `and`"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
LONGEST = 400


def find(run: Run, text: str) -> list[Head]:
    """The heads that every part of `text` names, in order of layer and head. RunError for what cannot be understood or is not there."""
    if len(text) > LONGEST:
        raise refusal(RunError, "what to find", f"it has {len(text)} characters", _HELP)
    kept: set[Head] | None = None
    for part in re.split(r"\s+and\s+|\s*&\s*", text.strip(), flags=re.IGNORECASE):
        found = _part(run, part.strip())
        kept = found if kept is None else kept & found
    return sorted(kept or set())


def _part(run: Run, part: str) -> set[Head]:
    if not part:
        raise refusal(RunError, "an empty part", "there is nothing to find", _HELP)
    place = re.fullmatch(r"(?:l(?:ayer)?\s*)?(\d+)\s*[.:, ]\s*(?:h(?:ead)?\s*)?(\d+)", part, flags=re.IGNORECASE)
    if place:
        return {_head(run, int(place[1]), int(place[2]))}
    if "," in part:
        found: set[Head] = set()
        for piece in part.split(","):
            found |= _part(run, piece.strip())
        return found
    ranked = re.fullmatch(r"(top|bottom)\s+(\d+)\s+(.+)", part, flags=re.IGNORECASE)
    if ranked:
        return _ranked(run, ranked[1].lower() == "top", int(ranked[2]), _metric(run, ranked[3]))
    compared = re.fullmatch(rf"(.+?)\s*(>=|<=|==|>|<|=)\s*({_NUMBER})\s*(%?)", part, flags=re.IGNORECASE)
    if compared:
        return _compared(run, compared[1].strip(), compared[2], float(compared[3]) / (100 if compared[4] else 1))
    one = re.fullmatch(r"(layer|head|l|h)\s*(\d+)", part, flags=re.IGNORECASE)
    if one:
        return _compared(run, "layer" if one[1][0].lower() == "l" else "head", "=", float(one[2]))
    return _role(run, part)


def _head(run: Run, layer: int, head: int) -> Head:
    if not run.has(layer, head):
        span = f"layers {run.layers[0]} to {run.layers[-1]}, heads 0 to {run.heads - 1}"
        raise refusal(RunError, f"head {layer}.{head}", f"{run.id} has {span}", "type one of them")
    return layer, head


def _compared(run: Run, name: str, sign: str, bound: float) -> set[Head]:
    if name.lower() in ("layer", "head"):
        at = 0 if name.lower() == "layer" else 1
        places = list(run.reasons)
        kept = _COMPARE[sign](np.array([place[at] for place in places], dtype=np.float64), bound)
        return {place for place, keep in zip(places, kept, strict=True) if keep}
    values = run.grid(_metric(run, name))
    with np.errstate(invalid="ignore"):
        kept = _COMPARE[sign](values, bound) & np.isfinite(values)
    return {(run.layers[row], int(head)) for row, head in np.argwhere(kept)}


def _ranked(run: Run, top: bool, count: int, metric: str) -> set[Head]:
    values = run.grid(metric)
    keys = np.where(np.isfinite(values), -values if top else values, np.inf).ravel()
    order = np.argsort(keys, kind="stable")[:count]
    return {(run.layers[int(at) // run.heads], int(at) % run.heads) for at in order if np.isfinite(keys[at])}


def _role(run: Run, name: str) -> set[Head]:
    from headscope.profile.roles import BY_NAME

    wanted = _plain(name.removesuffix(" heads").removesuffix(" head"))
    for role, heads in run.roles.items():
        if _plain(role) == wanted:
            return set(heads)
    if wanted in (_plain(role) for role in BY_NAME):
        raise refusal(RunError, f"role {name!r}", "no head of this run has it", f"the roles here are {', '.join(run.roles) or 'none'}")
    raise _unknown(run, name, [*run.roles, *run.metrics])


def _metric(run: Run, name: str) -> str:
    found = {_plain(metric): metric for metric in run.metrics}
    if _plain(name) not in found:
        raise _unknown(run, name, run.metrics)
    return found[_plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _unknown(run: Run, name: str, names: list[str]) -> RunError:
    near = difflib.get_close_matches(_plain(name), names, 2, 0.55)
    hint = f"did you mean {' or '.join(near)}? else {_HELP}" if near else _HELP
    return refusal(RunError, f"{name[:60]!r}", "it is no head, role or metric of this run", hint)


def heads_of(text: object, run: Run, most: int = 256) -> list[Head]:
    """The heads of a list such as `18.6,3.2`, as addresses have it: those that the run has, each once, `most` of them."""
    out: list[Head] = []
    if not isinstance(text, str):
        return out
    for part in text[: 12 * most].split(","):
        layer, dot, head = part.partition(".")
        if dot and layer.isascii() and layer.isdecimal() and head.isascii() and head.isdecimal() and len(part) < 14:
            place = (int(layer), int(head))
            if run.has(*place) and place not in out:
                out.append(place)
    return out[:most]


def names_of(heads: list[Head]) -> str:
    """The inverse of `heads_of`."""
    return ",".join(f"{layer}.{head}" for layer, head in heads)

"""What the viewer asks for over HTTP: tiles, rows, columns, tokens. Flask routes, since a browser cannot cache a Dash callback.

Every part of an address is checked: the run is a key of the listing, numbers are digits and within the run, names are of a fixed list. What
depends on nothing but the run is sent with the run's version as its ETag, and forever cacheable where the address names that version.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import Any

import flask
import numpy as np

from headscope.app import context, overlay, tiles
from headscope.app.cache import SizedCache
from headscope.app.exact import ExactCells, ExactHead, binned, largest
from headscope.app.format import number
from headscope.app.runs import Run
from headscope.errors import HeadscopeError, RunError, refusal

TOKENS_A_PAGE = 4096
CACHE_BYTES = 96 * 2**20
_KEY = "headscope.api"


class Served:
    """What an application keeps in memory for its answers: packed tiles, and pieces of q and k."""

    def __init__(self) -> None:
        self.packed: SizedCache[bytes] = SizedCache(CACHE_BYTES, len)
        self.exact = ExactCells()


def install(server: flask.Flask) -> None:
    """Adds the routes to an application that `context.bind` has given its runs."""
    server.extensions[_KEY] = Served()
    head = "/api/run/<run>/<int:layer>/<int:head>"
    server.add_url_rule(f"{head}/tile/<plane>/<int:block>/<int:i>/<int:j>", "hs_tile", tile)
    server.add_url_rule(f"{head}/plan/<plan>/<int:block>/<int:i>/<int:j>", "hs_plan", plan_tile)
    server.add_url_rule(f"{head}/row/<int:query>", "hs_row", row)
    server.add_url_rule(f"{head}/column/<int:key>", "hs_column", column)
    server.add_url_rule("/api/run/<run>/tokens/<int:page>", "hs_tokens", tokens)
    server.add_url_rule("/api/run/<run>/facts", "hs_facts", facts)
    server.add_url_rule("/api/<path:rest>", "hs_unknown", unknown)
    server.register_error_handler(HeadscopeError, refused)


def served() -> Served:
    """The memory of the application that answers this request."""
    found = flask.current_app.extensions[_KEY]
    assert isinstance(found, Served)
    return found


def unknown(rest: str) -> flask.typing.ResponseReturnValue:
    """An address under /api/ that is none of ours; without this one the page's own HTML would answer, with status 200."""
    return flask.Response(f"/api/{rest}: there is no such address; see headscope.app.api for those there are\n", 404, mimetype="text/plain")


def refused(error: Exception) -> flask.typing.ResponseReturnValue:
    """A refusal as one line of text: 404, since what was asked for is not there."""
    return flask.Response(f"{error}\n", 404, mimetype="text/plain")


def exact_head(run: Run, layer: int, head: int) -> ExactHead | None:
    """The head's exact cells, None where its q and k were not kept."""
    if layer not in run.kept_layers:
        return None
    return served().exact.head(f"{run.path}@{run.version}", run.kept_layer(layer), layer, head)


def opened(run: str, layer: int, head: int) -> Run:
    """The run, after checking that it has this head."""
    found = context.open_run(run)
    if not found.has(layer, head):
        span = f"layers {found.layers[0]}..{found.layers[-1]}, heads 0..{found.heads - 1}"
        raise refusal(RunError, f"head {layer}.{head}", f"{found.id} has {span}", "ask for one of them")
    return found


def tile(run: str, layer: int, head: int, plane: str, block: int, i: int, j: int) -> flask.typing.ResponseReturnValue:
    """One tile of cells; see `tiles`."""
    found = opened(run, layer, head)
    shape = tiles.geometry(found, layer)
    tiles.check(shape, plane, block, i, j)

    def make() -> bytes:
        exact = exact_head(found, layer, head) if block in shape.exact else None
        if exact is None:
            return pack(tiles.encode(tiles.cells(found, shape, None, layer, head, plane, block, i, j), tiles.STORED))
        with served().exact.working:
            return pack(tiles.encode(tiles.cells(found, shape, exact, layer, head, plane, block, i, j), tiles.EXACT))

    return cached(found, f"{layer}.{head}.{plane}.{block}.{i}.{j}", make, "application/octet-stream")


def plan_tile(run: str, layer: int, head: int, plan: str, block: int, i: int, j: int) -> flask.typing.ResponseReturnValue:
    """The share of each cell that a plan keeps of this head; see `overlay`."""
    found = opened(run, layer, head)
    shape = tiles.geometry(found, layer)
    tiles.check(shape, "mass", block, i, j)
    plans = context.index().plans
    given, stamp = plans.open(plan), plans.paths()[plan].stat().st_mtime_ns

    def make() -> bytes:
        with served().exact.working:
            pattern = overlay.static_pattern(given, layer, head, exact_head(found, layer, head), shape)
            return pack(tiles.encode(overlay.kept_share(pattern, shape, block, i, j), tiles.SHARE))

    return cached(found, f"{layer}.{head}.plan.{plan}.{stamp:x}.{block}.{i}.{j}", make, "application/octet-stream", lasting=False)


def facts(run: str) -> flask.typing.ResponseReturnValue:
    """What a program must know to ask for tiles: tokens, tile, the blocks of the kept layers (or of any), and the heads of those."""
    found = context.open_run(run)
    layer = found.kept_layers[0] if found.kept_layers else found.layers[0]
    shape = tiles.geometry(found, layer)
    places = [place for place in found.reasons if place[0] in (found.kept_layers or found.layers)]
    return flask.jsonify(
        tokens=shape.tokens,
        tile=shape.tile,
        causal=shape.causal,
        exact=shape.exact,
        stored=shape.stored,
        version=found.version,
        heads=places,
    )


def tokens(run: str, page: int) -> flask.typing.ResponseReturnValue:
    """The pieces of text of TOKENS_A_PAGE positions."""
    found = context.open_run(run)
    first = page * TOKENS_A_PAGE
    pieces = found.tokens[first : first + TOKENS_A_PAGE]
    return cached(found, f"tokens.{page}", lambda: pack(json.dumps(pieces, ensure_ascii=False).encode()), "application/json")


def row(run: str, layer: int, head: int, query: int) -> flask.typing.ResponseReturnValue:
    """One query: its largest weights with their keys, and all its weights in at most 1,024 stretches."""
    found = opened(run, layer, head)
    check_token(found, query)
    return cached(found, f"{layer}.{head}.row.{query}", lambda: _packed_line(found, layer, head, "row", query), "application/json")


def column(run: str, layer: int, head: int, key: int) -> flask.typing.ResponseReturnValue:
    """One key: the queries that give it the largest weights, and what all of them give in at most 1,024 stretches."""
    found = opened(run, layer, head)
    check_token(found, key)
    return cached(found, f"{layer}.{head}.column.{key}", lambda: _packed_line(found, layer, head, "column", key), "application/json")


def check_token(run: Run, position: int) -> None:
    """RunError for a position that the shown text does not have."""
    length = run.maps.tokens if run.maps is not None else len(run.tokens)
    if not 0 <= position < length:
        raise refusal(RunError, f"token {position}", f"the text has the tokens 0..{length - 1}", "ask for one of them")


def line(run: Run, layer: int, head: int, kind: str, position: int) -> dict[str, Any]:
    """A whole row or column as plain data: `top` [{position, token, weight, text}], `sums` and `max` of stretches of `width` tokens from
    `first` on, `kind` "exact" or "block" (then cells of `block` tokens, mass per query).
    """
    exact = exact_head(run, layer, head)
    if exact is not None:
        with served().exact.working:
            first, values = (0, exact.row(position)) if kind == "row" else exact.column(position)
        block = 1
    else:
        first, block, values = _stored_line(run, layer, head, kind, position)
    width, sums, highest = binned(values)
    pieces = run.tokens
    top = [
        {
            "position": first + int(at) * block,
            "token": pieces[first + int(at)] if block == 1 and first + int(at) < len(pieces) else "",
            "weight": float(values[at]),
            "text": number(float(values[at]), 4),
        }
        for at in largest(values)
    ]
    answer: dict[str, Any] = {
        "kind": "exact" if block == 1 else "block",
        "block": block,
        "first": first,
        "width": width * block,
        "top": top,
    }
    return answer | {"total": float(np.nansum(values)), "sums": _short(sums), "max": _short(highest)}


def _packed_line(run: Run, layer: int, head: int, kind: str, position: int) -> bytes:
    return pack(json.dumps(line(run, layer, head, kind, position), ensure_ascii=False).encode())


def _stored_line(run: Run, layer: int, head: int, kind: str, position: int) -> tuple[int, int, np.ndarray]:
    """(first position, block, cells): the finest row or column of the stored map that holds the position, mass per query."""
    shape = tiles.geometry(run, layer)
    block = shape.stored[0]
    place = position // block
    side, inside = divmod(place, shape.tile)
    ends = range(side + 1) if kind == "row" and shape.causal else range(side if shape.causal else 0, shape.tiles(block))
    if kind == "row":
        parts = [tiles.cells(run, shape, None, layer, head, "mass", block, side, j)[inside] for j in ends]
        return 0, block, np.concatenate(parts)[: place + 1 if shape.causal else None]
    parts = [tiles.cells(run, shape, None, layer, head, "mass", block, i, side)[:, inside] for i in ends]
    if not shape.causal:
        return 0, block, np.concatenate(parts)
    return place * block, block, np.concatenate(parts)[inside:]


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def pack(data: bytes) -> bytes:
    """Compressed once, for every browser that asks."""
    return gzip.compress(data, 1, mtime=0)


def cached(run: Run, name: str, make: Any, kind: str, lasting: bool = True) -> flask.Response:
    """A packed answer with its ETag; 304 where the browser has it, unpacked for one that reads no gzip. `lasting`: it depends on nothing
    but the run.
    """
    request = flask.request
    tag = f"{run.version}.{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}"
    response = flask.Response(mimetype=kind)
    response.set_etag(tag)
    response.headers["Vary"] = "Accept-Encoding"
    forever = lasting and request.args.get("v") == run.version
    response.headers["Cache-Control"] = "private, max-age=31536000, immutable" if forever else "private, no-cache"
    if request.if_none_match.contains(tag):
        response.status_code = 304
        return response
    packed = served().packed.get((str(run.path), tag), make)
    if request.accept_encodings.quality("gzip"):
        response.headers["Content-Encoding"] = "gzip"
        response.set_data(packed)
    else:
        response.set_data(gzip.decompress(packed))
    return response

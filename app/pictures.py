"""What the pages about pictures ask for over HTTP: the picture, one head's weights by frame, all heads of a frame."""

from __future__ import annotations

import io
import json

import flask
import numpy as np

from headscope.app import api, context, tiles
from headscope.app.runs import Run
from headscope.errors import RunError, refusal
from headscope.store.pictures import PictureReader


def install(server: flask.Flask) -> None:
    """Adds the routes."""
    head = "/api/run/<run>/<int:layer>/<int:head>/pictures"
    server.add_url_rule("/api/run/<run>/picture/<int:number>", "hs_picture", picture)
    server.add_url_rule("/api/run/<run>/pictures/<int:frame>", "hs_pictures", every_head)
    server.add_url_rule(head, "hs_picture_head", one_head)
    server.add_url_rule(f"{head}/<int:frame>/<int:patch>", "hs_picture_patch", one_patch)


def pictures_of(run: Run) -> PictureReader:
    """The run's pictures; RunError when it has none."""
    if run.pictures is None:
        raise refusal(
            RunError, f"the picture of {run.id}", "this run is of text alone", "profile a picture with headscope.profile.pictures"
        )
    return run.pictures


def picture(run: str, number: int) -> flask.typing.ResponseReturnValue:
    """The picture of a frame (0 where all frames share one) as PNG."""
    from PIL import Image

    found = context.open_run(run)
    kept = pictures_of(found).picture
    _within("picture", number, len(kept))

    def make() -> bytes:
        out = io.BytesIO()
        Image.fromarray(kept[number]).save(out, "PNG")
        return api.pack(out.getvalue())

    return api.cached(found, f"picture.{number}", make, "image/png")


def every_head(run: str, frame: int) -> flask.typing.ResponseReturnValue:
    """All heads at one frame, in the form of a tile: a row a head (layer by layer), a column a patch."""
    found = context.open_run(run)
    kept = pictures_of(found)
    _within("frame", frame, len(kept.facts.labels))

    def make() -> bytes:
        rows = [kept.head(place, head)[frame] for place in range(len(found.layers)) for head in range(found.heads)]
        return api.pack(tiles.encode(np.stack(rows), tiles.STORED))

    return api.cached(found, f"pictures.{frame}", make, "application/octet-stream")


def one_head(run: str, layer: int, head: int) -> flask.typing.ResponseReturnValue:
    """{"weights": [T][P]} of one head."""
    found = api.opened(run, layer, head)
    kept = pictures_of(found)
    place = found.layers.index(layer)
    return api.cached(found, f"{layer}.{head}.pictures", lambda: _packed(kept.head(place, head)), "application/json")


def one_patch(run: str, layer: int, head: int, frame: int, patch: int) -> flask.typing.ResponseReturnValue:
    """{"weights": [P]}: where one patch looks at one step."""
    found = api.opened(run, layer, head)
    kept = pictures_of(found)
    _within("frame", frame, len(kept.facts.labels))
    _within("patch", patch, kept.facts.patches)
    between = kept.head_between(found.layers.index(layer), head)
    if between is None:
        raise refusal(RunError, f"patch {patch}", "this run keeps no weights between patches", "choose a frame instead")
    return api.cached(found, f"{layer}.{head}.patch.{frame}.{patch}", lambda: _packed(between[frame, patch]), "application/json")


def _packed(values: np.ndarray) -> bytes:
    rounded = [[float(f"{value:.4g}") for value in row] for row in np.nan_to_num(np.atleast_2d(values)).tolist()]
    return api.pack(json.dumps({"weights": rounded if values.ndim == 2 else rounded[0]}).encode())


def _within(what: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise refusal(RunError, f"{what} {number}", f"there are 0..{count - 1}", "ask for one of them")

"""Attention over a picture, frame by frame: for every word of an answer, or for every step of a diffusion model, how much weight each head
gives to each patch.

A vision-language model's picture is a run of tokens in the middle of a text, and a diffusion model has no text at all, so neither fits the
block maps of a shown text. What is kept is small: one number per head, frame and patch, the picture itself at screen size, and the grid
that says where a patch lies. Without the grid a map over a picture is a guess, so it is required.

    pictures.json           kind, labels, grid, words for people
    pictures.safetensors    picture uint8 [S, h, w, 3], weights float32 [L, H, T, P], between float32 [L, H, T, P, P] (few patches only)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store.files import readable
from headscope.store.schema import PICTURES, SCHEMA_VERSION, check_version

Kind = Literal["answer", "step"]
"""Frames are words of an answer, or denoising steps."""
MOST_BETWEEN = 256
"""Patches up to which the weights between them may be kept."""
LARGEST = 512
"""Pixels a side of the kept picture, at most."""


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """`kind`; `labels` of the T frames; `grid` (rows, columns) of the P patches, row by row; `question` and `answer`, or what a step's
    picture is; `note`: what a reader must know.
    """

    kind: Kind
    labels: tuple[str, ...]
    grid: tuple[int, int]
    question: str = ""
    answer: str = ""
    note: str = ""

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """In memory: `facts`; `picture` uint8 [S, h, w, 3], S = 1 or one a frame; `weights` float32 [L, H, T, P]; `between` float32
    [L, H, T, P, P] or None: row p is where patch p looks. Weights of an answer add up to at most one (the rest is on text); those of a
    step are the mean weight that a patch receives. NaN where a layer has fewer heads. RunError for shapes that do not go together.
    """

    facts: PictureFacts
    picture: np.ndarray
    weights: np.ndarray
    between: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_shapes(self.facts, self.picture.shape, self.weights.shape, None if self.between is None else self.between.shape)
        if self.picture.dtype != np.uint8 or self.weights.dtype != np.float32:
            given = f"a picture of {self.picture.dtype} and weights of {self.weights.dtype}"
            raise refusal(RunError, given, "they are stored as uint8 and float32", "convert them")

    def head(self, place: int, head: int) -> np.ndarray:
        """[T, P]: one head's weights; `place` is the index of its layer."""
        found: np.ndarray = self.weights[place, head]
        return found

    def head_between(self, place: int, head: int) -> np.ndarray | None:
        """[T, P, P], None where they were not kept."""
        return None if self.between is None else self.between[place, head]


def check_shapes(facts: PictureFacts, picture: Sequence[int], weights: Sequence[int], between: Sequence[int] | None) -> None:
    """RunError for shapes that do not go together."""
    frames, patches = len(facts.labels), facts.patches
    fits = (
        len(weights) == 4
        and tuple(weights[2:]) == (frames, patches)
        and len(picture) == 4
        and picture[3] == 3
        and picture[0] in (1, frames)
    )
    if facts.kind not in get_args(Kind) or min(facts.grid) < 1 or not frames or not fits:
        patched = f"{frames} frames of {facts.grid[0]} x {facts.grid[1]} patches"
        why = f"{patched} do not go with a picture {list(picture)}, weights {list(weights)}"
        raise refusal(RunError, f"pictures of kind {facts.kind!r}", why, "pass picture [S, h, w, 3] and weights [L, H, frames, patches]")
    if max(picture[1:3]) > LARGEST:
        raise refusal(
            RunError, f"a picture of {picture[1]} x {picture[2]}", f"a run keeps at most {LARGEST} pixels a side", "make it smaller"
        )
    if between is not None and (tuple(between) != (*weights, patches) or patches > MOST_BETWEEN):
        why = f"weights between {patches} patches are kept for at most {MOST_BETWEEN}, as [L, H, frames, patches, patches]"
        raise refusal(RunError, f"between {list(between)}", why, "leave them out")


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Both files."""
    from safetensors.numpy import save_file

    facts = pictures.facts
    value = {
        "schema_version": SCHEMA_VERSION,
        "kind": facts.kind,
        "labels": list(facts.labels),
        "grid": list(facts.grid),
        "question": facts.question,
        "answer": facts.answer,
        "note": facts.note,
    }
    (folder / PICTURES[0]).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    arrays = {"picture": np.ascontiguousarray(pictures.picture), "weights": np.ascontiguousarray(pictures.weights)}
    if pictures.between is not None:
        arrays["between"] = np.ascontiguousarray(pictures.between.astype(np.float32))
    save_file(arrays, folder / PICTURES[1], metadata={"schema_version": str(SCHEMA_VERSION)})


class PictureReader:
    """Pictures on disk: facts at once, one head's arrays when they are asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = folder / PICTURES[1]
        place = folder / PICTURES[0]

        def read() -> PictureFacts:
            value = json.loads(place.read_text(encoding="utf-8"))
            check_version(value["schema_version"], place)
            rows, columns = (int(size) for size in value["grid"])
            words = {name: str(value[name]) for name in ("question", "answer", "note")}
            return PictureFacts(value["kind"], tuple(str(label) for label in value["labels"]), (rows, columns), **words)

        self.facts: PictureFacts = readable(place, read, (OSError, ValueError, KeyError, TypeError))
        self._errors = (OSError, ValueError, KeyError, TypeError, SafetensorError)
        self._file: Any = readable(self._path, lambda: safe_open(self._path, framework="np"), self._errors)
        names = set(self._file.keys())
        shapes = {name: self._file.get_slice(name).get_shape() for name in names}
        if not {"picture", "weights"} <= names:
            raise refusal(RunError, str(self._path), f"it holds {sorted(names)}", "write the run again")
        check_shapes(self.facts, shapes["picture"], shapes["weights"], shapes.get("between"))
        self.has_between = "between" in names

    @cached_property
    def picture(self) -> np.ndarray:
        """uint8 [S, h, w, 3]."""
        return self._get("picture", ...)

    def head(self, place: int, head: int) -> np.ndarray:
        """As `Pictures.head`."""
        return self._get("weights", (place, head))

    def head_between(self, place: int, head: int) -> np.ndarray | None:
        """As `Pictures.head_between`."""
        return self._get("between", (place, head)) if self.has_between else None

    def load(self) -> Pictures:
        """Everything, in memory."""
        return Pictures(self.facts, self.picture, self._get("weights", ...), self._get("between", ...) if self.has_between else None)

    def _get(self, name: str, index: Any) -> np.ndarray:
        found: np.ndarray = readable(self._path, lambda: self._file.get_slice(name)[index], self._errors)
        return found


__all__ = ["LARGEST", "MOST_BETWEEN", "PictureFacts", "PictureReader", "Pictures", "write_pictures"]

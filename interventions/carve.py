"""carve: ask again, of a picture from which what the question did not make the model look at is masked out and cut away.

Not an edit inside the network: two readings of its attention (see `headscope.probes.carve`), an operation on pixels, and a third run.

The silent failure this avoids is a mask that is laid over the wrong part of the picture: where a processor cuts out the middle of a
picture before it scales it, the grid of image tokens belongs to that middle only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.errors import InterventionError, ProbeError, refusal, unknown_name
from headscope.interventions.prompts import refuse_blind

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.probes.pictures import Sample
    from headscope.scope import Scope

VIEWS = ("masked", "cropped", "both")
Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Carved:
    """What `carve` did.

    `answer`: the model's answer to what is left of the picture; `answers`: the plain one before and that one. `picture`: what is left, a
    PIL image of the size it had. `mask` bool [height, width] of pixels kept; `kept` bool [rows, columns] of image tokens. `boxes`: per
    region, best first, (left, top, right, bottom) in pixels, right and bottom excluded, as PIL crops; `crop` the box around all of them.
    `saliency` float64 [rows, columns]: S. `regions`: the table behind the boxes.
    """

    answer: str
    answers: tuple[str, str]
    picture: Any
    mask: Tensor
    kept: Tensor
    boxes: tuple[Box, ...]
    crop: Box
    saliency: Tensor
    regions: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:
        return f"Carved({self.answers[0]!r} -> {self.answer!r}, {float(self.mask.float().mean()):.0%} of the picture kept)"


def carve(
    scope: Scope,
    picture: Any,
    question: str,
    *,
    general: str | None = None,
    layers: tuple[int, int] | None = None,
    tokens: int = 8,
    quantile: float = 0.6,
    regions: int = 3,
    strength: float = 1e-8,
    view: Literal["masked", "cropped", "both"] = "both",
    margin: int = 0,
    fill: int = 0,
    max_new_tokens: int = 32,
) -> Carved:
    """Answer a question from the part of a picture that it makes the model look at (CARVE, arXiv 2509.06461).

    A^ = A^Q / (A^G + `strength`), attention of the answer's rows for the question and for a `general` instruction; S = its sum over
    `layers` (first, end) and over steps, later ones counting more. Image tokens with S at or above its `quantile` are kept, joined over
    edges, and the `regions` with the largest sums stay. Pixels elsewhere become `fill`, the picture is cut to the box around the regions
    (`margin` image tokens wider) and scaled back to its size, and the question is asked again.

    `picture`: what the processor takes, as a PIL image, or a path. `view`: "masked" leaves out the cut, which a question about places needs
    ("what stands at the left?" means something else in a detail); "cropped" leaves out the mask. The paper uses quantiles of 0.2 to 0.6, 2
    or 3 regions, layers 20 to 25 of 32 (taken as a share of the depth) and up to 32 tokens. InterventionError for a model that reads no
    pictures or has no processor, and where its image tokens form no grid.
    """
    from headscope.probes.carve import Carve
    from headscope.probes.pictures import BUNDLED, BUNDLED_GENERAL, GENERAL, asked

    refuse_blind(scope, "carve")
    if view not in VIEWS:
        raise unknown_name(InterventionError, "view", view, VIEWS)
    if margin < 0 or not 0 <= fill <= 255:
        raise refusal(InterventionError, f"margin={margin}, fill={fill}", "tokens are counted, and a grey is from 0 to 255", "pass 0 and 0")
    try:
        probe = Carve(general=general, layers=layers, tokens=tokens, quantile=quantile, regions=regions, strength=strength)
        whole = _opened(picture)
        sample = asked(scope, whole, question)
        if sample.grid is None:
            raise refusal(InterventionError, f"carve on {scope.name}", "its image tokens form no known grid", "use one plain picture")
        unit = probe.question(scope, sample, general or (BUNDLED_GENERAL if scope.source == BUNDLED else GENERAL))
        saliency = probe.saliency(unit, probe.span(scope)).reshape(sample.grid)
    except ProbeError as error:
        raise InterventionError(str(error)) from None
    kept, found = best_regions(saliency, quantile, regions)
    area = seen_area(scope, whole.size)
    boxes = tuple(token_box((one["top"], one["left"], one["bottom"], one["right"]), sample.grid, area) for one in found)
    rows, columns = (kept.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    around = (
        max(0, rows[0] - margin),
        max(0, columns[0] - margin),
        min(sample.grid[0] - 1, rows[-1] + margin),
        min(sample.grid[1] - 1, columns[-1] + margin),
    )
    crop = token_box(around, sample.grid, area)
    mask = pixel_mask(kept, area, whole.size)
    left = _carved(whole, mask, crop, view, fill)
    again = asked(scope, left, question)
    answers = (_answer(scope, sample, max_new_tokens), _answer(scope, again, max_new_tokens))
    return Carved(answers[1], answers, left, mask, kept, boxes, crop, saliency, tuple(found))


def best_regions(saliency: Tensor, quantile: float, count: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """(bool [rows, columns] of the tokens in the `count` regions of S with the largest sums; the regions, see `regions_of`)."""
    from scipy import ndimage

    from headscope.probes.carve import regions_of

    found = regions_of(saliency, quantile, count)
    labels, total = ndimage.label((saliency >= saliency.flatten().quantile(quantile)).numpy())
    areas = [torch.from_numpy(labels == number) for number in range(1, total + 1)]
    areas.sort(key=lambda area: -float(saliency[area].sum()))
    kept = torch.stack(areas[: len(found)]).any(0)
    return kept, found


def seen_area(scope: Scope, size: tuple[int, int]) -> Box:
    """The part of a picture of `size` (width, height) that the model's processor shows it: all, or the square that it cuts out."""
    processor: Any = getattr(scope.tokenizer, "image_processor", None)
    width, height = size
    if not getattr(processor, "do_center_crop", False):
        return 0, 0, width, height
    crop, scaled = dict(processor.crop_size), dict(getattr(processor, "size", {}))
    short = scaled.get("shortest_edge") if getattr(processor, "do_resize", False) else min(width, height)
    if short is None:
        high, wide = min(height, height * crop["height"] // scaled["height"]), min(width, width * crop["width"] // scaled["width"])
    else:
        factor = min(width, height) / short
        high, wide = min(height, round(crop["height"] * factor)), min(width, round(crop["width"] * factor))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def token_box(box: Box, grid: tuple[int, int], area: Box) -> Box:
    """(left, top, right, bottom) in pixels of the tokens (top, left, bottom, right), last ones included, of a grid over `area`."""
    x, y, wide, high = area[0], area[1], area[2] - area[0], area[3] - area[1]
    top, left, bottom, right = box
    return (
        x + left * wide // grid[1],
        y + top * high // grid[0],
        x + -(-(right + 1) * wide // grid[1]),
        y + -(-(bottom + 1) * high // grid[0]),
    )


def pixel_mask(kept: Tensor, area: Box, size: tuple[int, int]) -> Tensor:
    """Bool [height, width]: the pixels of the tokens kept."""
    mask = torch.zeros(size[1], size[0], dtype=torch.bool)
    grid = (kept.shape[0], kept.shape[1])
    for row, column in kept.nonzero().tolist():
        left, top, right, bottom = token_box((row, column, row, column), grid, area)
        mask[top:bottom, left:right] = True
    return mask


def _carved(picture: Any, mask: Tensor, crop: Box, view: str, fill: int) -> Any:
    from PIL import Image

    left = picture
    if view != "cropped":
        left = Image.new("RGB", picture.size, (fill, fill, fill))
        left.paste(picture, (0, 0), Image.fromarray(mask.numpy()))
    return left if view == "masked" else left.crop(crop).resize(picture.size, Image.Resampling.BICUBIC)


def _opened(picture: Any) -> Any:
    from PIL import Image

    if isinstance(picture, str | Path):
        try:
            return Image.open(picture).convert("RGB")
        except OSError as error:
            raise refusal(InterventionError, f"{picture}", f"it cannot be read as a picture ({error})", "pass a picture") from None
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(_pixels(picture)).convert("RGB")


def _pixels(picture: Any) -> Any:
    import numpy

    found = numpy.asarray(picture)
    if found.dtype != numpy.uint8 or found.ndim not in (2, 3):
        raise refusal(InterventionError, f"a picture {found.dtype} {list(found.shape)}", "it is no picture of bytes", "pass a PIL image")
    return found


def _answer(scope: Scope, sample: Sample, tokens: int) -> str:
    written = scope.generate(sample.inputs, max_new_tokens=tokens).new_ids[0]
    return str(scope.text_tokenizer.decode(written.tolist(), skip_special_tokens=True)).strip()


__all__ = ["Carved", "best_regions", "carve", "pixel_mask", "seen_area", "token_box"]

"""CARVE: what a question makes a layer look at, against what it looks at anyway."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.base import Metric
from headscope.probes.pictures import BUNDLED, BUNDLED_GENERAL, GENERAL, Sample, extended, facts_of, other_question, samples_of, unseeing
from headscope.probes.vision_mass import greedy, padded

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.scope import Scope

LAMBDA = 1e-8
SPAN = (20 / 32, 26 / 32)
"""The paper's layers 20 to 25, as a share of the 32 layers of LLaVA-1.5-7B."""


@dataclass(frozen=True)
class Carve(ActiveProbe):
    """Contrast of the attention maps of a question and of a general instruction over one picture.

    A[l, t] is the mean over the heads of layer l of the row that writes the t-th word, over image tokens. With A^Q for the question and A^G
    for `general` ("Write a general description of the image."), which shows what draws the eye whatever is asked:

        A^ = A^Q / (A^G + lambda)          S = sum over t of w_t, over the layers, of A^[l, t],   w_t = t + 1 for t = 0, 1, ...

    A^ minimises sum (A~ A^G - A^Q)^2 + lambda A~^2 A^G. Tokens with S at or above its `quantile` are kept, joined to regions (neighbours
    share an edge), and the `regions` with the largest sum of S stay: what CARVE crops to. The table `maps` has A^Q, A^G (means over t) and
    A^ per layer and token; `regions` their boxes.

    Per layer: `carve_entropy`, -sum A^Q ln A^Q over image tokens in the last step, not renormalised: how cluttered the layer finds the
    picture. Per head, our own addition, since the paper has nothing per head: `carve_contrast`, half the sum of |a^Q - a^G|, with a^Q and
    a^G the head's maps in the first step normalised over the picture: the share of its looks that the question moves.

    `layers`: (first, end); None takes the paper's 20..25 as a share of the depth. `tokens`: words of the answer that are read; both
    answers are cut to the shorter one, so that t means the same in both (the paper takes up to 32, and finds the last best).
    `general`: None takes the paper's sentence, for bundled:vlm a question that names nothing.

    Departures: one teacher-forced pass reads all steps of an answer; the masked third run, which answers anew, is
    an application and not part of the probe.
    """

    name: ClassVar[str] = "carve"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("carve_contrast", "share of visual attention", "the question moves where on the picture it looks"),
        Metric("carve_entropy", "nats", "the layer's looks are spread over the picture", (0.0, None), "layer"),
    )
    data: ClassVar[str] = "pictures"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "images", "generation", "tokenizer")
    cost: ClassVar[str] = "two answers of up to 8 tokens and two forward passes a question; 24 questions"
    source: ClassVar[str] = "CARVE, arXiv:2509.06461"

    general: str | None = None
    layers: tuple[int, int] | None = None
    tokens: int = 8
    quantile: float = 0.6
    regions: int = 3
    strength: float = LAMBDA
    samples: int = 24

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 1 or self.tokens < 1 or self.regions < 1 or self.strength < 0:
            raise refusal(
                ProbeError,
                f"quantile={self.quantile}, tokens={self.tokens}, regions={self.regions}, strength={self.strength}",
                "a quantile is in [0, 1), the rest count things",
                "use 0.6, 8, 3 and 1e-8",
            )

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or unseeing(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """Both maps of every question; see the class."""
        import pandas as pd

        samples = samples_of(scope, data, count=self.samples, seed=work.seed)
        if any(sample.grid is None for sample in samples):
            raise refusal(
                ProbeError, f"probe 'carve' on {scope.name}", "the image tokens form no grid that is known", "use one plain picture"
            )
        general = self.general or (BUNDLED_GENERAL if scope.source == BUNDLED else GENERAL)
        span = self.span(scope)
        units = [work.unit(f"question {n}", partial(self.question, scope, sample, general)) for n, sample in work.each(enumerate(samples))]
        contrast = torch.stack([head_contrast(unit["question"][:, :, 0], unit["general"][:, :, 0]) for unit in units]).mean(0)
        entropy = torch.stack([map_entropy(_layer_means(unit["question"][:, :, -1])) for unit in units]).mean(0)
        scores = {
            "carve_contrast": contrast,
            "carve_entropy": entropy[:, None].expand_as(contrast).masked_fill(contrast.isnan(), float("nan")),
        }
        maps, regions = [], []
        for number, (sample, unit) in enumerate(zip(samples, units, strict=True)):
            maps.append(self._maps(scope, number, sample, unit))
            regions += self._regions(number, sample, unit, span)
        tables = {"maps": pd.concat(maps, ignore_index=True), "regions": pd.DataFrame(regions)}
        layers = scope.topology.layers
        note = f"regions from layers {layers[span[0]]} to {layers[span[1] - 1]}; general instruction: {general!r}"
        return Findings(scores, {}, [facts_of(samples, data)], tables, [note])

    def span(self, scope: Scope) -> tuple[int, int]:
        """(first, end) of the layers whose maps are added, as places in the main stack."""
        count = len(scope.topology.main)
        if self.layers is None:
            first = min(int(SPAN[0] * count), count - 1)
            return first, max(first + 1, int(SPAN[1] * count))
        first, end = self.layers
        if not 0 <= first < end <= count:
            raise refusal(ProbeError, f"layers={self.layers}", f"{scope.name} has {count} layers", f"pass (first, end) up to {count}")
        return first, end

    def question(self, scope: Scope, sample: Sample, general: str) -> Unit:
        """Head maps [L, H, T, image tokens] of the question and of the general instruction, over the same number of steps T."""
        runs = [sample, other_question(scope, sample, general)]
        answers = [greedy(scope, one, self.tokens) for one in runs]
        steps = min(map(len, answers))
        maps = [head_maps(scope, one, words[:steps]) for one, words in zip(runs, answers, strict=True)]
        if maps[0].shape != maps[1].shape:
            raise refusal(
                ProbeError, f"{general!r}", "the same picture became another number of tokens beside it", "pass pictures of one size"
            )
        return {"question": maps[0], "general": maps[1]}

    def saliency(self, unit: Unit, span: tuple[int, int]) -> Tensor:
        """S [image tokens] float64."""
        ratio = contrast_map(_layer_means(unit["question"]), _layer_means(unit["general"]), self.strength)[slice(*span)]
        return (ratio * step_weights(ratio.shape[1])[:, None]).sum((0, 1))

    def _maps(self, scope: Scope, number: int, sample: Sample, unit: Unit) -> pd.DataFrame:
        import pandas as pd

        question, general = _layer_means(unit["question"]), _layer_means(unit["general"])
        ratio = contrast_map(question, general, self.strength)
        layers, _, cells = question.shape
        cell, columns = torch.arange(cells).repeat(layers), (sample.grid or (1, cells))[1]
        return pd.DataFrame(
            {
                "question": number,
                "layer": torch.tensor(scope.topology.layers).repeat_interleave(cells).numpy(),
                "row": (cell // columns).numpy(),
                "column": (cell % columns).numpy(),
                "asked": question.mean(1).flatten().numpy(),
                "general": general.mean(1).flatten().numpy(),
                "contrast": ratio.mean(1).flatten().numpy(),
            }
        )

    def _regions(self, number: int, sample: Sample, unit: Unit, span: tuple[int, int]) -> list[dict[str, Any]]:
        found = regions_of(self.saliency(unit, span).reshape(sample.grid or ()), self.quantile, self.regions)
        area = int(sample.image.sum())
        return [{"question": number, "rank": rank, **box, "share": box["tokens"] / area} for rank, box in enumerate(found)]


def head_maps(scope: Scope, sample: Sample, written: Tensor) -> Tensor:
    """[L, H, T, image tokens] float64: exact weights of the rows that write the T words, over image tokens."""
    places = sample.image.nonzero()[:, 0]
    whole = extended(sample, written[:-1])
    rows = torch.arange(len(sample.ids) - 1, len(whole.ids))
    pairs = {"image": (rows.repeat_interleave(len(places)), places.repeat(len(rows)))}
    stats = scope.capture(whole.inputs, statistics=["pairs"], pairs=pairs)
    found = stats.pairs("image")
    return padded([found[layer][0] for layer in scope.topology.layers]).unflatten(-1, (len(rows), len(places)))


def _layer_means(maps: Tensor) -> Tensor:
    return maps.nanmean(1)


def contrast_map(question: Tensor, general: Tensor, strength: float = LAMBDA) -> Tensor:
    """A^Q / (A^G + lambda), entry by entry."""
    return question / (general + strength)


def step_weights(steps: int) -> Tensor:
    """w_t = t - t_start + 1: [steps] float64."""
    return torch.arange(1, steps + 1, dtype=torch.float64)


def map_entropy(maps: Tensor) -> Tensor:
    """-sum a ln a over the last dimension, not renormalised."""
    return -torch.where(maps > 0, maps * maps.clamp_min(1e-300).log(), torch.zeros_like(maps)).sum(-1)


def head_contrast(question: Tensor, general: Tensor) -> Tensor:
    """[L, H]: total variation between maps [L, H, image tokens] normalised over the picture; 0 for a head that does not look there."""
    q, g = (one / one.sum(-1, keepdim=True).clamp_min(1e-30) for one in (question, general))
    return (q - g).abs().sum(-1) / 2


def regions_of(saliency: Tensor, quantile: float, count: int) -> list[dict[str, Any]]:
    """The `count` regions of S [rows, columns] with the largest sum: cells at or above the quantile, joined over edges.

    Each: top, left, bottom, right (last cell included), tokens, sum.
    """
    from scipy import ndimage

    kept = saliency >= saliency.flatten().quantile(quantile)
    labels, found = ndimage.label(kept.numpy())
    out = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = torch.from_numpy(labels == number)
        out.append(
            {
                "top": rows.start,
                "left": columns.start,
                "bottom": rows.stop - 1,
                "right": columns.stop - 1,
                "tokens": int(inside.sum()),
                "sum": float(saliency[inside].sum()),
            }
        )
    return sorted(out, key=lambda one: -one["sum"])[: min(count, found)]


__all__ = ["Carve", "contrast_map", "head_contrast", "head_maps", "map_entropy", "regions_of", "step_weights"]

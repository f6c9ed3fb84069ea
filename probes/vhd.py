"""Vision-aware head divergence: how far a head's output moves when the picture is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.interventions.record import record_heads
from headscope.interventions.running import outputs_of
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.base import Metric, stack
from headscope.probes.layer_inputs import text_stack
from headscope.probes.pictures import Sample, facts_of, first_word, last_row, samples_of, unseeing

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

Distance = Literal["l2", "relative", "cosine"]
DISTANCES = ("l2", "relative", "cosine")
POSITIONS = ("keep", "shift")
WITHOUT = ("removed", "blank")


@dataclass(frozen=True)
class Vhd(ActiveProbe):
    """How much of a head's output is there because of the picture, at the row that writes the first word of the answer.

    With z the head's output before W_O in the last row of the prompt (eq. 4 of the paper):

        VHD = || z(picture, question) - z(question) ||_2

    Outliers (eq. 6): in each layer, VHD is set to 0 where it is above mean + standard deviation of the layer and the head's text-only
    ||z||^2 is above mean + standard deviation of its layer too: such a head writes much whatever it sees. `vhd` is the mean over questions
    after this rule, `vhd_raw` before it; `vhd_chosen` is the share of questions in which the head is above its layer's median, the heads
    that VHR reinforces (eq. 7). T-VHD (eq. 5), the sum over layers of the k largest, is the number of the model for a question.

    `distance`: "l2" is the paper's. "relative", ||a - b|| / (||a|| + ||b||), and "cosine", 1 - cos, do not favour heads that write long
    vectors. `positions`: "keep" leaves every word where it stood beside the picture; "shift" lets the text close up, as taking image tokens
    out of the ids does. `without`: "removed" takes the picture's tokens out (the paper); "blank" shows an even gray instead, which a model
    that never saw a prompt without a picture can read. `top_k`: k of T-VHD; the paper gives none, None takes half of the layer.

    Departures: the official code was not obtainable, so this follows the paper's text. It does not say whether positions are held; they are
    here. Standard deviations are those of the population. A high VHD does not say that the head is right about the picture.
    """

    name: ClassVar[str] = "vhd"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("vhd", "distance", "writes something else when the picture is gone", (0.0, None)),
        Metric("vhd_raw", "distance", "the same before outliers are set to 0", (0.0, None)),
        Metric("vhd_chosen", "share of questions", "is above its layer's median: a head that VHR reinforces"),
    )
    data: ClassVar[str] = "pictures"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "images")
    cost: ClassVar[str] = "two forward passes a question; 24 questions"
    source: ClassVar[str] = "Vision-aware Head Reinforcement, arXiv:2412.13949 (official code not obtainable)"

    distance: Distance = "l2"
    positions: Literal["keep", "shift"] = "keep"
    without: Literal["removed", "blank"] = "removed"
    outliers: bool = True
    top_k: int | None = None
    samples: int = 24

    def __post_init__(self) -> None:
        for field, value, known in (
            ("distance", self.distance, DISTANCES),
            ("positions", self.positions, POSITIONS),
            ("without", self.without, WITHOUT),
        ):
            if value not in known:
                raise unknown_name(ProbeError, field, value, known)
        if self.top_k is not None and self.top_k < 1:
            raise refusal(ProbeError, f"top_k={self.top_k}", "it counts heads of a layer", "pass 1 or more, or None")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or unseeing(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """Both runs of every question; see the class."""
        import pandas as pd

        samples = samples_of(scope, data, count=self.samples, seed=work.seed)
        units = [work.unit(f"question {n}", partial(self.question, scope, sample)) for n, sample in work.each(enumerate(samples))]
        raw = torch.stack([unit["vhd"] for unit in units])
        found = torch.stack([without_outliers(unit["vhd"], unit["norm"]) for unit in units]) if self.outliers else raw
        totals = torch.stack([t_vhd(one, self.top_k) for one in found])
        zeroed = ((found == 0) & (raw > 0)).sum((1, 2))
        scores = {"vhd": found.mean(0), "vhd_raw": raw.mean(0), "vhd_chosen": _share(torch.stack([chosen(one) for one in found]), raw[0])}
        table = pd.DataFrame(
            {
                "question": [sample.question for sample in samples],
                "tokens": [len(sample.ids) for sample in samples],
                "image_tokens": [int(sample.image.sum()) for sample in samples],
                "t_vhd": totals.tolist(),
                "outliers": zeroed.tolist(),
            }
        )
        numbers = {"t_vhd": float(totals.mean()), "vhd_outliers": float(zeroed.double().mean())}
        return Findings(scores, numbers, [facts_of(samples, data)], {"vhd_questions": table})

    def question(self, scope: Scope, sample: Sample) -> Unit:
        """One question: VHD [L, H] before eq. 6, and ||z||^2 [L, H] of the run without the picture."""
        with_picture, places = last_outputs(scope, sample.inputs)
        if self.without == "blank":
            without, _ = last_outputs(scope, blank(sample))
        else:
            without, _ = last_outputs(scope, text_only(sample, places if self.positions == "keep" else None))
        apart = stack(distance(a, b, self.distance) for a, b in zip(with_picture, without, strict=True))
        return {"vhd": apart, "norm": stack(one.square().sum(-1) for one in without)}


def last_outputs(scope: Scope, inputs: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """Per layer z [H, Dv] float64 of the last row, and the position ids [..., N] that the text stack was given (or counts by itself)."""
    seen: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("position_ids"), torch.Tensor):
            seen.append(kwargs["position_ids"].cpu())

    hook = text_stack(scope).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with record_heads(scope, sites=("z",), to_cpu=True) as record:
            outputs_of(scope, {**inputs, **last_row(scope)})
    finally:
        hook.remove()
    count = inputs["input_ids"].shape[1]
    places = seen[0] if seen else torch.arange(count)[None]
    return [record.z(module.name)[0, -1].double() for module in scope.topology.main], places


def text_only(sample: Sample, places: Tensor | None) -> dict[str, Any]:
    """Model inputs of the question without its picture. `places` [..., N]: positions to hold; None counts the text from 0.

    A mask of ones goes along: without one, a jump in the positions would be read as the border of two packed texts.
    """
    kept = ~sample.frame
    ids = sample.inputs["input_ids"][:, kept]
    held = torch.arange(ids.shape[1])[None] if places is None else places[..., kept]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": held}


def blank(sample: Sample) -> dict[str, Any]:
    """Model inputs with every pixel at 0, an even gray once pictures are normalised."""
    pixels = {name: torch.zeros_like(value) for name, value in sample.inputs.items() if name.startswith("pixel_values")}
    if not pixels:
        raise refusal(ProbeError, "inputs without pixel_values", "there is nothing to blank", "pass without='removed'")
    return {**sample.inputs, **pixels}


def distance(a: Tensor, b: Tensor, kind: str = "l2") -> Tensor:
    """[H] between head outputs [H, Dv]; two zero vectors are at distance 0."""
    apart = (a - b).norm(dim=-1)
    if kind == "l2":
        return apart
    if kind == "relative":
        return apart / (a.norm(dim=-1) + b.norm(dim=-1)).clamp_min(1e-30)
    return torch.where(apart > 0, 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-30), torch.zeros_like(apart))


def without_outliers(vhd: Tensor, text_norm: Tensor) -> Tensor:
    """Eq. 6: VHD [L, H] with the heads at 0 that are above mean + standard deviation of their layer both in VHD and in `text_norm` [L, H],
    the squared length of their text-only output.
    """
    return torch.where(_high(vhd) & _high(text_norm), torch.zeros_like(vhd), vhd)


def _high(values: Tensor) -> Tensor:
    mean = values.nanmean(-1, keepdim=True)
    return values > mean + (values - mean).square().nanmean(-1, keepdim=True).sqrt()


def chosen(vhd: Tensor) -> Tensor:
    """Eq. 7: bool [L, H], the heads above the median of their layer. With an even number of heads the median lies between the middle
    two.
    """
    return vhd > vhd.nanquantile(0.5, dim=-1, keepdim=True)


def t_vhd(vhd: Tensor, k: int | None = None) -> Tensor:
    """Eq. 5: the sum over layers of the k largest VHD of each; k None: half of the layer's heads, at least one."""
    total = torch.zeros((), dtype=torch.float64)
    for row in vhd:
        known = row[~row.isnan()]
        if len(known):
            total = total + known.topk(min(k or max(1, len(known) // 2), len(known))).values.sum()
    return total


def _share(flags: Tensor, like: Tensor) -> Tensor:
    return flags.double().mean(0).masked_fill(like.isnan(), float("nan"))


def effect(scope: Scope, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """(probabilities with the picture, with a blank one), each [questions, vocabulary] float64, of the first word of the answers.

    Inside scope.intervene(...) it says what an edit leaves of the picture's effect.
    """
    seen = [first_word(scope, sample.inputs) for sample in samples]
    unseen = [first_word(scope, blank(sample)) for sample in samples]
    return torch.stack(seen), torch.stack(unseen)


__all__ = ["Vhd", "chosen", "distance", "effect", "t_vhd", "without_outliers"]

"""Vision mass: how much of its attention a head gives to the picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.base import Metric
from headscope.probes.pictures import Sample, extended, facts_of, samples_of, unseeing
from headscope.probes.responses import unended

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.scope import Scope

CLASSES = ("image", "first", "text")
"""Image tokens; the first token of the prompt, where it is none of these; all other text."""


@dataclass(frozen=True)
class VisionMass(ActiveProbe):
    """The share of a row's attention that lies on image tokens, over the rows of the answer and over those of the question.

    Sum of A[t, s] over the image tokens s, mean over rows t and questions. `vision_mass`: the rows that write the answer, from the last
    token of the prompt on (the model's own greedy answer of at most `answer_tokens`, read in one teacher-forced pass, which gives the rows
    of its generation). `vision_mass_question`: the text that stands behind the picture in the prompt, the last token included. The table
    `layers` has their means per layer, beside the mass on the first token and on text.

    The mass says where a head looks, not what it takes from there: a head may rest on a few image tokens that say nothing (visual_sinks)
    and may write next to nothing of what it reads (vhd). With nothing but image tokens in sight every head has mass 1, so compare heads in
    the same rows only.

    Departures: the papers use the sum to choose heads in a row (VAR), or its mean over a layer (FastV); the mean over rows as a head's
    number is ours.
    """

    name: ClassVar[str] = "vision_mass"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("vision_mass", "probability", "looks at the picture while it answers"),
        Metric("vision_mass_question", "probability", "looks at the picture while it reads the question"),
    )
    data: ClassVar[str] = "pictures"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "images", "generation")
    cost: ClassVar[str] = "an answer of up to 8 tokens and one forward pass a question; 24 questions"
    source: ClassVar[str] = (
        "the sum that selects heads in VAR, arXiv:2503.03321 (seilk/VisAttnSink), and attention allocation in FastV, arXiv:2403.06764"
    )

    answer_tokens: int = 8
    samples: int = 24

    def __post_init__(self) -> None:
        if self.answer_tokens < 1:
            raise refusal(ProbeError, f"answer_tokens={self.answer_tokens}", "the first word of an answer is one token", "pass 1 or more")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or unseeing(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """Both masses for every question; see the class."""
        samples = samples_of(scope, data, count=self.samples, seed=work.seed)
        units = [work.unit(f"question {n}", partial(self.question, scope, sample)) for n, sample in work.each(enumerate(samples))]
        answer = torch.stack([unit["answer"] for unit in units]).mean(0)  # [L, H, C]
        question = torch.stack([unit["question"] for unit in units]).mean(0)
        scores = {"vision_mass": answer[..., 0], "vision_mass_question": question[..., 0]}
        notes = [] if all(not bool(sample.image[0]) for sample in samples) else ["some prompts begin with the picture: no first token"]
        return Findings(scores, {}, [facts_of(samples, data)], {"layers": self._layers(scope, answer, question)}, notes)

    def question(self, scope: Scope, sample: Sample) -> Unit:
        """One question: class masses [L, H, 3] of the answer's rows and of the question's."""
        written = greedy(scope, sample, self.answer_tokens)
        last = len(sample.ids) - 1
        mass, _ = masses(scope, extended(sample, written[:-1]))
        return {"answer": mass[:, :, last:].mean(2), "question": mass[:, :, sample.end : last + 1].mean(2), "written": written}

    def _layers(self, scope: Scope, answer: Tensor, question: Tensor) -> pd.DataFrame:
        import pandas as pd

        rows: dict[str, list[float]] = {"layer": list(map(float, scope.topology.layers))}
        for what, values in (("answer", answer), ("question", question)):
            for number, name in enumerate(CLASSES):
                rows[f"{what}_{name}"] = values[..., number].nanmean(1).tolist()
        return pd.DataFrame(rows).astype({"layer": int})


def greedy(scope: Scope, sample: Sample, tokens: int) -> Tensor:
    """[n] int64: the first words of the model's greedy answer, at least one; without the end-of-text behind them."""
    written: Tensor = scope.generate(sample.inputs, max_new_tokens=tokens).new_ids[0]
    return unended(scope, written, 1)


def masses(scope: Scope, sample: Sample) -> tuple[Tensor, Tensor]:
    """(class masses [L, H, N, 3] over CLASSES, entropy [L, H, N]) float64 of one forward pass; NaN where a layer has fewer heads."""
    labels = torch.where(sample.image, 0, 2)
    if not bool(sample.image[0]):
        labels[0] = 1
    stats = scope.capture(sample.inputs, statistics=["class_mass", "entropy"], labels=labels, label_names=CLASSES)
    mass, entropy = stats["class_mass"], stats["entropy"]
    layers, count = scope.topology.layers, len(sample.ids)

    whole = padded([mass[layer][0].flatten(1) for layer in layers]).unflatten(-1, (count, len(CLASSES)))
    return whole, padded([entropy[layer][0] for layer in layers])


def padded(values: list[Tensor]) -> Tensor:
    """[H, n] per layer -> [L, H, n] float64, NaN where a layer has fewer heads."""
    heads = max(len(one) for one in values)
    return torch.stack([torch.nn.functional.pad(one.double(), (0, 0, 0, heads - len(one)), value=float("nan")) for one in values])


__all__ = ["CLASSES", "VisionMass", "greedy", "masses", "padded"]

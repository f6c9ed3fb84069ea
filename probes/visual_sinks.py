"""Visual sinks: image tokens that draw attention without meaning anything, and the heads that look past them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.interventions.base import Intervention
from headscope.interventions.running import run_once
from headscope.kernels import measure as measured
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.base import Metric
from headscope.probes.layer_inputs import first_dimensions, rms_normed, watching
from headscope.probes.pictures import Sample, facts_of, samples_of, unseeing
from headscope.probes.vision_mass import padded
from headscope.statistics import StatisticsRequest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

PAPER_TAU = 20.0
PAPER_SHARE = PAPER_TAU / 64
"""20 as a share of the largest value that phi can have in LLaMA-2-7B, sqrt(4096)."""
NAMES = ("visual", "visual sink", "text sink", "text")


@dataclass(frozen=True)
class VisualSinks(ActiveProbe):
    """Sink tokens of the picture by their hidden state, and image-centric heads by where their attention on the picture lies.

    phi(x) = max over d in D_sink of |x_d / RMS(x)|, x the input of a layer; a token is a sink of the layer when phi >= `tau`. D_sink, the
    dimensions in which the first token (BOS) is massive, is found from the model: the `count` dimensions with the largest mean |x_d /
    RMS(x)| of the first token over the layers' inputs, from the third layer on. Of a text row behind the picture:

        r = attention on image tokens that are no sinks / attention on all image tokens
        image-centric: attention on the picture >= `min_visual` and r >= `rho`

    `image_centric` is the share of such rows; `visual_nonsink` is r over all rows together (the sum of the one over the sum of the other);
    `visual_sink_mass` the mean attention on visual sinks. The table `tokens` lists the sinks with layer, phi and place; `dimensions` the
    ranking behind D_sink. `dimensions=(d, ...)` sets D_sink.

    `tau`: the paper's 20 belongs to hidden states of 4,096 dimensions, where phi reaches 64; RMS normalisation bounds it by sqrt(d). None
    takes 20 from d = 1,600 on and the same share of sqrt(d), 0.3125, below, and says which. `rho`: 0.8 for general questions, 0.5 for
    hallucination, 0.9 for vision-centric ones in the paper.

    Departures: the official code keeps a head when the share of *sinks* is at most rho (equal only at rho = 0.5) and adds 1e-6 to
    each of 576 weights; here r is exact. Its D_sink is a table for two language models. Its layers 0 and 1 are left out of the edit; every
    layer is measured here.
    """

    name: ClassVar[str] = "visual_sinks"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("image_centric", "share of rows", "looks at the picture and past its sinks"),
        Metric("visual_nonsink", "share of visual attention", "looks at what the picture shows, not at its sinks"),
        Metric("visual_sink_mass", "probability", "rests on sinks of the picture"),
    )
    data: ClassVar[str] = "pictures"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "images")
    cost: ClassVar[str] = "one forward pass a question; 24 questions"
    source: ClassVar[str] = "VAR, See What You Are Told, arXiv:2503.03321, github.com/seilk/VisAttnSink"

    tau: float | None = None
    rho: float = 0.8
    min_visual: float = 0.2
    dimensions: tuple[int, ...] | None = None
    count: int = 2
    samples: int = 24

    def __post_init__(self) -> None:
        for name, value in (("rho", self.rho), ("min_visual", self.min_visual)):
            if not 0 <= value <= 1:
                raise refusal(ProbeError, f"{name}={value}", "it is a share", "pass a number from 0 to 1")
        if self.count < 1 or self.dimensions == ():
            raise refusal(ProbeError, "no sink dimension", "phi is a maximum over at least one", "pass count=2, or dimensions=(...)")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or unseeing(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """One pass per question; see the class."""
        import pandas as pd

        samples = samples_of(scope, data, count=self.samples, seed=work.seed)
        if self.dimensions is None:
            ranked = work.unit("dimensions", lambda: {"first": first_token(scope, samples[0])})["first"]
            used = tuple(ranked.topk(min(self.count, len(ranked))).indices.tolist())
        else:
            ranked, used = None, self.dimensions
        width = int(scope.model.get_input_embeddings().weight.shape[1])
        if max(used) >= width or min(used) < 0:
            raise refusal(ProbeError, f"dimensions={used}", f"the residual stream of {scope.name} has 0..{width - 1}", "pass some of these")
        tau = self.threshold(scope, width)
        units = [
            work.unit(f"question {n}", partial(self.question, scope, sample, used, tau)) for n, sample in work.each(enumerate(samples))
        ]
        mass = torch.cat([unit["mass"] for unit in units], 2)  # [L, H, rows, 4]
        visual = mass[..., 0] + mass[..., 1]
        ratio = mass[..., 0] / visual.clamp_min(1e-30)
        absent = visual.isnan().all(2)
        centric = ((visual >= self.min_visual) & (ratio >= self.rho)).double().mean(2).masked_fill(absent, float("nan"))
        nonsink = mass[..., 0].sum(2) / visual.sum(2).clamp_min(1e-30)
        scores = {"image_centric": centric, "visual_nonsink": nonsink, "visual_sink_mass": mass[..., 1].mean(2)}
        counts = torch.stack([(unit["labels"] == 1).sum(1).double() for unit in units])
        numbers = {
            "visual_sinks": float(counts.mean()),
            "visual_sink_tau": tau,
            "phi_largest_visual": float(max(float(unit["phi"][:, s.image].max()) for unit, s in zip(units, samples, strict=True))),
        }
        tables = {"tokens": self._tokens(scope, samples, units)}
        if ranked is not None:
            order = ranked.argsort(descending=True)[:32]
            tables["dimensions"] = pd.DataFrame({"dimension": order.tolist(), "normed": ranked[order].tolist()})
        return Findings(scores, numbers, [facts_of(samples, data)], tables, self._notes(scope, samples, used, tau, width))

    def threshold(self, scope: Scope, width: int) -> float:
        """tau for hidden states of this width. ProbeError for one that no token can reach."""
        if self.tau is None:
            return PAPER_TAU if width >= 1600 else PAPER_SHARE * sqrt(width)
        if self.tau > sqrt(width):
            raise refusal(
                ProbeError,
                f"tau={self.tau:g} on {scope.name}",
                f"with {width} dimensions phi is at most {sqrt(width):.1f}, so no token could be a sink",
                f"pass tau={PAPER_SHARE * sqrt(width):.1f} or less, or None",
            )
        return self.tau

    def question(self, scope: Scope, sample: Sample, dimensions: Sequence[int], tau: float) -> Unit:
        """One question: class masses [L, H, rows, 4] over NAMES of the text rows behind the picture; labels and phi [L, N] per layer."""
        phi: list[Tensor] = []
        labels: list[Tensor] = []

        def see(place: int, hidden: Tensor) -> None:
            if place == len(scope.topology.main):
                return
            phi.append(sink_phi(hidden[0], dimensions).cpu())
            labels.append(sink_labels(phi[-1], sample.image, tau))

        names = {module.name: place for place, module in enumerate(scope.topology.main)}
        reader = _LayerLabels(names, labels)
        with scope.intervene(reader), watching(scope, see):
            run_once(scope, sample.inputs)
        found = padded([reader.found[place][:, sample.end :].flatten(1) for place in range(len(names))])
        return {"mass": found.unflatten(-1, (-1, len(NAMES))), "labels": torch.stack(labels), "phi": torch.stack(phi)}

    def _tokens(self, scope: Scope, samples: list[Sample], units: list[Unit]) -> pd.DataFrame:
        import pandas as pd

        rows = []
        for number, (sample, unit) in enumerate(zip(samples, units, strict=True)):
            first, columns = int(sample.image.nonzero()[0]), (sample.grid or (0, 0))[1]
            for place, position in (unit["labels"] % 3 > 0).nonzero().tolist():  # labels 1 and 2
                inside = bool(sample.image[position])
                rows.append(
                    {
                        "question": number,
                        "layer": scope.topology.layers[place],
                        "position": position,
                        "visual": inside,
                        "row": (position - first) // columns if inside and columns else -1,
                        "column": (position - first) % columns if inside and columns else -1,
                        "phi": float(unit["phi"][place, position]),
                    }
                )
        return pd.DataFrame(rows, columns=["question", "layer", "position", "visual", "row", "column", "phi"])

    def _notes(self, scope: Scope, samples: list[Sample], used: Sequence[int], tau: float, width: int) -> list[str]:
        how = "given" if self.dimensions is not None else "found from the first token"
        notes = [f"sink dimensions {', '.join(map(str, used))} ({how}); tau {tau:.3g} of at most {sqrt(width):.3g}"]
        if self.dimensions is None and _begin(scope, samples[0])[1]:
            notes.append(_begin(scope, samples[0])[1])
        return notes


@dataclass(frozen=True)
class _LayerLabels(Intervention):
    """Measures class masses under labels that every layer has of its own, which no request can say; changes nothing."""

    places: dict[str, int]
    labels: list[Tensor]
    found: dict[int, Tensor] = field(default_factory=dict)

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        place = self.places.get(call.module)
        if place is not None:
            request = StatisticsRequest(("class_mass",), labels=self.labels[place].to(call.q.device), label_names=NAMES)
            with torch.no_grad():
                self.found[place] = measured(call, request).rows["class_mass"][0].double().cpu()
        return output


def sink_phi(hidden: Tensor, dimensions: Sequence[int]) -> Tensor:
    """[..., N] float64: phi of hidden states [..., N, d]."""
    from headscope.kernels.partial import head_index

    wide = torch.promote_types(hidden.dtype, torch.float32)
    size = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide).double() / sqrt(hidden.shape[-1])  # no copy of the stream in float64
    return hidden[..., head_index(tuple(dimensions), hidden.device)].double().abs().amax(-1) / size.clamp_min(1e-30)


def sink_labels(phi: Tensor, image: Tensor, tau: float) -> Tensor:
    """[N] int64: 0 visual, 1 visual sink, 2 text sink, 3 text."""
    sink = phi >= tau
    return torch.where(image, sink.long(), torch.where(sink, 2, 3))


def first_token(scope: Scope, sample: Sample) -> Tensor:
    """[d] float64: |x / RMS(x)| of the first token, as `first_dimensions` has it. It is run alone: in a causal model no later token changes
    it.
    """
    seen: list[Tensor] = []

    def see(place: int, hidden: Tensor) -> None:
        if place < len(scope.topology.main):
            seen.append(rms_normed(hidden[0, 0]).abs().cpu())

    with watching(scope, see):
        run_once(scope, torch.tensor([[_begin(scope, sample)[0]]]))
    return first_dimensions(seen)


def _begin(scope: Scope, sample: Sample) -> tuple[int, str]:
    """(id of the token that stands for BOS, what a reader must know of it). ProbeError where there is none."""
    bos = None if scope.tokenizer is None else scope.text_tokenizer.bos_token_id
    first = int(sample.ids[0])
    if bos is None and bool(sample.image[0]):
        raise refusal(
            ProbeError,
            f"sink dimensions of {scope.name}",
            "they are read off the first token, and the prompt begins with the picture while the tokenizer has no BOS",
            "pass dimensions=(d, ...)",
        )
    if bos is None:
        return first, f"no BOS: the sink dimensions were read off the prompt's first token ({first})"
    return int(bos), "" if bos == first else f"the prompt does not begin with BOS ({bos}), which the sink dimensions were read off"


__all__ = ["NAMES", "VisualSinks", "first_token", "sink_labels", "sink_phi"]
